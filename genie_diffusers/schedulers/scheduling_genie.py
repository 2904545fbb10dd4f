"""GENIE: higher-order denoising diffusion solvers (Dockhorn, Vahdat & Kreis, 2022, https://huggingface.co/papers/2210.05475)."""

import numpy as np
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from .interpolation import exponential_moments, interpolation_weights, polynomial_moments
from .scheduling_utils import Row, TableScheduler

METHODS = ("hermite", "taylor")

#: Steps in λ from this length on are long: a polynomial through several points no longer follows the prediction.
LONG_STEP = 0.75
#: Near pure noise, below this λ, predictions change least predictably, and steps of this length are straight.
NEARLY_NOISE, VERY_LONG_STEP = -2.5, 1.5


class GenieScheduler(TableScheduler):
    """
    Higher-order solvers of the probability-flow ODE of variance-preserving diffusion models, with or without slopes.

    `method="taylor"` is the second truncated Taylor method of GENIE. In x̄ = x/α and γ = σ/α the ODE is
    dx̄/dγ = ε(x, t), and one step of length h in γ is

        x̄(γ + h) = x̄ + h ε + ½ h² dε/dγ

    where dε/dγ = −(1/γ) dε/dλ comes from a slope source (see [`~TableScheduler.attach`]): a distilled head, or exact
    forward-mode derivatives. Without a source the derivative is the finite difference of the last two predictions,
    which is the two-step Adams–Bashforth method.

    `method="hermite"` interpolates the data prediction D = (x − σ ε)/α as a function of λ through everything known of
    it, values and slopes dD/dλ = −(σ/α) dε/dλ at this point and earlier ones, and integrates that exactly:

        x_{n+1} = (σ_{n+1}/σ_n) x_n + σ_{n+1} ∫ e^λ D(λ) dλ

    The order of this predictor is the number of conditions, `interpolation_order`. When the model has been called at
    the new point, the step is corrected, at no further call, with the cubic through values and slopes at both its
    ends, or without slopes with the parabola through both ends and the point before. Without a source it is a
    multistep method of the family of DPM-Solver++ and UniPC.

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
            Where sampling ends, as in diffusers' multistep solvers: `"zero"`, clean data (the paper's final denoising
            step), or `"sigma_min"`, the smallest noise level of the process.
        denoising_step (`bool`, defaults to `False`):
            With `final_sigmas_type="zero"` and a `time_grid` between both ends, spend the last model call at the
            smallest timestep (the paper's final denoising step). Otherwise the grid has one point more, and the last
            step jumps from the last but one straight to clean data: a shorter step everywhere else.
        time_grid (`str`, *optional*):
            A grid between both ends of the process: `"quadratic"` (even in √t) and `"linear"` (even in t), the two of
            the paper, `"uniform_lambda"`, `"karras"`, `"beta"`, or one of diffusers' spacings. `None` is what the keys
            above say.
        method (`str`, defaults to `"hermite"`):
            The solver: `"hermite"` or `"taylor"`.
        interpolation_order (`int`, defaults to 3):
            Order of the predictor of `method="hermite"`, 1 to 4; lower while less is known. Steps of 0.75 or more in
            λ are at most of order 2, and where λ < −2.5 those of 1.5 or more of order 1.
        analytical_first_step (`bool`, defaults to `False`):
            Take a first step with ε(x_T) := x_T, which needs no model call. It happens inside `init_noise_sigma`,
            before the first of the `num_inference_steps`; pipelines that ignore `init_noise_sigma`
            (`DDPMPipeline`, `DDIMPipeline`) leave out its rescaling, which is within 1% of one for usual schedules.
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
        denoising_step: bool = False,
        method: str = "hermite",
        interpolation_order: int = 3,
        analytical_first_step: bool = False,
    ):
        super().__init__()

    def _check_config(self):
        super()._check_config()
        if self.config.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.config.method!r}.")
        if self.config.interpolation_order not in (1, 2, 3, 4):
            raise ValueError(f"`interpolation_order` must be 1, 2, 3 or 4, got {self.config.interpolation_order!r}.")

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
    def data_form(self) -> bool:
        return self.config.method == "hermite" and not self._follows_table

    def row(self, index: int, known: int) -> Row:
        if self._follows_table:
            return self._learned_row(index)
        if self.config.method == "taylor":
            return self._taylor_row(index, known)
        if self.noise_stds[index + 1] == 0:  # the step to clean data is D itself
            return {("prediction", 0): 1.0}
        order = min(self.config.interpolation_order, 2 if self._is_long(index) else 4)
        if self.lambdas[index] < NEARLY_NOISE and self.lambdas[index + 1] - self.lambdas[index] >= VERY_LONG_STEP:
            order = 1
        points = range(index, index - known, -1)
        kinds = ("prediction", "slope") if self._has_slopes else ("prediction",)
        conditions = [(what, point) for point in points for what in kinds][:order]
        row = {("sample", 0): float(self.noise_stds[index + 1] / self.noise_stds[index])}
        return row | {(what, index - point): weight for (what, point), weight in self._integral(index, conditions)}

    def correction(self, index: int, known: int) -> Row:
        if known == 1 or self.config.method == "taylor" or self._follows_table:
            return {}
        start = index - 1
        if self._has_slopes:
            conditions = [(what, point) for what in ("prediction", "slope") for point in (start, index)]
        else:
            earlier = [] if known == 2 or self._is_long(start) else [("prediction", index - 2)]
            conditions = [("prediction", index), ("prediction", start), *earlier]
        correction = {(what, index - point): weight for (what, point), weight in self._integral(start, conditions)}
        for (what, lag), weight in self.table[start].items():  # what the predictor has already added
            if what != "sample":
                correction[what, lag + 1] = correction.get((what, lag + 1), 0.0) - weight
        return correction

    def _is_long(self, index: int) -> bool:
        return self.lambdas[index + 1] - self.lambdas[index] >= LONG_STEP

    def _integral(self, start: int, conditions: list[tuple[str, int]]) -> list[tuple[tuple[str, int], float]]:
        """The weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
        nodes = [self.lambdas[point] - self.lambdas[start] for _, point in conditions]
        derivatives = [int(what == "slope") for what, _ in conditions]
        step = self.lambdas[start + 1] - self.lambdas[start]
        moments = exponential_moments(step, len(nodes), rate=1.0)
        if self._is_long(start) and self.lambdas[start] < 0:
            # The kernel's mean, as B₂(h) of UniPC: what is extrapolated to the end of the step counts for less.
            moments = moments[0] / step * polynomial_moments(step, len(nodes))
        weights = interpolation_weights(nodes, derivatives, moments)
        weights *= self.noise_stds[start + 1] * np.exp(self.lambdas[start])
        # the source gives dε/dλ, and dD/dλ = −(σ/α) dε/dλ
        factors = [-np.exp(-self.lambdas[point]) if what == "slope" else 1.0 for what, point in conditions]
        return [(condition, float(w * f)) for condition, w, f in zip(conditions, weights, factors, strict=True)]

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
        if gamma_next > 0:  # the step to clean data is x_0 itself
            if self._has_slopes:
                columns, nodes, derivatives = [*columns, ("slope", 0)], [0.0, 0.0], [0, 1]
            elif known > 1:
                previous = self.noise_stds[index - 1] / self.alphas[index - 1] - gamma
                columns, nodes, derivatives = [*columns, ("prediction", 1)], [0.0, previous], [0, 0]
        weights = interpolation_weights(nodes, derivatives, polynomial_moments(step, len(nodes)))
        row = {("sample", 0): alpha_next / alpha}
        for column, weight in zip(columns, weights, strict=True):
            # the source gives dε/dλ, and dε/dγ = −(1/γ) dε/dλ
            row[column] = alpha_next * (-weight / gamma if column[0] == "slope" else weight)
        return {column: float(weight) for column, weight in row.items()}
