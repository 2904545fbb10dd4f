"""Fast sampling for Hugging Face diffusers.

Importing this package makes its schedulers and models known to `DiffusionPipeline.from_pretrained`; its own pipelines
are loaded by their own `from_pretrained`.
"""

from .models import DerivativeHead, DSNOUNet2DModel, ExactSlope, GenieUNet2DModel, ImageClassifier, StepHead
from .pipelines import DSNOPipeline, GDDIMPipeline, GeniePipeline
from .processes import Blurring, CriticallyDampedLangevin, LinearDiffusion, VariancePreserving
from .schedulers import (
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieScheduler,
    GGDMScheduler,
    LinearDiffusionScheduler,
    QuasiTaylorScheduler,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "Blurring",
    "CriticallyDampedLangevin",
    "DSNOPipeline",
    "DSNOUNet2DModel",
    "DerivativeHead",
    "ExactSlope",
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMPipeline",
    "GDDIMScheduler",
    "GGDMScheduler",
    "GeniePipeline",
    "GenieScheduler",
    "GenieUNet2DModel",
    "ImageClassifier",
    "LinearDiffusion",
    "LinearDiffusionScheduler",
    "QuasiTaylorScheduler",
    "StepHead",
    "VariancePreserving",
]
