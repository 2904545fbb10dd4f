from .pipeline_dsno import DSNOPipeline
from .pipeline_gddim import GDDIMPipeline
from .pipeline_genie import GeniePipeline
from .pipeline_genie_dit import GenieDiTPipeline

__all__ = ["DSNOPipeline", "GDDIMPipeline", "GenieDiTPipeline", "GeniePipeline"]
