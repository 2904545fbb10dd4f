from .scheduling_genie import GenieScheduler

__all__ = ["GenieScheduler"]
