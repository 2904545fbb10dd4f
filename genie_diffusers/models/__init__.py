from .derivative_head import DerivativeHead
from .dsno_unet import DSNOUNet2DModel
from .exact_slope import ExactSlope
from .genie_unet import GenieUNet2DConditionModel, GenieUNet2DModel
from .image_classifier import ImageClassifier
from .step_head import StepHead

__all__ = [
    "DSNOUNet2DModel",
    "DerivativeHead",
    "ExactSlope",
    "GenieUNet2DConditionModel",
    "GenieUNet2DModel",
    "ImageClassifier",
    "StepHead",
]
