from .scheduling_er_sde import ERSDEScheduler
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler
from .scheduling_gddim import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler, LinearDiffusionScheduler
from .scheduling_genie import GenieScheduler
from .scheduling_genie_inverse import GenieInverseScheduler
from .scheduling_ggdm import GGDMScheduler
from .scheduling_quasi_taylor import QuasiTaylorScheduler
from .scheduling_res import RESScheduler
from .scheduling_utils import TableScheduler

__all__ = [
    "ERSDEScheduler",
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMScheduler",
    "GGDMScheduler",
    "GaussianDiffusionScheduler",
    "GenieInverseScheduler",
    "GenieScheduler",
    "LinearDiffusionScheduler",
    "QuasiTaylorScheduler",
    "RESScheduler",
    "TableScheduler",
]
