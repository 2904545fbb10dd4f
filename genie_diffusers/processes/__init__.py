from .blurring import Blurring
from .critically_damped_langevin import CriticallyDampedLangevin
from .linear_diffusion import LinearDiffusion
from .variance_preserving import VariancePreserving

__all__ = ["Blurring", "CriticallyDampedLangevin", "LinearDiffusion", "VariancePreserving"]
