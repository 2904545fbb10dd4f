"""What all schedulers share: from a configuration to a table, and the contract with diffusers' pipelines.

A sampler here is a [`Table`]: row i holds the weights of the tensors whose sum is the next sample. A scheduler only
says what the rows are. Tables are run by `genie_diffusers.core.engine`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# A pipeline finds a saved component by the names in the module that defines it, so `SchedulerMixin` is imported here
# and in every module with a scheduler.
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..core.engine import SOURCED, Plan
from ..core.table import Levels, Row, Table, build, encodes, entries
from ..core.time_grids import SIGMA_GRIDS, TIME_GRIDS, custom_timesteps, parse_grid, time_grid
from ..processes import LinearDiffusion
from .attachment import TakesSource
from .configuration import SharedConfiguration
from .saving import SavesSource

logger = logging.get_logger(__name__)


class TableScheduler(SharedConfiguration, TakesSource, SavesSource, SchedulerMixin, ConfigMixin):
    """
    Base of the schedulers of any [`LinearDiffusion`], the `process_class`.

    A subclass defines [`~TableScheduler.row`], for a corrector [`~TableScheduler.correction`], and declares its own
    configuration keys in `__init__` and what they may be in `choices`. Derive from [`GaussianDiffusionScheduler`] for
    models of x = α x_0 + σ z, which is nearly all of them.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps the model was trained with.
        time_grid (`str`, defaults to `"quadratic"`):
            Where the model is called: `"quadratic"`, `"linear"`, `"uniform_lambda"`, `"power_lambda"`, `"karras"`,
            `"exponential"`, `"beta"`, `"beta57"`, `"kl_optimal"`, `"sgm_uniform"`, `"simple"`, `"linear_quadratic"`,
            `"bong_tangent"`, `"beta(α,β)"` or `"beta_timesteps(α,β)"`, see [`~core.time_grids.time_grid`].
        final_sigmas_type (`str`, defaults to `"zero"`):
            Where sampling ends, as in diffusers' multistep solvers: `"zero"`, clean data, or `"sigma_min"`, the
            smallest noise level of the process.
        denoising_step (`bool`, *optional*):
            With `final_sigmas_type="zero"` and a `time_grid` between both ends, spend the last model call at the
            smallest timestep (the final denoising step of GENIE and gDDIM). Otherwise the grid has one point more, and
            the last step jumps from the last but one straight to clean data: a shorter step everywhere else. By
            default, and in `from_config` where a `time_grid` is given, it is as where that grid comes from: only
            `"karras"`, `"exponential"`, `"beta"` and `"kl_optimal"` have that call.
        tables (`dict`, *optional*):
            Learned samplers, by the number of model calls as a string, each as [`Table.to_dict`] writes it. A run of
            such a number of calls follows its table, timesteps included; every other one is solved.

    Attributes:
        timesteps (`torch.Tensor` of shape `(num_inference_steps,)`):
            What the model is called with: `int64`, or `float32` where the process is continuous or they are real.
        sigmas (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            Noise levels γ = σ/α at the timesteps and at the end, float64, on the CPU.
        table ([`Table`]):
            The sampler: the float64 weights of every step.
        levels ([`Levels`]):
            α, σ and λ at the points that are visited.
        init_noise_sigma (`float`):
            What pipelines multiply their initial standard normal noise with.
    """

    _compatibles: list[str] = []
    order = 1
    config_name = "scheduler_config.json"

    #: the diffusion that is sampled
    process_class: type[LinearDiffusion]
    #: configuration keys and the values that they may have
    choices: Mapping[str, Sequence[Any]] = {"final_sigmas_type": ("zero", "sigma_min"), "time_grid": TIME_GRIDS}
    #: whether it goes from data to noise
    encodes = False
    #: whether `tables` of another scheduler's configuration, and of what is attached, are followed by this one
    inherits_tables = False

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        time_grid: str | None = "quadratic",
        final_sigmas_type: str = "zero",
        denoising_step: bool | None = None,
        tables: dict[str, dict[str, Any]] | None = None,
    ):
        self._process: Any = None
        self._process_key: tuple | None = None
        self._said: set[str] = set()
        self.num_inference_steps: Any = None
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self.sigmas = torch.empty(0, dtype=torch.float64)
        self.init_noise_sigma = 1.0
        self.table = Table((), (), (), ())
        self.levels = Levels(np.empty(0), np.empty(0), np.empty(0))
        self._learned: Any = None
        self._plan: Any = None
        self._seen: tuple = ()
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._check_config()

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        config_dict = dict(config_dict)
        # Each of our classes has methods of its own: those of another one stay behind.
        other = config_dict.get("_class_name", cls.__name__) != cls.__name__
        if other and config_dict.get("method") not in cls._choices("method"):
            config_dict.pop("method", None)
        # Who asks for a grid asks for its end too.
        if "time_grid" in kwargs:
            config_dict.pop("denoising_step", None)
        # Who asks for another solver asks for its rows.
        if config_dict.get("tables"):
            own = {
                steps: entry
                for steps, entry in entries(config_dict["tables"]).items()
                if cls._inherits_tables_of(config_dict) and encodes(entry) == cls.encodes
            }
            config_dict["tables"] = own or None
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _get_compatibles(cls):
        # Keys of our other classes are kept without a warning too.
        return [*super()._get_compatibles(), *_subclasses(TableScheduler)]

    @classmethod
    def _inherits_tables_of(cls, config: Mapping) -> bool:
        return cls.inherits_tables or config.get("_class_name") == cls.__name__

    @classmethod
    def _choices(cls, key: str) -> Sequence[Any]:
        return next((vars(base)["choices"][key] for base in cls.__mro__ if key in vars(base).get("choices", ())), ())

    # --- what a solver defines -------------------------------------------------------------------------------------

    def row(self, levels: Levels, index: int, known: int) -> Row:
        """
        The weights of step `index`, with the predictions of `known` steps at hand, the current one included.

        Keys are (term, how many steps ago). Terms are `"sample"`, the predictions `"prediction"` ε and `"data"` x_0,
        `"slope"`, dε/dλ, and `"residual"` of an attached source, and `"noise"`, whose weight is the standard deviation
        of the fresh noise that the step adds, or a square root of its covariance. `levels` holds `alphas`, `sigmas`,
        `gammas` and `lambdas` at the visited points and the end.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `row`.")

    def correction(self, levels: Levels, index: int, known: int, predictor: Row) -> Row:
        """
        The weights of what is added to the sample of step `index` once the model was called on it, empty for none.

        `predictor` is the row of the step that led there, empty where the run starts. A corrector is an increment to
        the sample it is given, so that edits made between steps survive it.
        """
        return {}

    # --- from the configuration to a table -------------------------------------------------------------------------

    @property
    def process(self) -> Any:
        """The [`LinearDiffusion`] that the configuration describes, as it is now (pipelines may rewrite it)."""
        process_class = self._process_class()
        values = [self.config.get(key) for key in process_class.CONFIG_KEYS]
        key = process_class, *(tuple(v) if isinstance(v, (list, np.ndarray)) else v for v in values)
        if self._process is None or key != self._process_key:
            self._process, self._process_key = process_class.from_config(self.config), key
        return self._process

    def _process_class(self) -> type[LinearDiffusion]:
        if getattr(type(self), "process_class", None) is None:
            raise NotImplementedError(f"`{type(self).__name__}` must define `process_class`.")
        return self.process_class

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
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
                each is moved to the nearest timestep. A 0 at their end, as in diffusers' lists, is no call.

        Raises:
            ValueError: If not exactly one of the three is given, or if it is out of range.
        """
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("`set_timesteps` needs exactly one of `num_inference_steps`, `timesteps` and `sigmas`.")
        self._check_config()
        self._learned = None if num_inference_steps is None else self.learned_table(num_inference_steps)
        self.init_noise_sigma = 1.0
        self.levels = self._levels_for(num_inference_steps, timesteps, sigmas)
        points = self.levels.timesteps
        self.sigmas = torch.from_numpy(self.levels.gammas.copy())
        self._host_timesteps = points.tolist()
        dtype = torch.int64 if self.process.is_discrete and not np.any(points % 1) else torch.float32
        self.timesteps = torch.tensor(self._host_timesteps, dtype=dtype, device=device)
        self.num_inference_steps = len(points)
        self._begin_index = self._step_index = None
        self._build(begin=0)
        self._tell("begin")
        self._tell("forget")

    def learned_table(self, num_inference_steps: int) -> Table | None:
        """The table of this number of model calls: that of the configuration's `tables`, or of the attached source."""
        term = self._term
        of_source = getattr(self._slope_source, "tables", None) if self.inherits_tables else None
        found = [entries(tables).get(str(num_inference_steps)) for tables in (self.config.get("tables"), of_source)]
        if None not in found:
            self._say(
                f"`tables` of the configuration and those of the attached head both have {num_inference_steps} model "
                "calls: those of the configuration are followed. `from_config(config, tables=None)` leaves it to the "
                "head."
            )
        for entry in found:
            if entry is None:
                continue
            table = Table.from_dict(entry, self.process, num_inference_steps)
            missing = table.needs() & set(SOURCED) - {term}
            if not missing:
                return table
            self._say(
                f"`tables` of {num_inference_steps} model calls weigh a {' and a '.join(sorted(missing))}, which "
                f"nothing that is attached provides: they are not followed. `attach` the head they were learned with."
            )
        return None

    def _levels_for(self, num_inference_steps, timesteps, sigmas) -> Levels:
        """The points of a run: those of the learned table, or of the configuration."""
        if self._learned is None:
            return self._visited(num_inference_steps, timesteps, sigmas)
        learned = self._learned
        return Levels(
            np.asarray(learned.timesteps), np.asarray(learned.alphas), np.asarray(learned.sigmas), self.process
        )

    def _visited(self, num_inference_steps, timesteps, sigmas) -> Levels:
        """The points of a run that no table describes."""
        process, end_is_noisy = self.process, self.config["final_sigmas_type"] == "sigma_min"
        if num_inference_steps is not None:
            points = self._grid(num_inference_steps)
        else:
            points = self._custom_points(timesteps, sigmas)
            points = np.append(points, process.timestep_min) if end_is_noisy else points
        alphas, stds = process.alpha(points), process.sigma(points)
        if end_is_noisy:
            points = points[:-1]
        else:
            alphas, stds = np.append(alphas, 1.0), np.append(stds, 0.0)
        return Levels(points, alphas, stds, process)

    def _check_config(self):
        """Raise a `ValueError` for options that do not exist, as they are now: pipelines rewrite them."""
        for key in {key for base in type(self).__mro__ for key in vars(base).get("choices", ())}:
            allowed = self._choices(key)
            if key == "time_grid":
                parse_grid(self.config[key], allowed)
            elif self.config.get(key, allowed[0]) not in allowed:
                raise ValueError(f"`{key}` must be one of {_listed(allowed)}, got {self.config[key]!r}.")

    def _grid(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of the model calls and, if it is noisy, of the end."""
        process, end_is_noisy = self.process, self.config["final_sigmas_type"] == "sigma_min"
        self._check_count(num_inference_steps, process.num_train_timesteps, "`num_train_timesteps`")
        name = self.config["time_grid"]
        ends_before = end_is_noisy or not self._calls_the_smallest(name)
        points = time_grid(process, name, num_inference_steps + int(ends_before))
        points = points[:num_inference_steps]
        return np.append(points, process.timestep_min) if end_is_noisy else points

    def _calls_the_smallest(self, name: str) -> bool:
        """Whether a grid between both ends spends the last model call at the smallest timestep."""
        asked = self.config["denoising_step"]
        return parse_grid(name, self._choices("time_grid"))[0] in SIGMA_GRIDS if asked is None else asked

    def _check_count(self, count: int, largest: int, limit: str):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ValueError(f"`num_inference_steps` must be an integer, got {count!r}.")
        if not 1 <= count <= largest:
            raise ValueError(f"`num_inference_steps` must be between 1 and {largest} ({limit}), got {count}.")

    def _custom_points(self, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> np.ndarray:
        return custom_timesteps(self.process, timesteps, sigmas)

    def _build(self, begin: int):
        """Make the table ready for a run that starts at step `begin`, and forget what was seen."""
        self._bind(self._slope_source)
        follows = self._follows(begin)
        self._built_for, self._seen = begin, ()
        if follows and self._learned is not None:
            self.table = self._learned
        else:
            self.table = build(self.levels, self.row, self.correction, begin, self._model_levels())
        clips = bool(self.config.get("clip_sample") or self.config.get("thresholding"))
        if clips and getattr(self._slope_source, "learned_unclipped", False):
            self._say(
                "This scheduler has `clip_sample=True` or `thresholding=True`, but the attached head was learned "
                "without clipping, and is less accurate with it: `from_config(config, clip_sample=False, "
                "thresholding=False)` is what it was learned for."
            )
        combine = None if self.process.weight_shape == (1, 1) else self.process.combine
        self._plan = Plan(self.table, self._conversion(), clips, combine)

    def _follows(self, begin: int) -> bool:
        """Whether a run from `begin` follows the learned table: where no row weighs what lies before its start."""
        learned = self._learned
        if learned is None or learned.needs() & set(SOURCED) - {self._term}:
            return False
        return begin == 0 or learned.reaches_before(begin) is None

    def _model_levels(self) -> tuple | None:
        """α and σ that the model is told, where they are not those of the visited points."""
        return None

    def _conversion(self) -> Any:
        """What the model predicts, see [`Plan`]."""
        raise NotImplementedError

    # --- α, σ and λ at the visited points and the end

    @property
    def alphas(self) -> np.ndarray:
        """α at the visited points and the end."""
        return self.levels.alphas

    @property
    def noise_stds(self) -> np.ndarray:
        """σ at the visited points and the end."""
        return self.levels.sigmas

    @property
    def lambdas(self) -> np.ndarray:
        """λ = log(α/σ) at the visited points and the end."""
        return self.levels.lambdas

    # --- stepping --------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> SchedulerOutput | tuple:
        """
        Take one step along the reverse diffusion.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`):
                What the model returned for `sample`, in the configured `prediction_type`.
            timestep (`float` or `torch.Tensor`):
                The current timestep. A number or CPU tensor is checked against the run's timesteps; on an
                accelerator only the first one of a run is read, and only if no begin index was set.
            sample (`torch.Tensor` of the same shape):
                The current sample x_t. Edits made between steps are kept.
            generator (`torch.Generator` or list of them, *optional*):
                What fresh noise is drawn from, one for the batch or one for each sample; deterministic samplers draw
                nothing.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~schedulers.scheduling_utils.SchedulerOutput`] or a tuple.
            kwargs:
                Only what DDIM pipelines pass: `eta=0` and `use_clipped_model_output=None` or `False`.

        Raises:
            ValueError:
                If the timesteps are not set, all steps are taken, `timestep` is not the one whose turn it is, the
                shapes differ, or there are not as many generators as samples.
        """
        compiling = torch.compiler.is_compiling()
        weights, tensors = self._visit(model_output, timestep, sample, generator, kwargs, compiling)
        prev_sample = self._plan.sum(weights, tensors, sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    @torch.compiler.disable
    def _visit(self, model_output, timestep, sample, generator, options: dict, compiling: bool):
        """
        All of a step but its sum.

        Bookkeeping is Python, so under `torch.compile` it stays outside of the graph, which is handed the same number
        of tensors in every step and compiled once.
        """
        if options:
            self._refuse_options(options)
        index = self._locate(timestep)
        model_output = self._without_variance(model_output, sample)
        plan, noise, source, clip = self._plan, None, None, None
        if not any(index in asked for asked in plan.sourced.values()):
            self._tell("forget")
        elif self._attachment is None:
            raise ValueError("This scheduler lost its slope source when it was pickled: `attach` it again.")
        if index in plan.noisy:
            noise = self._draw(sample, generator)
        if self._slope_source is not None:
            host_timestep = self._host_timesteps[index]
            source = lambda *asked: self._ask(host_timestep, *asked)  # noqa: E731
        if plan.clips:
            clip = self._clip
        weights, tensors, seen = plan.visit(index, self._seen, sample, model_output, noise, source, clip, compiling)
        self._step_index = index + 1
        self._seen = seen if self._step_index < self.num_inference_steps else ()
        return weights, tensors

    def _draw(self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Standard normal noise, the same for every split of the batch if each sample has a generator of its own."""
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(
                f"`generator` must be one generator or one for each of {len(sample)} samples, got {len(generator)}."
            )
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def _clip(self, data: torch.Tensor) -> torch.Tensor:
        """Clip x_0 to ±`clip_sample_range`, or threshold it dynamically (Saharia et al., 2022, Section 2.3)."""
        if not self.config["thresholding"]:
            return data.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        magnitude = data.abs().flatten(1).float()
        scale = torch.quantile(magnitude, self.config["dynamic_thresholding_ratio"], dim=1)
        scale = scale.clamp(1.0, max(1.0, self.config["sample_max_value"]))
        scale = scale.to(data.dtype).reshape(-1, *(1,) * (data.ndim - 1))
        return torch.clamp(data, -scale, scale) / scale

    def _without_variance(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self.config.get("variance_type") in ("learned", "learned_range") and sample.ndim > 1:
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape {tuple(sample.shape)} of `sample`, got "
                f"{tuple(model_output.shape)}. A model that also predicts variances needs `variance_type='learned'` "
                "or 'learned_range' in the scheduler's configuration."
            )
        return model_output

    def _refuse_options(self, options: dict):
        """`DDIMPipeline` passes its own options to every scheduler; only their neutral values mean something here."""
        for name, value in options.items():
            if name not in ("eta", "use_clipped_model_output"):
                raise TypeError(f"`{type(self).__name__}.step` has no argument {name!r}.")
            if value:
                raise ValueError(f"`{name}` must be left at its default for `{type(self).__name__}`, got {value}.")

    def _locate(self, timestep: float | torch.Tensor) -> int:
        """The index of this step, checked against the timestep where that needs no synchronisation."""
        if self.num_inference_steps is None:
            raise ValueError("`set_timesteps` must be called before `step`.")
        if self._step_index is None:
            begin = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            if begin != self._built_for:
                self._build(begin)
            self._step_index = begin
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps are taken; call `set_timesteps` before sampling again."
            )
        if not torch.is_tensor(timestep) or timestep.device.type == "cpu":
            expected, given = self._host_timesteps[self._step_index], _as_float(timestep)
            if given != expected and np.float32(given) != np.float32(expected):
                raise ValueError(
                    f"`timestep` must be {expected:g}, whose turn it is (step {self._step_index} of "
                    f"{self.num_inference_steps}), got {given:g}. To start elsewhere, call `set_timesteps` and "
                    "`set_begin_index`."
                )
        return self._step_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        The step at which the model is called with `timestep`.

        Raises:
            ValueError: If no step is.
        """
        if self.num_inference_steps is None:
            raise ValueError("`set_timesteps` must be called before `index_for_timestep`.")
        value = np.float32(_as_float(timestep))
        matches = [i for i, visited in enumerate(self._host_timesteps) if np.float32(visited) == value]
        if not matches:
            visited = ", ".join(f"{visited:g}" for visited in self._host_timesteps)
            raise ValueError(f"`timestep` must be one of the timesteps of this run ({visited}), got {value:g}.")
        return matches[0]

    @property
    def step_index(self) -> int | None:
        """How many steps are taken, `None` before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step of the run, set by pipelines that start mid-way, such as image-to-image."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        """
        Start the run at step `begin_index`.

        Raises:
            ValueError: If there is no such step, or the timesteps are not set.
        """
        if self.num_inference_steps is None:
            raise ValueError("`set_timesteps` must be called before `set_begin_index`.")
        if begin_index != int(begin_index) or not 0 <= begin_index < self.num_inference_steps:
            last = self.num_inference_steps - 1
            message = f"`begin_index` must be an integer between 0 and {last}, got {begin_index}."
            if begin_index == last + 1:  # a refiner, after the last of a few timesteps
                message += (
                    f" The part of the run that the pipeline asks for lies after its last timestep, "
                    f"{float(self.timesteps[-1]):g}. Take more steps, or more of the run (`strength`, "
                    "`denoising_start`)."
                )
            raise ValueError(message)
        self._begin_index, self._step_index = int(begin_index), None
        self._tell("begin")
        if self._begin_index != self._built_for:
            self._build(self._begin_index)
        self._seen = ()

    # --- the forward process ---------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample`: models take it as it is."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A draw from the process at timesteps of shape `(batch,)`: α_t x_0 + σ_t z."""
        return self.process.add_noise(original_samples, noise, timesteps)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _say(self, message: str):
        """Warn of something once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _subclasses(scheduler: type[TableScheduler]) -> list[type[TableScheduler]]:
    found = [scheduler]
    for direct in scheduler.__subclasses__():
        found += _subclasses(direct)
    return found


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _as_float(timestep: float | torch.Tensor) -> float:
    if torch.is_tensor(timestep):
        if timestep.numel() != 1:
            raise ValueError(f"`timestep` must be a single number, got a tensor of shape {tuple(timestep.shape)}.")
        return float(timestep.item())
    return float(timestep)
