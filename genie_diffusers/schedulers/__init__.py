from .scheduling_gddim import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler, LinearDiffusionScheduler
from .scheduling_genie import GenieScheduler

__all__ = [
    "GDDIMBlurringScheduler",
    "GDDIMCLDScheduler",
    "GDDIMScheduler",
    "GenieScheduler",
    "LinearDiffusionScheduler",
]
