from .scheduling_exponential_multistep import ExponentialMultistepScheduler
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler
from .scheduling_gddim import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler, LinearDiffusionScheduler
from .scheduling_genie import GenieScheduler
from .scheduling_genie_inverse import GenieInverseScheduler
from .scheduling_ggdm import GGDMScheduler
from .scheduling_quasi_taylor import QuasiTaylorScheduler
from .scheduling_utils import TableScheduler

__all__ = [
    "ExponentialMultistepScheduler",
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMScheduler",
    "GGDMScheduler",
    "GaussianDiffusionScheduler",
    "GenieInverseScheduler",
    "GenieScheduler",
    "LinearDiffusionScheduler",
    "QuasiTaylorScheduler",
    "TableScheduler",
]
