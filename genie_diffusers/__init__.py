"""Fast sampling for Hugging Face diffusers.

Importing this package makes its schedulers and models known to `DiffusionPipeline.from_pretrained`; its own pipelines
are loaded by their own `from_pretrained`.
"""

from .models import DerivativeHead, ExactSlope, GenieUNet2DModel, ImageClassifier, StepHead
from .pipelines import GeniePipeline
from .processes import VariancePreserving
from .schedulers import GenieScheduler, QuasiTaylorScheduler

__version__ = "0.1.0.dev0"

__all__ = [
    "DerivativeHead",
    "ExactSlope",
    "GeniePipeline",
    "GenieScheduler",
    "GenieUNet2DModel",
    "ImageClassifier",
    "QuasiTaylorScheduler",
    "StepHead",
    "VariancePreserving",
]
