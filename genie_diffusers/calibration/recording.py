"""A pipeline's own call, watched: schedulers that say where the model is called, and see what it answers."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401

from ..core.table import Levels
from ..core.time_grids import distinct_integers
from ..schedulers.scheduling_genie import GenieScheduler
from .fitting import columns_of, prediction_term

#: inputs of a call by which it draws several pictures for one prompt
REPEATS = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
#: inputs of a call that take one number for all pictures; several of them make groups of paths
SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
#: inputs of a call whose lists are not one for each path, but for each adapter, ControlNet or layer
SHARED_LISTS = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
    "complex_human_instruction",
    "conditioning_scale",
    "controlnet_conditioning_scale",
    "control_mode",
    "control_guidance_start",
    "control_guidance_end",
    "adapter_conditioning_scale",
    "skip_guidance_layers",
    "callback_on_step_end_tensor_inputs",
)
#: inputs of a call that may be one text or one for each picture; `system_prompt` and others are one for all
PROMPT = re.compile(r"(negative_)?prompt(_\d+)?")
#: pipelines, by how their names begin, of which each path takes all the pictures of a list
REFERENCES = ("Flux2", "QwenImageEditPlus", "ZImageOmni")


class Seen(Exception):
    """A call of the pipeline has shown what it was made for; the rest of it is not needed."""


class Probe(GenieScheduler):
    """
    The scheduler of one call of a pipeline: calls the model at given timesteps, and hands on what it sees.

    Its attributes are set once it is made: `asked`, the number of steps that the pipeline is asked for;
    `points(probe)`, which chooses that many timesteps, or fewer, when the pipeline sets them; and
    `visit(index, sample, output)`, which returns the next sample, or `None` for that of the solver; and
    `after(index, following)`, if it wants to know what that was.
    """

    asked: int
    points: Callable[["Probe"], np.ndarray]
    visit: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
    after: Callable[[int, torch.Tensor], None] | None = None
    mu: float | None = None
    visited = 0
    #: what the solver's last step has led to, before it was rounded to the pipeline's dtype
    _unrounded: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        if self.visited:
            raise ValueError(
                "`pipe` sets the timesteps of its scheduler twice in a call. What it samples in two loops cannot be "
                "calibrated as one."
            )
        if timesteps is not None or (sigmas is not None and not self.is_default_ramp(sigmas)):
            given = f"timesteps={timesteps}" if timesteps is not None else f"sigmas={sigmas}"
            raise ValueError(
                f"`pipe` chooses where its model is called and passes `{given}`. Calibration has to choose that: the "
                "pipeline must pass `num_inference_steps`, or σ from 1 to 1/n in even steps."
            )
        steps = num_inference_steps if sigmas is None else len(sigmas)
        if steps != self.asked:
            raise ValueError(f"`pipe` was asked for {self.asked} steps, and sets {steps}.")
        self.mu = mu
        super().set_timesteps(num_inference_steps, device, None, sigmas, mu)  # of which the shift is known
        super().set_timesteps(timesteps=self.points(self).tolist(), device=device, mu=mu)

    def _custom_points(self, timesteps, sigmas):
        """Real timesteps too: those of a learned table are."""
        return np.asarray(timesteps, dtype=np.float64) if sigmas is None else super()._custom_points(timesteps, sigmas)

    def set_begin_index(self, begin_index: int = 0):
        if begin_index:
            raise ValueError(
                f"`pipe` starts at step {begin_index}, not with noise (`strength` below 1, or `denoising_start`): its "
                "start differs from grid to grid. Calibrate a run from pure noise; runs that start mid-way use the "
                "solver on the learned timesteps."
            )
        super().set_begin_index(begin_index)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **kwargs):
        index = self._locate(timestep)
        output = self._without_variance(model_output, sample)
        self.visited = index + 1
        following = self.visit(index, sample, output)
        if following is None:
            # In half precision the roundings of a recording's many steps would add up to more than a table's error.
            # What the pipeline gets is rounded; the solver goes on from what it was.
            exact = sample.to(torch.promote_types(sample.dtype, torch.float32))
            if self._unrounded is not None:
                exact = torch.where(self._unrounded.to(sample.dtype) == sample, self._unrounded, exact)
            output = model_output.to(exact.dtype)
            (self._unrounded,) = super().step(output, timestep, exact, generator, return_dict=False, **kwargs)
            following = self._unrounded.to(sample.dtype)
        self._step_index = index + 1
        if self.after is not None:
            self.after(index, following)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def __deepcopy__(self, memo):
        raise ValueError(
            "`pipe` copies its scheduler within a call, to sample several things side by side. Only pipelines with "
            "one scheduler can be calibrated."
        )


class Columns:
    """What the rows of a run weigh, call after call: the sample, and the predictions as [`prediction_term`] says."""

    def __init__(self, levels: Levels, parametrisation: Any):
        self.levels, self.parametrisation = levels, parametrisation
        self.predictions: list[torch.Tensor] = []

    def __call__(self, index: int, sample: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
        self.predictions = [self.prediction(index, sample, output), *self.predictions][: len(columns_of(index)) - 1]
        return [sample.float(), *self.predictions]

    def prediction(self, index: int, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x_0 or ε of a call, in at least float32."""
        level = float(self.levels.alphas[index]), float(self.levels.sigmas[index])
        term = prediction_term(*level)
        to_term = self.parametrisation.to_data if term == "data" else self.parametrisation.to_noise
        of_sample, of_output = to_term(*level)
        return of_sample * sample.float() + of_output * output.float()


class Coordinates:
    """
    A batch as one row of float32 numbers on the host for each path: all of a sample, or a fixed random part of it.

    Args:
        limit (`int`): The most numbers that are kept of a sample.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.kept: torch.Tensor | None = None
        self.is_doubled: bool | None = None
        #: of a path the numbers that the pipeline leaves to its scheduler, if that is not all of them; others are zero
        self.free: dict[int, torch.Tensor] = {}

    def choose(self, size: int):
        """Which of `size` numbers are kept: the same in every run and process."""
        if self.size not in (0, size):
            raise ValueError(f"`pipe` must step samples of one size, got {self.size} and {size} numbers for a path.")
        if self.size == 0 and size > self.limit:
            self.kept = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: self.limit].sort().values
        self.size = size

    def of(self, batch: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Of the paths of these numbers."""
        paths = len(numbers)
        if batch.shape[0] % paths and paths > 1:
            raise ValueError(
                f"`pipe` steps a sample of shape {tuple(batch.shape)} for {paths} paths, which its first dimension is "
                "no multiple of. Pass `max_batch_size=1`."
            )
        if self.is_doubled is None:  # DiT steps its samples side by side with copies, for guidance
            halves = batch.chunk(2)
            self.is_doubled = batch.shape[0] == 2 * paths and torch.equal(*halves)
        rows = (batch[:paths] if self.is_doubled else batch).detach().reshape(paths, -1)
        self.choose(rows.shape[1])
        if self.kept is not None:
            rows = rows[:, self.kept.to(rows.device)]
        # Kandinsky 5 writes the next sample into the tensor of this one
        rows = rows.to(device="cpu", dtype=torch.float32, copy=True)
        for row, number in zip(rows, numbers, strict=True):
            if number in self.free:
                row *= self.free[number]
        return rows

    def leave_out(self, number: int, written: torch.Tensor):
        """Of a path the numbers that the pipeline writes itself between steps, as for inpainting."""
        if not written.any():
            return
        if written.all():
            raise ValueError(
                "`pipe` changes all of its sample between steps (a callback, or what it does itself): what its "
                "scheduler returns is not what is stepped from. Calibrate without that."
            )
        self.free[number] = ~written


def products_of(columns: Sequence[torch.Tensor]) -> np.ndarray:
    """Of tensors of shape `(paths, numbers)` the products with each other, `(paths, columns, columns)`, in float64."""
    stacked = torch.stack(list(columns), dim=1).double()
    return (stacked @ stacked.mT).numpy()


# --- the paths -------------------------------------------------------------------------------------------------------


class Batch:
    """Some of the paths, and the inputs of the call that draws them."""

    def __init__(self, numbers: Sequence[int], inputs: Mapping[str, Any], seed: int):
        self.numbers, self._inputs, self.seed = list(numbers), dict(inputs), seed

    @property
    def inputs(self) -> dict[str, Any]:
        """Those of one call, whose lists may be written into, as Z-Image writes its chat template into prompts."""
        return {name: list(value) if _listed(name, value) else value for name, value in self._inputs.items()}

    def __len__(self) -> int:
        return len(self.numbers)

    def generators(self) -> list[torch.Generator]:
        """One for each path, on the host, so that noises are the same for every split and every device."""
        return [torch.Generator().manual_seed(self.seed + number) for number in self.numbers]


def split_inputs(
    pipe: Any,
    inputs: Mapping[str, Any],
    num_paths: int | None,
    seed: int,
    max_batch_size: int | None,
    share: tuple[int, int] = (0, 1),
    first: int = 0,
) -> tuple[int, list[Batch]]:
    """
    The paths of a calibration, and those of one process in batches.

    Args:
        pipe ([`DiffusionPipeline`]): Whose call they are inputs of.
        inputs (mapping): What is a list is one for each path, and so is a tensor of as many rows.
        num_paths (`int`, *optional*): How many, where nothing in `inputs` says it. Default: 8.
        seed (`int`): Of path 0; the next one has the next seed.
        max_batch_size (`int`, *optional*): The most paths in a call.
        share (`tuple[int, int]`): The number of the process, and of all processes.
        first (`int`, defaults to 0): The number of the first path.

    Returns:
        `tuple[int, list[Batch]]`: The number of paths of all processes, and the batches of this one.

    Raises:
        ValueError: If the inputs are not the call's, differ in length, or are fewer than processes.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    chosen_here = [name for name in ("num_inference_steps", "timesteps", "sigmas", "generator") if name in inputs]
    if chosen_here:
        raise ValueError(f"`{chosen_here[0]}` must be left out: calibration chooses it (`steps`, `seed`).")
    partial = [name for name in ("strength", "denoising_end", "denoising_start") if inputs.get(name) not in (None, 1)]
    if partial:
        raise ValueError(
            f"`{partial[0]}` must be left out, got {inputs[partial[0]]}: a table is of a run from pure noise to data. "
            "Calibrate the whole run; parts of it use the learned timesteps."
        )
    if inputs.get("eta"):
        raise ValueError(f"`eta` must be left out, got {inputs['eta']}: what is calibrated adds no noise.")
    empty = [name for name, value in inputs.items() if isinstance(value, (list, tuple)) and len(value) == 0]
    if empty:
        raise ValueError(f"`{empty[0]}` must not be empty.")
    unknown = [name for name in inputs if name not in accepted]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no input of a {type(pipe).__name__}, whose inputs are {', '.join(list(accepted)[1:])}."
        )
    values = dict(inputs)
    lengths = {name: len(value) for name, value in per_path(pipe, inputs).items()}
    scales = {name: list(values.pop(name)) for name in SCALES if isinstance(values.get(name), (list, tuple))}
    shared = {name: values.pop(name) for name in [*values] if _is_for_all(pipe, name, values[name])}
    tensors = {name: value for name, value in values.items() if torch.is_tensor(value) and value.ndim}
    # one row of a prompt's embeddings is shared by all paths, as a text is
    rows = {
        name: len(value)
        for name, value in tensors.items()
        if name != "image" and (len(value) > 1 or "prompt" not in name)
    }
    given = next(iter(lengths.values()), None) or next(iter(rows.values()), None)
    if given is not None and num_paths not in (None, given):
        name = next(iter(lengths), None) or next(iter(rows))
        raise ValueError(f"`num_paths` must be that of `{name}`, {given}, got {num_paths}.")
    count = given or num_paths or 8
    for name, of_scale in scales.items():
        if len(of_scale) > count:
            raise ValueError(f"`{name}` must have at most as many scales as there are paths, {count}, got {of_scale}.")
    rank, processes = share
    if count < processes:
        raise ValueError(f"There must be a path for each of {processes} processes, got {count}: give more inputs.")
    # a text is one for each path: negative ones must be of the kind of the others
    values = {
        name: [value] * count if isinstance(value, str) and PROMPT.fullmatch(name) else value
        for name, value in values.items()
    }
    repeat = None
    if given is None and not any(isinstance(value, list) for value in values.values()):
        repeat = next((name for name in REPEATS if name in accepted), None)
        max_batch_size = 1 if repeat is None else max_batch_size
    own = np.array_split(np.arange(count), processes)[rank].tolist()
    groups: dict[tuple, list[int]] = {}
    for number in own:
        scale = tuple(values_of[number % len(values_of)] for values_of in scales.values())
        groups.setdefault(scale, []).append(number)
    batches = []
    for scale, numbers in groups.items():
        size = max_batch_size or len(numbers)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            own_inputs = {name: _of_paths(value, part, count) for name, value in values.items()}
            own_inputs |= shared | dict(zip(scales, scale, strict=True))
            if repeat is not None:
                own_inputs[repeat] = len(part)
            batches.append(Batch([first + number for number in part], own_inputs, seed))
    return count, batches


def per_path(pipe: Any, inputs: Mapping[str, Any]) -> dict[str, list]:
    """
    The inputs that are lists of one entry for each path.

    Raises:
        ValueError: If they differ in length.
    """
    found = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, list) and name not in SCALES and not _is_for_all(pipe, name, value)
    }
    if len(set(map(len, found.values()))) > 1:
        raise ValueError(
            "Inputs that are lists must have one entry for each path, got "
            + ", ".join(f"{len(value)} of `{name}`" for name, value in found.items())
            + ". What all paths share is passed as a tuple or as it is."
        )
    return found


def _is_for_all(pipe: Any, name: str, value: Any) -> bool:
    """Whether a list belongs to all paths: of several ControlNets each takes one picture, or a path a list of them."""
    if not isinstance(value, list):
        return False
    several = any("Multi" in type(getattr(pipe, part, None)).__name__ for part in ("controlnet", "adapter"))
    control = "control_image" if "control_image" in inspect.signature(type(pipe).__call__).parameters else "image"
    if several and name == control:
        return not any(isinstance(one, list) for one in value)
    return name in SHARED_LISTS or (name == "image" and type(pipe).__name__.startswith(REFERENCES))


def _listed(name: str, value: Any) -> bool:
    """Whether a call gets a list: of what is one for each path, and of pictures that all of them share."""
    return isinstance(value, list) or (name == "image" and isinstance(value, tuple))


def _of_paths(value: Any, numbers: list[int], count: int) -> Any:
    if isinstance(value, list):
        return [value[number] for number in numbers]
    if torch.is_tensor(value) and value.ndim and len(value) == count:
        return value[numbers]
    return value


@contextmanager
def quiet(pipe: Any):
    """The pipeline without its own progress bar, and afterwards with the scheduler and the bar that it had."""
    scheduler, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)


@contextmanager
def seeded(seed: int, device: torch.device | None):
    """
    With the global generators at a seed, and afterwards as they were.

    Pipelines draw from them what they draw without the `generator` of a call, such as the latents of the pictures for
    ControlNets of Stable Diffusion 3: the runs of a batch must all see the same.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def call(pipe: Any, batch: Batch, steps: int, **options: Any) -> Any:
    """What the pipeline draws of a batch in `steps` steps of its scheduler, as latents if it can."""
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        options = {"output_type": "latent", **options}
    options = {"num_inference_steps": steps, "generator": batch.generators(), **options, **batch.inputs}
    with seeded((1 << 32) + batch.seed + batch.numbers[0], getattr(pipe, "_execution_device", None)):
        return pipe(**options)


def watch(pipe: Any, probe: Probe, batch: Batch, steps: int) -> bool:
    """Call the pipeline with a probe as its scheduler; whether the call came to its own end."""
    pipe.scheduler = probe
    probe.asked = steps
    try:
        call(pipe, batch, steps)
    except BaseException as stopped:
        # what the end of the call would have done for offloaded models and caches
        getattr(pipe, "maybe_free_model_hooks", lambda: None)()
        if not isinstance(stopped, Seen):
            raise
        return False
    if not probe.visited:
        raise ValueError(f"A call of {type(pipe).__name__} did not step `pipe.scheduler`: it cannot be calibrated.")
    return True


# --- where a recording calls the model -------------------------------------------------------------------------------


def position(process: Any, shift: float) -> Callable[[np.ndarray], np.ndarray]:
    """
    Where a timestep lies between noise (0) and data (1): the mean of its share in λ and in time.

    Even in it, half of the points of a recording are even in λ, as solvers like them, and half are even in the
    timesteps, near which most grids are.
    """

    def share(timesteps: np.ndarray) -> np.ndarray:
        timesteps = np.asarray(timesteps, dtype=np.float64)
        ends = np.array([process.timestep_max, process.timestep_min])
        in_lambda = _between(process.log_snr(timesteps), process.log_snr(ends))
        if shift != 1:  # the timesteps before they were shifted
            timesteps, ends = process.shifted(timesteps, 1 / shift), process.shifted(ends, 1 / shift)
        return 0.5 * in_lambda + 0.5 * _between(timesteps, ends)

    return share


def _between(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return (values - ends[0]) / (ends[1] - ends[0])


def recording_points(process: Any, shift: float, count: int) -> np.ndarray:
    """`count` decreasing timesteps, even in [`position`]."""
    fine = np.linspace(process.timestep_max, process.timestep_min, 20_001)
    points = np.interp(np.linspace(0.0, 1.0, count), position(process, shift)(fine), fine)
    if process.is_discrete:
        points = distinct_integers(points, process.num_train_timesteps - 1).astype(np.float64)
    return points
