from .pipeline_gddim import GDDIMPipeline
from .pipeline_genie import GeniePipeline

__all__ = ["GDDIMPipeline", "GeniePipeline"]
