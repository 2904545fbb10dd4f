from .scheduling_genie import GenieScheduler
from .scheduling_quasi_taylor import QuasiTaylorScheduler

__all__ = ["GenieScheduler", "QuasiTaylorScheduler"]
