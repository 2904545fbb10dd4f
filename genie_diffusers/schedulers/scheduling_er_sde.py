"""ER-SDE (Cui et al., 2023, https://huggingface.co/papers/2309.06169)."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.er_sde import er_sde
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler


class ERSDEScheduler(GaussianDiffusionScheduler):
    """
    The extended reverse-time SDE solver with the paper's recommended noise scale: a stochastic sampler for few calls.

    Args:
        multistep_order (`int`, defaults to 2): 1 or 2.

    All other arguments are those of [`GaussianDiffusionScheduler`].
    """

    choices = {"multistep_order": (1, 2)}

    def __init__(self, multistep_order: int = 2, **kwargs):
        super().__init__(**kwargs)

    def row(self, levels, index, known):
        return er_sde(levels, index, known, self.config["multistep_order"])
