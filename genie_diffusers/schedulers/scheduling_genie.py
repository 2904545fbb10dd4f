"""GENIE: higher-order denoising diffusion solvers (Dockhorn, Vahdat & Kreis, 2022, https://huggingface.co/papers/2210.05475)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..processes import LinearDiffusion, RectifiedFlow
from .hermite import hermite, hermite_correction
from .interpolation import interpolation_weights, polynomial_moments
from .scheduling_utils import PREDICTION_TYPES, Row, TableScheduler

METHODS = ("hermite", "taylor")


class GenieScheduler(TableScheduler):
    """
    Higher-order solvers of the probability-flow ODE of variance-preserving diffusion models, with or without slopes.

    `method="taylor"` is the second truncated Taylor method of GENIE. In x̄ = x/α and γ = σ/α the ODE is
    dx̄/dγ = ε(x, t), and one step of length h in γ is

        x̄(γ + h) = x̄ + h ε + ½ h² dε/dγ

    where dε/dγ = −(1/γ) dε/dλ comes from a slope source (see [`~TableScheduler.attach`]): a distilled head, or exact
    forward-mode derivatives. Without a source the derivative is the finite difference of the last two predictions,
    which is the two-step Adams–Bashforth method.

    `method="hermite"` takes the data prediction D = (x − σ ε)/α to be a random function of λ, and integrates its mean
    given everything known of it, values and slopes dD/dλ = −(σ/α) dε/dλ at this point and earlier ones:

        x_{n+1} = (σ_{n+1}/σ_n) x_n + σ_{n+1} ∫ e^λ D(λ) dλ

    In short steps that is the polynomial through all conditions, and `interpolation_order`, their number, the order of
    this predictor; in long steps what is far away counts for less (see `hermite.py`). When the model has been called
    at the new point, the step is corrected, at no further call, with values and slopes at both its ends, or without
    slopes with the values at both ends and at the point before. Without a source it is a multistep method of the
    family of DPM-Solver++ and UniPC.

    If the attached model has a [`StepHead`], its learned tables replace both methods for the numbers of model calls
    that it has them for, time grid included, for runs from pure noise.

    Either way the first step without a derivative, and the last one to clean data, are DDIM steps.

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
            What the model predicts: `"epsilon"`, `"sample"`, `"v_prediction"`, or `"flow_prediction"`, the velocity
            z − x_0 of a flow-matching model. The path is then x_t = (1 − σ) x_0 + σ z, σ = t/`num_train_timesteps`
            ([`RectifiedFlow`]), and of the keys above only `num_train_timesteps` counts.
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
            Where sampling ends, as in diffusers' multistep solvers: `"zero"`, clean data (the paper's final denoising
            step), or `"sigma_min"`, the smallest noise level of the process.
        denoising_step (`bool`, defaults to `False`):
            With `final_sigmas_type="zero"` and a `time_grid` between both ends, spend the last model call at the
            smallest timestep (the paper's final denoising step). Otherwise the grid has one point more, and the last
            step jumps from the last but one straight to clean data: a shorter step everywhere else.
        time_grid (`str`, *optional*):
            A grid between both ends of the process: `"quadratic"` (even in √t) and `"linear"` (even in t), the two of
            the paper, `"uniform_lambda"`, `"power_lambda"`, `"karras"`, `"beta"`, or one of diffusers' spacings.
            `None` is what the keys above say.
        method (`str`, defaults to `"hermite"`):
            The solver: `"hermite"` or `"taylor"`.
        flow_shift (`float`, defaults to 1.0):
            How much timesteps are shifted towards noise with `prediction_type="flow_prediction"`, the `shift` of
            [`FlowMatchEulerDiscreteScheduler`]; not with grids in noise level.
        interpolation_order (`int`, *optional*):
            How many conditions the predictor of `method="hermite"` follows, 1 to 4, fewer while fewer are known; its
            order of convergence. `None` is 4, and with slopes, which a head knows only roughly, 3.
        analytical_first_step (`bool`, defaults to `False`):
            Take a first step with ε(x_T) := x_T, which needs no model call. It happens inside `init_noise_sigma`,
            before the first of the `num_inference_steps`; pipelines that ignore `init_noise_sigma`
            (`DDPMPipeline`, `DDIMPipeline`) leave out its rescaling, which is within 1% of one for usual schedules.
    """

    _compatibles = [*TableScheduler._compatibles, "FlowMatchEulerDiscreteScheduler"]
    methods = METHODS
    prediction_types = (*PREDICTION_TYPES, "flow_prediction")

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
        denoising_step: bool = False,
        method: str = "hermite",
        flow_shift: float = 1.0,
        interpolation_order: int | None = None,
        analytical_first_step: bool = False,
    ):
        super().__init__()

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        if "shift" in config_dict and "beta_schedule" not in config_dict:  # that of a flow-matching scheduler
            unknown = [
                key for key in ("invert_sigmas", "shift_terminal", "stochastic_sampling") if config_dict.get(key)
            ]
            if unknown:
                raise ValueError(f"`{unknown[0]}={config_dict[unknown[0]]}` of `config` is not supported.")
            own = {"prediction_type": "flow_prediction", "flow_shift": config_dict["shift"]}
            config_dict = {"beta_schedule": "linear", **own, **config_dict}
        if "encoding" not in cls._get_init_keys(cls):  # the rows of an inverse stay behind
            config_dict = {key: value for key, value in config_dict.items() if key != "encoding"}
        return super().extract_init_dict(config_dict, **kwargs)

    # --- flow matching ---------------------------------------------------------------------------------------------

    @property
    def _flows(self) -> bool:
        return self.config.prediction_type == "flow_prediction"

    @property
    def _process_class(self) -> type[LinearDiffusion]:
        return RectifiedFlow if self._flows else self.process_class

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ):
        """
        Set the timesteps and compute the table of weights. To be called before every sampling run.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of model calls, from 1 to `num_train_timesteps` (one less with the analytical first step, which
                needs a timestep of its own).
            device (`str` or `torch.device`, *optional*):
                Device of `timesteps`.
            timesteps (`Sequence[float]`, *optional*):
                Custom strictly decreasing timesteps, instead of `num_inference_steps`.
            sigmas (`Sequence[float]`, *optional*):
                Custom strictly decreasing noise levels γ = σ/α of the model calls, instead of `num_inference_steps`;
                each is moved to the nearest timestep. With `prediction_type="flow_prediction"` they are the σ, from 1
                down, before they are shifted, as pipelines of flow-matching models pass them.
            mu (`float`, *optional*):
                What pipelines derive the shift from if the scheduler's `use_dynamic_shifting` is set: e^μ, or μ
                itself with `time_shift_type="linear"`. Without that key it means nothing, as in diffusers.

        Raises:
            ValueError: If not exactly one of the three is given, or if it is out of range; if `mu` is missing where
                it is needed.
        """
        dynamic = self._flows and self.config.get("use_dynamic_shifting", False)
        if dynamic and mu is None:
            raise ValueError("`mu` must be given if `use_dynamic_shifting` is set, got `mu=None`.")
        self._shift = self.config.flow_shift
        if dynamic and mu is not None:
            self._shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)

    def _shifted(self, timesteps: np.ndarray) -> np.ndarray:
        return self.process.shifted(timesteps, self._shift) if self._flows else timesteps

    def _custom_points(self, timesteps, sigmas) -> np.ndarray:
        if not self._flows or sigmas is None:
            return super()._custom_points(timesteps, sigmas)
        points = np.asarray(sigmas, dtype=np.float64)
        if points.ndim != 1 or not (np.all(points > 0) and np.all(points <= 1) and np.all(np.diff(points) < 0)):
            raise ValueError(f"`sigmas` must strictly decrease and lie between 0 and 1, got {sigmas}.")
        return super()._custom_points(self._shifted(points * self.process.timestep_max).tolist(), None)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise`, as image-to-image pipelines of flow-matching models call it."""
        return self.add_noise(sample, noise, timestep)

    # --- the rows --------------------------------------------------------------------------------------------------

    def _check_config(self):
        super()._check_config()
        if self.config.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.config.method!r}.")
        if self.config.interpolation_order not in (None, 1, 2, 3, 4):
            raise ValueError(
                f"`interpolation_order` must be 1, 2, 3, 4 or None, got {self.config.interpolation_order!r}."
            )

    def learned_table(self, num_inference_steps: int) -> dict:
        return (self._tables or {}).get(str(num_inference_steps), {})

    @property
    def _tables(self) -> dict | None:
        return getattr(self._slope_source, "tables", None)

    @property
    def _follows_table(self) -> bool:
        """Learned rows need their source, and the history they were learned with: that of a whole run."""
        own = self._learned == self.learned_table(len(self._host_timesteps))
        return bool(self._learned) and own and self._built_for == 0

    @property
    def _has_slopes(self) -> bool:
        """Whether there is a source, and it is one of derivatives."""
        return self._slope_source is not None and self._tables is None

    @property
    def _order(self) -> int:
        return self.config.interpolation_order or (3 if self._has_slopes else 4)

    @property
    def data_form(self) -> bool:
        return self.config.method == "hermite" and not self._follows_table

    def row(self, index: int, known: int) -> Row:
        if self._follows_table:
            return self._learned_row(index)
        if self.config.method == "taylor":
            return self._taylor_row(index, known)
        levels = self.alphas, self.noise_stds
        return _of_prediction(hermite(levels, index, known, order=self._order, slopes=self._has_slopes))

    def correction(self, index: int, known: int) -> Row:
        if self.config.method == "taylor" or self._follows_table:
            return {}
        levels = self.alphas, self.noise_stds
        return _of_prediction(hermite_correction(levels, index, known, order=self._order, slopes=self._has_slopes))

    def _learned_row(self, index: int) -> Row:
        of_sample, *of_predictions = self._learned["weights"][index]
        row = {("sample", 0): of_sample} | {("prediction", lag): weight for lag, weight in enumerate(of_predictions)}
        residual = self._learned["residuals"][index]
        return row | {("slope", 0): residual} if residual else row

    def _taylor_row(self, index: int, known: int) -> Row:
        alpha, alpha_next = self.alphas[index : index + 2]
        gamma, gamma_next = self.noise_stds[index : index + 2] / self.alphas[index : index + 2]
        step = gamma_next - gamma
        columns, nodes, derivatives = [("prediction", 0)], [0.0], [0]
        if gamma > 0 and gamma_next > 0:  # the step to clean data is x_0 itself
            if self._has_slopes:
                columns, nodes, derivatives = [*columns, ("slope", 0)], [0.0, 0.0], [0, 1]
            elif known > 1 and self.noise_stds[index - 1] > 0:
                previous = self.noise_stds[index - 1] / self.alphas[index - 1] - gamma
                columns, nodes, derivatives = [*columns, ("prediction", 1)], [0.0, previous], [0, 0]
        weights = interpolation_weights(nodes, derivatives, polynomial_moments(step, len(nodes)))
        row = {("sample", 0): alpha_next / alpha}
        for column, weight in zip(columns, weights, strict=True):
            # the source gives dε/dλ, and dε/dγ = −(1/γ) dε/dλ
            row[column] = alpha_next * (-weight / gamma if column[0] == "slope" else weight)
        return {column: float(weight) for column, weight in row.items()}


def _of_prediction(row: Row) -> Row:
    """A row of data predictions, which are what `data_form` calls the predictions."""
    return {("prediction" if what == "data" else what, lag): weight for (what, lag), weight in row.items()}
