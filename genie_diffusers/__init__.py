"""Fast sampling for Hugging Face diffusers.

Importing this package makes its schedulers and models known to `DiffusionPipeline.from_pretrained`; its own pipelines
are loaded by their own `from_pretrained`.
"""

from typing import TYPE_CHECKING

from .calibration import calibrate
from .core import Levels, Table
from .models import (
    DerivativeHead,
    DSNOUNet2DModel,
    ExactSlope,
    GenieUNet2DConditionModel,
    GenieUNet2DModel,
    ImageClassifier,
    StepHead,
)
from .pipelines import DSNOPipeline, GDDIMPipeline, GenieDiTPipeline, GeniePipeline
from .processes import Blurring, CriticallyDampedLangevin, LinearDiffusion, RectifiedFlow, VariancePreserving
from .schedulers import (
    ExponentialMultistepScheduler,
    GaussianDiffusionScheduler,
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    LinearDiffusionScheduler,
    QuasiTaylorScheduler,
    TableScheduler,
)

if TYPE_CHECKING:
    from .pipelines.pipeline_genie_stable_diffusion import (
        GenieStableDiffusionPipeline,
        GenieStableDiffusionXLPipeline,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "Blurring",
    "CriticallyDampedLangevin",
    "DSNOPipeline",
    "DSNOUNet2DModel",
    "DerivativeHead",
    "ExactSlope",
    "ExponentialMultistepScheduler",
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMPipeline",
    "GDDIMScheduler",
    "GGDMScheduler",
    "GaussianDiffusionScheduler",
    "GenieDiTPipeline",
    "GenieInverseScheduler",
    "GeniePipeline",
    "GenieScheduler",
    "GenieStableDiffusionPipeline",
    "GenieStableDiffusionXLPipeline",
    "GenieUNet2DConditionModel",
    "GenieUNet2DModel",
    "ImageClassifier",
    "Levels",
    "LinearDiffusion",
    "LinearDiffusionScheduler",
    "QuasiTaylorScheduler",
    "RectifiedFlow",
    "StepHead",
    "Table",
    "TableScheduler",
    "VariancePreserving",
    "calibrate",
]


def __getattr__(name: str):
    # Text-to-image pipelines import transformers, which not everybody has or wants to wait for.
    if name in ("GenieStableDiffusionPipeline", "GenieStableDiffusionXLPipeline"):
        from .pipelines import pipeline_genie_stable_diffusion

        return getattr(pipeline_genie_stable_diffusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
