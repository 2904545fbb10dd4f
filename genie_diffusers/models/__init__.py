from .derivative_head import DerivativeHead
from .exact_slope import ExactSlope
from .genie_unet import GenieUNet2DModel
from .image_classifier import ImageClassifier

__all__ = ["DerivativeHead", "ExactSlope", "GenieUNet2DModel", "ImageClassifier"]
