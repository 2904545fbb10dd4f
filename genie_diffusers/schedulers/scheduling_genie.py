"""GENIE: higher-order denoising diffusion solvers (Dockhorn, Vahdat & Kreis, 2022, https://huggingface.co/papers/2210.05475)."""

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from .interpolation import interpolation_weights, polynomial_moments
from .scheduling_utils import Row, TableScheduler

METHODS = ("taylor",)


class GenieScheduler(TableScheduler):
    """
    The second truncated Taylor method of GENIE for variance-preserving diffusion models.

    In x̄ = x/α and γ = σ/α the probability-flow ODE is dx̄/dγ = ε(x, t). One step of length h in γ is

        x̄(γ + h) = x̄ + h ε + ½ h² dε/dγ

    where dε/dγ = −(1/γ) dε/dλ comes from a slope source (see [`~TableScheduler.attach`]): a distilled head, or exact
    forward-mode derivatives. Without a source the derivative is the finite difference of the last two predictions,
    which is the two-step Adams–Bashforth method, so the scheduler is a drop-in for any pipeline. The first step
    without a derivative, and the last one to clean data, are DDIM steps.

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
        time_grid (`str`, *optional*):
            A grid between both ends of the process: `"quadratic"` (even in √t) and `"linear"` (even in t), the two of
            the paper, `"uniform_lambda"`, `"karras"`, `"beta"`, or one of diffusers' spacings. `None` is what the keys
            above say.
        method (`str`, defaults to `"taylor"`):
            The solver.
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
        method: str = "taylor",
        analytical_first_step: bool = False,
    ):
        super().__init__()

    def _check_config(self):
        super()._check_config()
        if self.config.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.config.method!r}.")

    def row(self, index: int, known: int) -> Row:
        alpha, alpha_next = self.alphas[index : index + 2]
        gamma, gamma_next = self.noise_stds[index : index + 2] / self.alphas[index : index + 2]
        step = gamma_next - gamma
        columns, nodes, derivatives = [("prediction", 0)], [0.0], [0]
        if gamma_next > 0:  # the step to clean data is x_0 itself
            if self._slope_source is not None:
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
