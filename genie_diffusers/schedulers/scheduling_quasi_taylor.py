"""Quasi-Taylor samplers based on ideal derivatives (Tachibana et al., 2021, https://huggingface.co/papers/2112.13339)."""

import numpy as np
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)
from diffusers.utils import logging

from .ideal_derivatives import METHODS, StepWeights, departure, limit_weights, taylor_weights
from .scheduling_utils import Row, TableScheduler

TAYLOR_ORDERS = (1, 2, 3)

logger = logging.get_logger(__name__)


class QuasiTaylorScheduler(TableScheduler):
    """
    The quasi-Taylor samplers for variance-preserving diffusion models, deterministic and stochastic.

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

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps the model was trained with.
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02):
            First and last variance of the noise schedule.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*):
            The variances themselves, instead of the three above.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale to zero terminal signal-to-noise ratio.
        continuous (`bool`, defaults to `False`):
            Use the analytic process β(τ) = N·(beta_start + (beta_end − beta_start)·τ), τ ∈ [10⁻³, 1], N =
            `num_train_timesteps`, for models trained in continuous time; the model is called with (N − 1)·τ.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the model predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        variance_type (`str`, *optional*):
            With `"learned"` or `"learned_range"` the second half of the model's output channels is dropped.
        clip_sample (`bool`, defaults to `False`), clip_sample_range (`float`, defaults to 1.0):
            Clip the predicted x_0.
        thresholding (`bool`, defaults to `False`), dynamic_thresholding_ratio (`float`, defaults to 0.995),
        sample_max_value (`float`, defaults to 1.0):
            Dynamic thresholding of the predicted x_0, for models in pixel space.
        timestep_spacing (`str`, defaults to `"linspace"`), steps_offset (`int`, defaults to 0):
            diffusers' spacing of timesteps, as its multistep solvers define it, and the offset of `"leading"`.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas (`bool`, default to `False`):
            diffusers' grids in noise level; they take precedence over `timestep_spacing`.
        final_sigmas_type (`str`, defaults to `"zero"`):
            Where sampling ends: `"zero"`, clean data, or `"sigma_min"`, the smallest noise level of the process.
        time_grid (`str`, *optional*):
            A grid between both ends of the process: `"linear"` (even in t), `"quadratic"` (even in √t),
            `"uniform_lambda"`, `"power_lambda"`, `"karras"`, `"beta"`, or one of diffusers' spacings. `None` is what
            the keys above say.
        method (`str`, defaults to `"ode"`):
            `"ode"`, deterministic, or `"sde"`, with fresh noise in every step but the last.
        taylor_order (`int`, defaults to 2):
            1 (Euler, or Euler–Maruyama), 2 or 3.
        analytical_first_step (`bool`, defaults to `False`):
            Take a first DDIM step with ε(x_T) := x_T, which needs no model call, as in [`GenieScheduler`].

    Attributes:
        departures (`np.ndarray` of shape `(num_inference_steps,)`):
            For each step, the relative error of the polynomial against its limit, see
            [`~schedulers.ideal_derivatives.departure`]; 0 for the step to clean data. Above 1 the limit is taken.
    """

    methods = METHODS

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        continuous: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        final_sigmas_type: str = "zero",
        time_grid: str | None = None,
        method: str = "ode",
        taylor_order: int = 2,
        analytical_first_step: bool = False,
    ):
        super().__init__()

    def _check_config(self):
        super()._check_config()
        for key, choices in (("method", METHODS), ("taylor_order", TAYLOR_ORDERS)):
            if self.config[key] not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"`{key}` must be one of {names}, got {self.config[key]!r}.")

    def _build(self, begin: int):
        process, method = self.process, self.config.method
        times = np.append(self._host_timesteps, process.timestep_min)
        alpha, alpha_next = self.alphas[:-1], self.alphas[1:]
        sigma, sigma_next = self.noise_stds[:-1], self.noise_stds[1:]
        betas = [process.beta(times[:-1], derivative) for derivative in range(self.config.taylor_order)]
        limit = limit_weights(method, alpha, sigma, alpha_next, sigma_next)
        # β = 0 in a schedule with jumps, and the division by σ = 0 at clean data
        with np.errstate(divide="ignore", invalid="ignore"):
            expanded = taylor_weights(method, self.config.taylor_order, -np.diff(times), betas, sigma**2)
            departures = departure(expanded, limit, sigma, alpha_next, sigma_next)
        self.departures = np.where(sigma_next > 0, np.nan_to_num(departures, nan=np.inf, posinf=np.inf), 0.0)
        takes_limit = (sigma_next == 0) | (self.departures > 1)
        self._weights = StepWeights(*(np.where(takes_limit, *pair) for pair in zip(limit, expanded, strict=True)))
        super()._build(begin)
        if begin == 0:  # a run that starts mid-way has been warned of
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

    def row(self, index: int, known: int) -> Row:
        weights = {(name, 0): float(values[index]) for name, values in self._weights._asdict().items()}
        return {column: weight for column, weight in weights.items() if weight != 0.0}
