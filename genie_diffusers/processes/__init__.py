from .blurring import Blurring
from .critically_damped_langevin import CriticallyDampedLangevin
from .linear_diffusion import LinearDiffusion
from .rectified_flow import RectifiedFlow
from .variance_preserving import VariancePreserving

__all__ = ["Blurring", "CriticallyDampedLangevin", "LinearDiffusion", "RectifiedFlow", "VariancePreserving"]
