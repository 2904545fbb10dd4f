"""Quasi-Taylor samplers based on ideal derivatives (Tachibana et al., 2021, https://huggingface.co/papers/2112.13339)."""

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)
from diffusers.utils import logging

from ..core.solvers.quasi_taylor import METHODS, quasi_taylor, quasi_taylor_weights
from ..core.table import Levels, Row
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler

TAYLOR_ORDERS = (1, 2, 3)

logger = logging.get_logger(__name__)


class QuasiTaylorScheduler(GaussianDiffusionScheduler):
    """
    The quasi-Taylor samplers, deterministic and stochastic.

    With ν = σ² and β = −d log α²/dt, one step of length h back in time is

        x(t − h) = ρ x + μ ε/√ν + n

    where ρ and μ are polynomials of degree `taylor_order` in h with coefficients in ν, β, dβ/dt and d²β/dt²: the
    Taylor expansion of the probability-flow ODE (n = 0), or of the reverse SDE (n Gaussian noise), with the
    derivatives of ε that hold if the data are a single point. As h → 0 or with growing order they tend to DDIM and to
    the DDPM posterior.

    The step to clean data (ν = 0, where the expansion has no radius of convergence) is that limit, x_0 itself. So is a
    step longer than the expansion allows, one where the polynomial misses its limit by as much as it is (see
    `departures`); `set_timesteps` warns of those. It happens on few and long steps, and at the end of schedules whose
    β is singular there (squared-cosine, zero terminal SNR).

    Flow-matching models are sampled on the variance-preserving path of the same noise levels.

    Args:
        method (`str`, defaults to `"ode"`):
            `"ode"`, deterministic, or `"sde"`, with fresh noise in every step but the last.
        taylor_order (`int`, defaults to 2):
            1 (Euler, or Euler–Maruyama), 2 or 3.

    All other arguments are those of [`GaussianDiffusionScheduler`].

    Attributes:
        departures (`np.ndarray` of shape `(num_inference_steps,)`):
            For each step, the relative error of the polynomial against its limit, see
            [`~core.solvers.quasi_taylor.departure`]; 0 for the step to clean data. Above 1 the limit is taken.
    """

    choices = {"method": METHODS, "taylor_order": TAYLOR_ORDERS}

    def __init__(self, method: str = "ode", taylor_order: int = 2, **kwargs):
        super().__init__(**kwargs)

    def row(self, levels: Levels, index: int, known: int) -> Row:
        return quasi_taylor(levels, index, known, self.config["method"], self.config["taylor_order"])

    @property
    def departures(self) -> np.ndarray:
        return quasi_taylor_weights(self.levels, self.config["method"], self.config["taylor_order"])[1]

    def _build(self, begin: int):
        super()._build(begin)
        if begin == 0 and self.table is not self._learned:  # a run that starts mid-way has been warned of
            self._warn_of_long_steps()

    def _warn_of_long_steps(self):
        long_steps = np.flatnonzero(self.departures > 1)
        if len(long_steps) > 0:
            limit = "DDIM" if self.config.method == "ode" else "the DDPM posterior"
            logger.warning(
                f"Steps {', '.join(map(str, long_steps))} of {self.num_inference_steps} are longer than the expansion "
                f"with `taylor_order={self.config.taylor_order}` allows: it would miss its limit, {limit}, by up to "
                f"{100 * self.departures.max():.3g}%. They take that limit; of more steps more are expanded."
            )
