from .variance_preserving import VariancePreserving

__all__ = ["VariancePreserving"]
