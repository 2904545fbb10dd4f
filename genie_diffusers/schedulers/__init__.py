from .scheduling_gddim import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler, LinearDiffusionScheduler
from .scheduling_genie import GenieScheduler
from .scheduling_genie_inverse import GenieInverseScheduler
from .scheduling_ggdm import GGDMScheduler
from .scheduling_quasi_taylor import QuasiTaylorScheduler

__all__ = [
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMScheduler",
    "GGDMScheduler",
    "GenieInverseScheduler",
    "GenieScheduler",
    "LinearDiffusionScheduler",
    "QuasiTaylorScheduler",
]
