"""The engine that every scheduler of this package shares.

A sampler here is a table: row i holds the weights of the tensors whose sum is the next sample. A scheduler only says
what the rows are; noise schedule, time grid, conversion of the model output, history, bookkeeping and the contract
with diffusers' pipelines live here.
"""

import inspect
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

# A pipeline finds a saved component by the names in the module that defines it, so `SchedulerMixin` is imported here
# and in every module with a scheduler.
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..processes import LinearDiffusion, VariancePreserving
from .time_grids import NOISE_LEVEL_GRIDS, TIMESTEP_SPACINGS, distinct_integers, spaced_timesteps, time_grid

logger = logging.get_logger(__name__)

#: (what, how many steps ago): ("sample", 0), ("sample", 1), ("prediction", 0), ("slope", 0), ("noise", 0), …
Column = tuple[str, int]
#: one number, or an array of the process's `weight_shape`, whose last two axes are a matrix
Weight = Any
#: the weights of one update, all numbers or all arrays; what is not named has weight zero
Row = dict[Column, Weight]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

#: configuration keys of diffusers' schedulers whose models follow no noise schedule of variances β
OTHER_DIFFUSIONS = ("sigma_max", "sigma_data", "snr", "beta_max", "scaler", "shift", "trained_betas")

#: diffusers' flags for grids in noise level, and our names of them
SIGMA_GRIDS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "uniform_lambda",
    "use_lu_lambdas": "uniform_lambda",
    "use_beta_sigmas": "beta",
}


class Attachment:
    """
    A source, for as long as some scheduler holds this: acquired when it is made, and released when it is gone.

    A copy of a scheduler shares it; a pickled one is detached, as one that was saved and loaded.
    """

    def __init__(self, source: Any):
        self.source = source
        self.takes_output = _takes(source, "model_output")
        if hasattr(source, "acquire"):
            source.acquire()
            weakref.finalize(self, source.release).atexit = False

    def __deepcopy__(self, memo) -> "Attachment":
        return self

    def __reduce__(self):
        return type(None), ()


class TableScheduler(SchedulerMixin, ConfigMixin):
    """
    Base of the schedulers: applies a table of weights, computed in float64 when the timesteps are set.

    A subclass implements [`~TableScheduler.row`], sets `data_form` if its rows weigh the data prediction x_0 instead
    of the noise prediction ε, and has at least the configuration keys of [`GenieScheduler`] that are read here.

    Attributes:
        timesteps (`torch.Tensor` of shape `(num_inference_steps,)`):
            What the model is called with: `int64`, or `float32` if `continuous=True` or where learned ones are real.
        sigmas (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            Noise levels γ = σ/α at the timesteps and at the end, float64, on the CPU.
        table (`list[dict]`):
            Row i holds the float64 weights of step i, keyed by (tensor, how many steps ago).
        corrections (`list[dict]`):
            Row i holds the weights of what is added to the sample of step i before it, empty without a corrector.
        init_noise_sigma (`float`):
            What pipelines multiply their initial standard normal noise with.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    config_name = "scheduler_config.json"

    #: the diffusion that the configuration describes
    process_class: type[LinearDiffusion] = VariancePreserving
    #: values of the configuration key `method`
    methods: tuple[str, ...] = ()
    #: values of the configuration key `prediction_type`
    prediction_types: tuple[str, ...] = PREDICTION_TYPES

    def __init__(self):
        self._process: Any = None
        self._process_key: tuple | None = None
        self._attachment: Any = None
        self._warned_of_clipping = False
        self._learned: dict = {}
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self.sigmas = torch.empty(0, dtype=torch.float64)
        self.init_noise_sigma = 1.0
        self.table: list[Row] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        if "beta_schedule" in cls.process_class.CONFIG_KEYS:
            _check_diffusion(config_dict)
        # Each of our classes has methods of its own: those of another one stay behind.
        of_others = {method for scheduler in TableScheduler.__subclasses__() for method in scheduler.methods}
        if config_dict.get("method") in of_others.difference(cls.methods):
            config_dict = {key: value for key, value in config_dict.items() if key != "method"}
        return super().extract_init_dict(config_dict, **kwargs)

    # --- what a solver defines -------------------------------------------------------------------------------------

    @property
    def data_form(self) -> bool:
        """Whether the rows weigh the data prediction x_0 instead of the noise prediction ε."""
        return False

    def row(self, index: int, known: int) -> Row:
        """
        The weights of step `index`, with the predictions of `known` steps at hand, the current one included.

        The weight of `("noise", 0)` is the standard deviation of the fresh noise that the step adds, or a square root
        of its covariance.
        `self.alphas`, `self.noise_stds`, `self.lambdas` hold α, σ and λ at the visited points and the end.
        """
        raise NotImplementedError

    def correction(self, index: int, known: int) -> Row:
        """
        The weights of what is added to the sample of step `index` once the model was called on it, empty for none.

        A corrector is an increment to the sample it is given, so that edits made between steps survive it.
        """
        return {}

    def learned_table(self, num_inference_steps: int) -> dict:
        """
        Learned timesteps and rows for this number of model calls, empty where there are none.

        They take the place of the configured time grid, and end at clean data; `row` reads them from `self._learned`.
        """
        return {}

    # --- process and time grid -------------------------------------------------------------------------------------

    @property
    def process(self) -> Any:
        """The [`LinearDiffusion`] that the configuration describes, as it is now (pipelines may rewrite it)."""
        values = [self.config.get(key) for key in self._process_class.CONFIG_KEYS]
        key = self._process_class, *(tuple(v) if isinstance(v, (list, np.ndarray)) else v for v in values)
        if self._process is None or key != self._process_key:
            self._process, self._process_key = self._process_class.from_config(self.config), key
        return self._process

    @property
    def _process_class(self) -> type[LinearDiffusion]:
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
                each is moved to the nearest timestep.

        Raises:
            ValueError: If not exactly one of the three is given, or if it is out of range.
        """
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("`set_timesteps` needs exactly one of `num_inference_steps`, `timesteps` and `sigmas`.")
        self._check_config()
        process = self.process
        self._learned = {} if num_inference_steps is None else self.learned_table(num_inference_steps)
        first_step_is_free = self.config.get("analytical_first_step", False) and not self._learned
        end_is_noisy = self._end_is_noisy and not self._learned
        if self._learned:
            points = np.asarray(self._learned["timesteps"], dtype=np.float64)
        elif num_inference_steps is not None:
            points = self._grid(num_inference_steps)
        else:
            points = self._custom_points(timesteps, sigmas)
            if first_step_is_free:
                points = np.concatenate([[process.timestep_max], points])
                if points[1] >= points[0]:
                    raise ValueError(
                        f"With `analytical_first_step=True` the first of the custom timesteps must be below "
                        f"{points[0]:g}, where the analytical step starts; got {points[1]:g}."
                    )
            if end_is_noisy:
                points = np.concatenate([points, [process.timestep_min]])

        alphas, noise_stds = process.alpha(points), process.sigma(points)
        if not end_is_noisy:
            alphas, noise_stds = np.append(alphas, 1.0), np.append(noise_stds, 0.0)
        self.init_noise_sigma = 1.0
        if first_step_is_free:
            # GENIE's analytical first step: x̄₁ = x̄₀ + (γ₁ − γ₀)·x_T, with ε(x_T) := x_T and x̄₀ = x_T/α₀.
            gamma_0, gamma_1 = noise_stds[:2] / alphas[:2]
            self.init_noise_sigma = float(alphas[1] * (1 / alphas[0] + gamma_1 - gamma_0))
            points, alphas, noise_stds = points[1:], alphas[1:], noise_stds[1:]
        points, self.alphas, self.noise_stds = self._route(points[: len(alphas) - 1], alphas, noise_stds)
        with np.errstate(divide="ignore"):
            self.lambdas = np.log(self.alphas) - np.log(self.noise_stds)
        self.sigmas = torch.from_numpy(self.noise_stds / self.alphas)
        self._host_timesteps = points.tolist()
        dtype = torch.int64 if process.is_discrete and not np.any(points % 1) else torch.float32
        self.timesteps = torch.tensor(self._host_timesteps, dtype=dtype, device=device)
        self.num_inference_steps = len(points)
        self._begin_index = self._step_index = None
        self._build(begin=0)
        self._tell("begin")
        self._tell("forget")

    def _check_config(self):
        """Raise a `ValueError` for options that do not exist; not in `__init__`, since pipelines rewrite them."""
        for key, choices in (("prediction_type", self.prediction_types), ("timestep_spacing", TIMESTEP_SPACINGS)):
            if self.config.get(key, choices[0]) not in choices:
                raise ValueError(f"`{key}` must be one of {', '.join(choices)}, got {self.config[key]!r}.")

    @property
    def _end_is_noisy(self) -> bool:
        """Whether sampling ends at the smallest noise level of the process instead of at clean data."""
        final_sigmas_type = self.config.final_sigmas_type
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"`final_sigmas_type` must be 'zero' or 'sigma_min', got {final_sigmas_type!r}.")
        return final_sigmas_type == "sigma_min"

    def _grid(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of the analytical first step, of the model calls and, if it is noisy, of the end."""
        process = self.process
        free = int(self.config.get("analytical_first_step", False))
        largest = process.num_train_timesteps - free
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, (int, np.integer)):
            raise ValueError(f"`num_inference_steps` must be an integer, got {num_inference_steps!r}.")
        if not 1 <= num_inference_steps <= largest:
            limit = "`num_train_timesteps`" + (" less the analytical first step" if free else "")
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {largest} ({limit}), got {num_inference_steps}."
            )
        visited = num_inference_steps + free
        name = self.config.time_grid or next(
            (name for flag, name in SIGMA_GRIDS.items() if self.config.get(flag)), self.config.get("timestep_spacing")
        )
        if name in TIMESTEP_SPACINGS:
            points = spaced_timesteps(process, name, visited, self.config.get("steps_offset", 0))
        else:
            # diffusers' own grids spend the last call at the smallest timestep
            ends_before = self._end_is_noisy or (self.config.time_grid and not self.config.get("denoising_step", True))
            points = time_grid(process, name, visited + int(bool(ends_before)))[:visited]
        if name not in NOISE_LEVEL_GRIDS:
            points = self._shifted(points)
        points = np.append(points, process.timestep_min) if self._end_is_noisy else points
        if process.is_discrete:
            points = distinct_integers(points, process.num_train_timesteps - 1).astype(np.float64)
        # A noisy end after all timesteps there are is no step.
        return np.maximum(points, process.timestep_min)

    def _shifted(self, timesteps: np.ndarray) -> np.ndarray:
        """Where the process calls the model for `timesteps` that are spaced without regard to it."""
        return timesteps

    def _route(
        self, timesteps: np.ndarray, alphas: np.ndarray, noise_stds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The timesteps of the model calls, and α and σ at the visited points and the end, in the order of the run."""
        return timesteps, alphas, noise_stds

    def _custom_points(self, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> np.ndarray:
        process = self.process
        name = "timesteps" if timesteps is not None else "sigmas"
        given = timesteps if timesteps is not None else sigmas
        points = np.asarray(given.cpu() if torch.is_tensor(given) else given, dtype=np.float64)
        if points.ndim != 1 or len(points) == 0:
            raise ValueError(f"`{name}` must be a sequence of at least one number, got {given}.")
        if timesteps is None:
            largest = process.gamma(process.timestep_max)
            # 1e-3: a tenth of a timestep, since diffusers computes the largest one in float32
            if not np.all((points > 0) & (points <= largest * (1 + 1e-3))):
                raise ValueError(
                    f"`sigmas` must be positive and at most {largest:g}, the noise level of the first timestep; got "
                    f"{given}."
                )
            points = process.timestep(-np.log(np.minimum(points, largest)))
            points = np.round(points) if process.is_discrete else points
        elif process.is_discrete and np.any(points != np.round(points)):
            raise ValueError(f"`timesteps` must be integers, got {given}.")
        # 1e-6: a real timestep that went through float32
        low, high = process.timestep_min * (1 - 1e-6), process.timestep_max * (1 + 1e-6)
        if np.any(np.diff(points) >= 0) or points[0] > high or points[-1] < low:
            raise ValueError(
                f"`{name}` must strictly decrease and lie between the timesteps {process.timestep_max:g} and "
                f"{process.timestep_min:g}; got {given}, which are the timesteps {points.tolist()}."
            )
        return points

    # --- the table -------------------------------------------------------------------------------------------------

    def _build(self, begin: int):
        """Compute all rows for a run that starts at step `begin`, and forget the history."""
        self._built_for = begin
        self._bind(self._slope_source)
        steps = range(len(self._host_timesteps))
        self.table = [self.row(i, max(i - begin, 0) + 1) for i in steps]
        self.corrections = [self.correction(i, max(i - begin, 0) + 1) for i in steps]
        used = [(i, what, lag) for i in steps for what, lag in (*self.table[i], *self.corrections[i])]
        #: the steps at which the slope is asked for: those whose slope some row weighs, then or later
        self._sloped = {i - lag for i, what, lag in used if what == "slope"}
        depth = max(lag for _, _, lag in used) + 1
        self._samples: deque = deque(maxlen=max((lag for _, what, lag in used if what == "sample"), default=0))
        self._predictions: deque = deque(maxlen=depth)
        self._slopes: deque = deque(maxlen=depth)
        self._previous_noise: torch.Tensor | None = None
        self._clips = bool(self.config.get("clip_sample") or self.config.get("thresholding"))
        if self._clips and not self._warned_of_clipping and getattr(self._slope_source, "learned_unclipped", False):
            self._warned_of_clipping = True
            logger.warning(
                "This scheduler has `clip_sample=True` or `thresholding=True`, but the attached head was learned "
                "without clipping, and is less accurate with it: `from_config(config, clip_sample=False, "
                "thresholding=False)` is what it was learned for."
            )
        # All conversions of the model output are linear in (sample, output), so they are rows as well.
        to_data = [self._conversion(i, to_data=True) for i in steps]
        to_noise = [self._conversion(i, to_data=False) for i in steps]
        back = [self._data_to_noise(i) for i in steps]
        self._rows = {
            "step": [self._folded(i) for i in steps],
            "to_data": to_data,
            "to_noise": to_noise,
            "data_to_noise": back,
        }
        self._noisy = {i for i in steps if np.any(self._rows["step"][i].get(("noise", 0), 0.0))}
        self._device_rows: dict = {}

    def _folded(self, index: int) -> Row:
        """
        The whole step `index` as one row: the correction, then the update, both by way of the model output itself.

        Near pure noise ε and its weight are so large that the conversion of the output and the update nearly cancel;
        adding their weights in float64 leaves nothing to cancel in the precision of the sample.
        """
        row = self.corrected_row(index)
        if not self._clips and ("prediction", 0) in row:
            of_prediction = row.pop(("prediction", 0))
            for column, weight in self._conversion(index, self.data_form).items():
                row[column] = row.get(column, 0.0) + _product(of_prediction, weight)
        return row

    def corrected_row(self, index: int) -> Row:
        """The correction and the update of step `index` as one row of weights."""
        row, of_sample = dict(self.table[index]), self.table[index].get(("sample", 0), 0.0)
        for column, weight in self.corrections[index].items():
            row[column] = row.get(column, 0.0) + _product(of_sample, weight)
        return row

    def _levels(self, index: int) -> tuple[float, float]:
        """α and σ that the model is told in step `index`."""
        return float(self.alphas[index]), float(self.noise_stds[index])

    def _conversion(self, index: int, to_data: bool) -> Row:
        """Model output → x_0 (to_data) or ε, from x = α x_0 + σ ε and v = α ε − σ x_0; for flows v = ε − x_0."""
        alpha, sigma = self._levels(index)
        weights = {
            ("epsilon", True): (1 / alpha, -sigma / alpha),
            ("epsilon", False): (0.0, 1.0),
            ("sample", True): (0.0, 1.0),
            ("sample", False): (1 / sigma, -alpha / sigma),
            ("v_prediction", True): (alpha, -sigma),
            ("v_prediction", False): (sigma, alpha),
            ("flow_prediction", True): (1.0, -sigma),
            ("flow_prediction", False): (1.0, alpha),
        }
        of_sample, of_output = weights[self.config.prediction_type, to_data]
        return {("sample", 0): of_sample, ("output", 0): of_output}

    def _data_to_noise(self, index: int) -> Row:
        alpha, sigma = self._levels(index)
        return {("sample", 0): 1 / sigma, ("data", 0): -alpha / sigma}

    def _apply(self, name: str, index: int, tensors: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        """Σ weight · tensor over row `index` of the rows `name`, in at least float32."""
        reference = tensors["sample"][0]
        dtype = torch.promote_types(reference.dtype, torch.float32)
        row = self._rows_on(name, reference.device, dtype)[index]
        (column, weight), *rest = row
        if weight is not None and weight.ndim > 0:
            states = [tensors[what][lag].to(dtype) for (what, lag), _ in row]
            return self.process.combine([weight for _, weight in row], states)
        total = tensors[column[0]][column[1]].to(dtype)
        if weight is not None:  # None is the weight one
            total = total * weight
        for (what, lag), weight in rest:
            tensor = tensors[what][lag]
            total = total + tensor if weight is None else torch.addcmul(total, tensor, weight)
        return total

    def _rows_on(self, name: str, device: torch.device, dtype: torch.dtype) -> list:
        """The rows as tensors where the sample is, numbers as zero-dimensional ones: one transfer a run."""
        key = (name, device, dtype)
        if key not in self._device_rows:
            used = [[(column, weight) for column, weight in row.items() if np.any(weight)] for row in self._rows[name]]
            weights = [weight for row in used for _, weight in row]
            flat = torch.from_numpy(np.concatenate([np.ravel(weight) for weight in weights]))
            parts = flat.to(device=device, dtype=dtype).split([np.size(weight) for weight in weights])
            tensors = iter([part.reshape(np.shape(weight)) for part, weight in zip(parts, weights, strict=True)])
            pairs = [[(column, weight, next(tensors)) for column, weight in row] for row in used]
            self._device_rows[key] = [
                [(column, None if np.array_equal(weight, 1.0) else tensor) for column, weight, tensor in row]
                for row in pairs
            ]
        return self._device_rows[key]

    # --- stepping --------------------------------------------------------------------------------------------------

    def attach(self, source: Callable | None):
        """
        Give the scheduler a source of dε/dλ, the slope of the noise prediction along the probability-flow ODE.

        Args:
            source:
                A model with a head (such as [`GenieUNet2DModel`]), an [`ExactSlope`], any callable
                `source(sample, noise_prediction, timestep, *, step, history_slope) -> slope`, or `None` to detach.
                `timestep` is a float, `step` the step in λ that is about to be taken (infinite for the last one to
                clean data), `history_slope` the slope through this and the previous prediction, `None` at the
                start. A source that also takes `model_output` is given what `step` was, without variances. The slope
                has the shape of `sample`. Methods of the source, if there are any, are called: `bind(process,
                prediction_type)` whenever the timesteps are set, and raises if the two do not fit; `acquire()` now and
                `release()` when the source is replaced or the scheduler is gone; `begin()` when a run begins;
                `forget()` when a step is taken without the source.

        An attachment is not part of the configuration: attach again after `from_config` or loading. A deep copy of
        the scheduler shares it.

        Raises:
            ValueError: If `source` is no source, does not fit, or the scheduler can use none.
        """
        source = getattr(source, "slope_source", source)
        if isinstance(source, ModelMixin):
            raise ValueError(
                f"`source` must know slopes, which a plain `{type(source).__name__}` does not: add a head with "
                "`GenieUNet2DModel.from_unet` or `GenieUNet2DConditionModel.from_unet`, or attach `ExactSlope(unet)`."
            )
        if source is not None and not callable(source):
            raise ValueError(f"`source` must be callable or have a `slope_source`, got {type(source).__name__}.")
        if source is not None and not self.takes_source:
            raise ValueError(
                f"`{type(self).__name__}` takes no slope source: its steps weigh predictions alone. Attach `source` "
                "to a scheduler with `prediction_type`, such as `GenieScheduler`."
            )
        self._bind(source)
        previous, self._attachment = self._attachment, None if source is None else Attachment(source)
        try:
            if self.num_inference_steps is not None:  # a run under way goes on as if it started here
                self._build(self._built_for if self._step_index is None else self._step_index)
        except ValueError:
            self._attachment = previous
            raise

    @property
    def takes_source(self) -> bool:
        """Whether a source can be attached: it must be told what the model predicts."""
        return "prediction_type" in self.config

    @property
    def _slope_source(self) -> Any:
        return None if self._attachment is None else self._attachment.source

    @property
    def _term(self) -> str | None:
        """What the attached source provides: "slope", dε/dλ, or "residual"."""
        return None if self._attachment is None else getattr(self._slope_source, "term", "slope")

    def _tell(self, event: str):
        """Call the method `event` of the source, if it has one."""
        getattr(self._slope_source, event, lambda: None)()

    def _bind(self, source: Any):
        if hasattr(source, "bind"):
            source.bind(self.process, self.config.prediction_type)

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
        self._refuse_options(kwargs)
        index = self._locate(timestep)
        model_output = self._without_variance(model_output, sample)
        self._remember(model_output, sample, index)
        tensors = {
            "sample": (sample, *self._samples),
            "output": (model_output,),
            "prediction": self._predictions,
            "slope": self._slopes,
        }
        if index in self._noisy:
            tensors["noise"] = (self._draw(sample, generator),)
        prev_sample = self._apply("step", index, tensors).to(sample.dtype)
        self._samples.appendleft(sample)
        self._step_index = index + 1
        if self._step_index == self.num_inference_steps:
            self._samples.clear()
            self._predictions.clear()
            self._slopes.clear()
            self._previous_noise = None
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _remember(self, model_output: torch.Tensor, sample: torch.Tensor, index: int):
        """Put the current prediction, and its slope if there is a source, in front of the history."""
        given = {"sample": (sample,), "output": (model_output,)}
        if self._clips:
            own_data = self._apply("to_data", index, given)
            data = self._clip(own_data)
            clipped = {"sample": (sample,), "data": (data,)}
            prediction = data if self.data_form else self._apply("data_to_noise", index, clipped)
        else:
            prediction = self._apply("to_data" if self.data_form else "to_noise", index, given)
        # A source knows the prediction of its model, not the clipped one.
        noise = self._apply("to_noise", index, given) if self._sloped & {index, index + 1} else None
        slope = None
        if noise is not None and index in self._sloped:
            slope = self._slope(sample, noise, index, model_output)
            # Where x_0 is held at a limit, dx_0/dλ = 0, and with it dε/dλ = −(α/σ) dx_0/dλ. Where thresholding
            # rescales a whole sample the slope is left out too.
            if self._clips:
                slope = torch.where(data == own_data, slope, torch.zeros_like(slope))
        else:
            self._tell("forget")
        self._previous_noise = noise
        self._predictions.appendleft(prediction)
        self._slopes.appendleft(slope)

    def _slope(
        self, sample: torch.Tensor, noise: torch.Tensor, index: int, model_output: torch.Tensor
    ) -> torch.Tensor:
        if self._attachment is None:
            raise ValueError("This scheduler lost its slope source when it was pickled: `attach` it again.")
        history_slope = None
        if self._previous_noise is not None:
            step = float(self.lambdas[index] - self.lambdas[index - 1])
            # neither from clean data nor at a point that is visited twice
            if step != 0 and np.isfinite(step):
                history_slope = (noise - self._previous_noise) / step
        slope = self._slope_source(
            sample,
            noise,
            self._host_timesteps[index],
            step=float(self.lambdas[index + 1] - self.lambdas[index]),
            history_slope=history_slope,
            **({"model_output": model_output} if self._attachment.takes_output else {}),
        )
        if slope.shape != sample.shape:
            raise ValueError(
                f"The slope source must return the shape {tuple(sample.shape)} of `sample`, got {tuple(slope.shape)}."
            )
        return slope

    def _draw(self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Standard normal noise, the same for every split of the batch if each sample has a generator of its own."""
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(
                f"`generator` must be one generator or one for each of {len(sample)} samples, got {len(generator)}."
            )
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def _clip(self, data: torch.Tensor) -> torch.Tensor:
        """Clip x_0 to ±`clip_sample_range`, or threshold it dynamically (Saharia et al., 2022, Section 2.3)."""
        if not self.config.thresholding:
            return data.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        magnitude = data.abs().flatten(1).float()
        scale = torch.quantile(magnitude, self.config.dynamic_thresholding_ratio, dim=1)
        scale = scale.clamp(1.0, max(1.0, self.config.sample_max_value))
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
            expected = self._host_timesteps[self._step_index]
            if np.float32(_as_float(timestep)) != np.float32(expected):
                raise ValueError(
                    f"`timestep` must be {expected:g}, whose turn it is (step {self._step_index} of "
                    f"{self.num_inference_steps}), got {_as_float(timestep):g}. To start elsewhere, call "
                    "`set_timesteps` and `set_begin_index`."
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
        if not 0 <= begin_index < self.num_inference_steps:
            raise ValueError(f"`begin_index` must be between 0 and {self.num_inference_steps - 1}, got {begin_index}.")
        self._begin_index = int(begin_index)
        self._step_index = None
        self._tell("begin")
        if self._begin_index != self._built_for:
            self._build(self._begin_index)

    # --- the forward process ---------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample`: variance-preserving models take it as it is."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """α_t x_0 + σ_t z, for timesteps of shape `(batch,)`."""
        return self.process.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = α_t z − σ_t x_0 (Salimans & Ho, 2022), for clean `sample` x_0 and timesteps of shape `(batch,)`."""
        alpha, sigma = self.process.coefficients(timesteps, sample)
        return alpha * noise - sigma * sample

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ at the integer timesteps, float32, as diffusers' training scripts and some pipelines read it."""
        if not self.process.is_discrete:
            raise AttributeError("a process with `continuous=True` has no `alphas_cumprod`")
        return torch.from_numpy(self.process.alpha(np.arange(self.process.num_train_timesteps)) ** 2).float()

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _check_diffusion(config: Mapping):
    """Raise a `ValueError` if a model of variances β is not what the configuration describes."""
    has_betas = any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "trained_betas"))
    found = [key for key in OTHER_DIFFUSIONS if key in config]
    if not has_betas and found:
        raise ValueError(
            "`config` must describe a variance-preserving model with a noise schedule of betas, which is not here ("
            + ", ".join(f"`{key}={config[key]!r}`" for key in found)
            + "): EDM, variance-exploding and consistency models need their own schedulers, and flow-matching models "
            "`GenieScheduler`."
        )
    if config.get("snr_shift_scale") not in (None, 1, 1.0) or config.get("timestep_type") == "continuous":
        raise ValueError(
            "`config` must describe a model whose noise levels are those of its betas and that is called with integer "
            f"timesteps, got `snr_shift_scale={config.get('snr_shift_scale')}` and "
            f"`timestep_type={config.get('timestep_type')!r}`."
        )


def _takes(function: Any, name: str) -> bool:
    """Whether `function` has an argument called `name`."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # nothing is known of it
        return False


def _product(first: Weight, second: Weight) -> Weight:
    """The weight that acts like `second`, then `first`."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first @ second
    return first * second


def _as_float(timestep: float | torch.Tensor) -> float:
    if torch.is_tensor(timestep):
        if timestep.numel() != 1:
            raise ValueError(f"`timestep` must be a single number, got a tensor of shape {tuple(timestep.shape)}.")
        return float(timestep.item())
    return float(timestep)
