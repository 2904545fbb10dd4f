from .pipeline_genie import GeniePipeline

__all__ = ["GeniePipeline"]
