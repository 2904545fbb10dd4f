from .pipeline_dsno import DSNOPipeline
from .pipeline_gddim import GDDIMPipeline
from .pipeline_genie import GeniePipeline

__all__ = ["DSNOPipeline", "GDDIMPipeline", "GeniePipeline"]
