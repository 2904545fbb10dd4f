"""Schedulers of models of x = α x_0 + σ z: variance-preserving diffusion and flow matching, whatever they predict."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import (
    AysSchedules,
    KarrasDiffusionSchedulers,
    SchedulerMixin,  # noqa: F401
)

from ..core.parametrisation import PREDICTION_TYPES, Parametrisation
from ..core.table import Levels
from ..core.time_grids import (
    NOISE_LEVEL_GRIDS,
    SIGMA_GRIDS,
    TIME_GRIDS,
    TIMESTEP_SPACINGS,
    calls_of,
    distinct_integers,
    parse_grid,
    resampled_grid,
    spaced_timesteps,
    time_grid,
)
from ..processes import LinearDiffusion, RectifiedFlow, VariancePreserving
from ..processes.rectified_flow import NOISIEST_ALPHA
from .scheduling_utils import TableScheduler

#: configuration keys of diffusers' schedulers whose models follow no noise schedule of variances β
OTHER_DIFFUSIONS = ("sigma_max", "sigma_data", "snr", "beta_max", "scaler", "shift", "trained_betas")

#: diffusers' flags for grids in noise level, and our names of them; Lu's are even in log σ too, as diffusers has them
SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",
    "use_beta_sigmas": "beta",
}

#: keys of diffusers' schedulers of flows that no scheduler here follows, and why
REFUSED_OF_FLOWS = {
    "invert_sigmas": "models that are called with 1 − σ are not sampled.",
    "stochastic_sampling": "fresh noise is what a stochastic solver adds, not a key of every solver.",
}

#: the grids of Align Your Steps (Sabour et al., 2024, https://huggingface.co/papers/2404.14507), and what diffusers
#: calls the noise levels of ten calls; those of Stable Video Diffusion are for another kind of path
AYS_GRIDS = {"ays": "StableDiffusionSigmas", "ays_sdxl": "StableDiffusionXLSigmas"}


class GaussianDiffusionScheduler(TableScheduler):
    """
    Base of the schedulers of models of x = α x_0 + σ z, with the configuration keys of diffusers' own.

    The *path*, how α and σ depend on the timestep, is that of a variance-preserving model, or of flow matching,
    α = 1 − σ and σ = t/`num_train_timesteps`. What is *predicted* is a choice of its own, `prediction_type`. Rows
    weigh x, ε and x_0, so every solver serves every combination.

    Args:
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02):
            First and last variance of the noise schedule.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*):
            The variances themselves, instead of the three above.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale to zero terminal signal-to-noise ratio.
        snr_shift_scale (`float`, defaults to 1.0):
            By which all signal-to-noise ratios α²/σ² of the schedule are divided before that, as in CogVideoX.
        continuous (`bool`, defaults to `False`):
            Use the analytic process β(τ) = N·(beta_start + (beta_end − beta_start)·τ), τ ∈ [10⁻³, 1], N =
            `num_train_timesteps`, for models trained in continuous time; the model is called with (N − 1)·τ.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the model predicts: `"epsilon"`, `"sample"`, `"v_prediction"`, or `"flow_prediction"`, the velocity
            z − x_0 of a flow-matching model.
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
            diffusers' grids in noise level, γ = σ/α, or the shifted σ of flow matching; they take precedence over
            `timestep_spacing`.
        use_flow_sigmas (`bool`, *optional*):
            Whether the path is that of flow matching ([`RectifiedFlow`]), where of the noise schedule only
            `num_train_timesteps` counts. By default it is if the model predicts flows.
        flow_shift (`float`, defaults to 1.0):
            How much timesteps are shifted towards noise on that path, the `shift` of
            [`FlowMatchEulerDiscreteScheduler`]; not with grids in noise level.
        shift_terminal (`float`, *optional*):
            σ of the last model call on that path, to which the shifted timesteps are stretched, as those of LTX-Video
            and Qwen-Image are: 1 − σ is scaled. Custom `timesteps` are left as they are.
        analytical_first_step (`bool`, defaults to `False`):
            Take a first step with ε(x_T) := x_T, which needs no model call. It happens inside `init_noise_sigma`,
            before the first of the `num_inference_steps`; pipelines that ignore `init_noise_sigma`
            (`DDPMPipeline`, `DDIMPipeline`) leave out its rescaling, which is within 1% of one for usual schedules.

    `time_grid` may also be one of diffusers' spacings, or `"ays"` or `"ays_sdxl"`, the noise levels that Align Your
    Steps has for Stable Diffusion 1.5 and XL, as diffusers has them, log-linearly resampled to other numbers of calls
    than ten; `None` is what the inherited keys say. All other arguments are those of [`TableScheduler`].
    """

    _compatibles = [*(scheduler.name for scheduler in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]
    process_class = VariancePreserving
    choices = {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
        "time_grid": (None, *TIME_GRIDS, *AYS_GRIDS, *TIMESTEP_SPACINGS),
    }

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
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
        use_flow_sigmas: bool | None = None,
        flow_shift: float = 1.0,
        shift_terminal: float | None = None,
        time_grid: str | None = None,
        analytical_first_step: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        flow_matching = "shift" in config_dict and "beta_schedule" not in config_dict
        own_keys = cls._get_init_keys(cls)
        if (flow_matching or "use_flow_sigmas" in config_dict) and {"shift", "flow_shift"} & set(kwargs):
            # One number under the names of both libraries, so that the way back finds it too.
            kwargs["flow_shift"] = kwargs.pop("shift", kwargs.get("flow_shift"))
            if "shift" in config_dict:
                config_dict = {**config_dict, "shift": kwargs["flow_shift"]}
        # keys that this class only keeps or reads, such as `use_dynamic_shifting`
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if key in config_dict and key not in own_keys}
        config_dict = {**config_dict, **overrides}
        if flow_matching:
            for key, reason in REFUSED_OF_FLOWS.items():
                if config_dict.get(key):
                    raise ValueError(f"`{key}` must be left out, got {config_dict[key]}: {reason}")
            flow = {"use_flow_sigmas": True, "flow_shift": config_dict["shift"]}
            own = {"prediction_type": "flow_prediction", **flow}
            config_dict = {"beta_schedule": "linear", **own, **config_dict}
        _check_diffusion(config_dict)
        # diffusers drops what was a default in the other class; what describes the model is not the solver's to choose
        defaults = set(config_dict.get("_use_default_values", ())) - {*VariancePreserving.CONFIG_KEYS, *overrides}
        config_dict = {**config_dict, "_use_default_values": sorted(defaults)}
        return super().extract_init_dict(config_dict, **kwargs)

    def _check_config(self):
        super()._check_config()
        if self._flows and not self.config["flow_shift"] > 0:
            raise ValueError(f"`flow_shift` must be positive, got {self.config['flow_shift']}.")
        if self._flows and self.config["shift_terminal"] and not 0 < self.config["shift_terminal"] < 1:
            raise ValueError(f"`shift_terminal` must be between 0 and 1, got {self.config['shift_terminal']}.")

    # --- the path and the prediction -------------------------------------------------------------------------------

    @property
    def _flows(self) -> bool:
        flows = self.config.get("use_flow_sigmas")
        return self.config["prediction_type"] == "flow_prediction" if flows is None else bool(flows)

    def _process_class(self) -> type[LinearDiffusion]:
        return RectifiedFlow if self._flows else self.process_class

    def _noise_levels(self) -> np.ndarray:
        if not self._flows:
            return super()._noise_levels()
        # The path keeps α = 2⁻¹² at pure noise, so that λ is finite; in diffusers σ is 1 there.
        return np.where(self.levels.alphas > NOISIEST_ALPHA, self.levels.sigmas, 1.0)

    def _conversion(self) -> Parametrisation:
        return Parametrisation(self.config["prediction_type"])

    # --- where the model is called ---------------------------------------------------------------------------------

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
                each is moved to the nearest timestep. On the path of flow matching they are the σ, from 1 down, before
                they are shifted, as pipelines of such models pass them. A 0 at their end, as in diffusers' lists, is
                no call.
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
        self._shift = self.config["flow_shift"]
        if dynamic and mu is not None:
            self._shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        if sigmas is not None and self.is_default_ramp(sigmas) and self._chooses(len(sigmas)):
            num_inference_steps, sigmas = len(sigmas), None
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)
        if self._learned is not None and self._learned.learned_for is not None:
            self._compare(self._learned.learned_for, mu)

    def _compare(self, learned_for: Mapping, mu: float | None):
        """Say once where a run differs from what its table was learned for; it is followed all the same."""
        count = len(self.timesteps)
        if "mu" in learned_for and mu is not None and abs(learned_for["mu"] - mu) > 1e-3:
            self._say(
                f"`tables` of {count} model calls were learned at `mu={learned_for['mu']:g}`, and this run has "
                f"`mu={mu:g}`: they are followed at the noise levels that they were learned at. Calibrate at this "
                "resolution too, if it is one that you use."
            )
        for key in ("clip_sample", "thresholding"):
            if learned_for.get(key) is False and self.config[key]:
                self._say(
                    f"`tables` of {count} model calls were learned with `{key}=False` and are less accurate with "
                    f"`{key}=True`: pass `{key}=False` to `from_config`."
                )

    def is_default_ramp(self, sigmas: Sequence[float]) -> bool:
        """
        Whether `sigmas` are those that pipelines of flow-matching models pass for "n calls".

        They are `linspace(1, 1/n, n)`, or those of whole timesteps from `num_train_timesteps` to 1 that BRIA passes.
        """
        points = torch.as_tensor(sigmas, device="cpu", dtype=torch.float64).numpy()
        if not self._flows or points.ndim != 1 or len(points) == 0:
            return False
        count, total = len(points), self.process.num_train_timesteps
        whole = (total - np.floor(np.linspace(0, total - 1, count))) / total
        # some of them pass through float32
        return any(np.abs(points - ramp).max() < 1e-6 for ramp in (np.linspace(1.0, 1.0 / count, count), whole))

    def _chooses(self, num_inference_steps: int) -> bool:
        """Whether the configuration has a say in where so many calls are made."""
        asks = self.config["time_grid"] is not None or any(self.config[flag] for flag in SIGMA_FLAGS)
        return asks or self.learned_table(num_inference_steps) is not None

    def _visited(self, num_inference_steps, timesteps, sigmas) -> Levels:
        levels = super()._visited(num_inference_steps, timesteps, sigmas)
        if not self.config["analytical_first_step"]:
            return levels
        # GENIE's analytical first step: x̄₁ = x̄₀ + (γ₁ − γ₀)·x_T, with ε(x_T) := x_T and x̄₀ = x_T/α₀.
        (alpha_0, alpha_1), (gamma_0, gamma_1) = levels.alphas[:2], levels.gammas[:2]
        self.init_noise_sigma = float(alpha_1 * (1 / alpha_0 + gamma_1 - gamma_0))
        return Levels(levels.timesteps[1:], levels.alphas[1:], levels.sigmas[1:], levels.path)

    def _grid(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of the analytical first step, of the model calls and, if it is noisy, of the end."""
        process, config = self.process, self.config
        free = int(config["analytical_first_step"])
        limit = "`num_train_timesteps`" + (" less the analytical first step" if free else "")
        self._check_count(num_inference_steps, process.num_train_timesteps - free, limit)
        visited, end_is_noisy = num_inference_steps + free, config["final_sigmas_type"] == "sigma_min"
        name = config["time_grid"] or next(
            (name for flag, name in SIGMA_FLAGS.items() if config[flag]), config["timestep_spacing"]
        )
        kind = parse_grid(name, self._choices("time_grid"))[0]
        if name in TIMESTEP_SPACINGS:
            points = spaced_timesteps(process, name, visited, config["steps_offset"])
        else:
            # the flags of diffusers are grids of its own, whatever ours end with
            calls_smallest = config["time_grid"] is None or self._calls_the_smallest(name)
            points = self._between_ends(name, visited, end_is_noisy or not calls_smallest)
        if self._flows and kind not in NOISE_LEVEL_GRIDS:
            points = self._stretched(process.shifted(points, self._shift))
        points = np.append(points, process.timestep_min) if end_is_noisy else points
        if process.is_discrete:
            points = distinct_integers(points, process.num_train_timesteps - 1).astype(np.float64)
        # A noisy end after all timesteps there are is no step.
        return np.clip(points, process.timestep_min, process.timestep_max)

    def _between_ends(self, name: str, visited: int, ends_before: bool) -> np.ndarray:
        """`visited` points of a grid between both ends, without its last one if it `ends_before`."""
        process, kind, last = self.process, parse_grid(name, self._choices("time_grid"))[0], None
        if kind in AYS_GRIDS:
            levels = AysSchedules[AYS_GRIDS[kind]][:-1]
            largest = float(process.gamma(process.timestep_max))
            if not math.isclose(levels[0], largest, rel_tol=1e-2):
                raise ValueError(
                    f"`time_grid={name!r}` is a list of noise levels σ/α of Stable Diffusion, from {levels[0]:g} on, "
                    f"and this model has others, from {largest:g} on: choose another grid."
                )
            return resampled_grid(process, levels, visited + int(ends_before))[:visited]
        if self._flows and kind in (*SIGMA_GRIDS, "sgm_uniform"):
            # Where they come from they end at the smallest timestep once it is shifted; diffusers shifts it in its
            # constructor, unless that is dynamic, and once more.
            twice = kind in SIGMA_FLAGS.values() and not self.config.get("use_dynamic_shifting", False)
            last = process.shifted(process.timestep_min, self._shift**2 if twice else self._shift)
        if self._terminal is not None and kind in NOISE_LEVEL_GRIDS:
            ends_before, last = False, self._terminal
        return time_grid(process, name, visited + int(ends_before), last)[:visited]

    @property
    def _terminal(self) -> float | None:
        """The timestep of the last model call, if the configuration says it."""
        terminal = self.config.get("shift_terminal")
        return terminal * self.process.timestep_max if self._flows and terminal else None

    def _stretched(self, points: np.ndarray) -> np.ndarray:
        """Shifted timesteps with the last one at `shift_terminal`, and pure noise where it is."""
        remaining = self.process.timestep_max - points
        if self._terminal is None or remaining[-1] == 0:  # a single call is one of pure noise
            return points
        return self.process.timestep_max - remaining * ((self.process.timestep_max - self._terminal) / remaining[-1])

    def _custom_points(self, timesteps, sigmas) -> np.ndarray:
        if self._flows and sigmas is not None:
            points = calls_of(np.asarray(sigmas, dtype=np.float64))
            if points.ndim != 1 or not (np.all(points > 0) and np.all(points <= 1) and np.all(np.diff(points) < 0)):
                raise ValueError(f"`sigmas` must strictly decrease and lie between 0 and 1, got {sigmas}.")
            points = self.process.shifted(points * self.process.timestep_max, self._shift)
            timesteps, sigmas = self._stretched(points).tolist(), None
        points = super()._custom_points(timesteps, sigmas)
        if self.config["analytical_first_step"]:
            points = np.concatenate([[self.process.timestep_max], points])
            if points[1] >= points[0]:
                raise ValueError(
                    f"With `analytical_first_step=True` the first of the custom timesteps must be below "
                    f"{points[0]:g}, where the analytical step starts; got {points[1]:g}."
                )
        return points

    # --- the forward process ---------------------------------------------------------------------------------------

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise`, as image-to-image pipelines of flow-matching models call it."""
        return self.add_noise(sample, noise, timestep)

    def set_shift(self, shift: float):
        """
        The static shift of flow matching from the next `set_timesteps` on, as in diffusers' flow schedulers.

        Args:
            shift (`float`): s of σ → s σ/(1 + (s − 1) σ) (Esser et al., 2024, Eq. 23); positive.

        Raises:
            ValueError: If it is not positive, or the model does not match flows.
        """
        if not self._flows:
            raise ValueError("`set_shift` is for flow-matching models; this one preserves variance.")
        self.register_to_config(flow_shift=shift, **({"shift": shift} if "shift" in self.config else {}))
        self._check_config()

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The velocity that a model of this configuration is trained on, for timesteps of shape `(batch,)`.

        It is v = α_t z − σ_t x_0 (Salimans & Ho, 2022), or z − x_0 with `prediction_type="flow_prediction"`, where
        `sample` is x_0.
        """
        if self.config["prediction_type"] == "flow_prediction":
            return noise - sample
        alpha, sigma = self.process.coefficients(timesteps, sample)
        return alpha * noise - sigma * sample

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ at the integer timesteps, float32, as diffusers' training scripts and some pipelines read it."""
        process = self.process
        if not process.is_discrete:
            raise AttributeError("a process without integer timesteps has no `alphas_cumprod`")
        return torch.from_numpy(process.alpha(np.arange(process.num_train_timesteps)) ** 2).float()


def _check_diffusion(config: Mapping):
    """Raise a `ValueError` if neither a model of variances β nor a flow is what the configuration describes."""
    has_betas = any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "trained_betas"))
    found = [key for key in OTHER_DIFFUSIONS if key in config]
    if not has_betas and found:
        raise ValueError(
            "`config` must describe a variance-preserving model with a noise schedule of betas, which is not here ("
            + ", ".join(f"`{key}={config[key]!r}`" for key in found)
            + "), or a flow-matching model: EDM, variance-exploding and consistency models need their own schedulers."
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            "`config` must describe a model that is called with the timesteps of its noise schedule, got "
            "`timestep_type='continuous'`."
        )
