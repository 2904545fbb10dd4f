"""RES-2M and RES-3M (Zhang et al., 2023, https://huggingface.co/papers/2308.02157)."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.res import res_multistep
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler


class RESScheduler(GaussianDiffusionScheduler):
    """
    The refined exponential solver, multistep: the probability-flow ODE in x_0, by exact exponential integrals.

    Args:
        multistep_order (`int`, defaults to 2): 2 (RES-2M) or 3 (RES-3M); 1 is DDIM.

    All other arguments are those of [`GaussianDiffusionScheduler`].
    """

    choices = {"multistep_order": (1, 2, 3)}

    def __init__(self, multistep_order: int = 2, **kwargs):
        super().__init__(**kwargs)

    def row(self, levels, index, known):
        return res_multistep(levels, index, known, self.config["multistep_order"])
