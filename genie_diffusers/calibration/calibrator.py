"""A sampler learned for the pipeline that you run, from nothing but the calls that it makes."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..core.table import Levels, Table, entries
from ..schedulers.scheduling_genie import GenieScheduler
from .fitting import (
    columns_of,
    ddim_weights,
    fit_row,
    joint_step,
    missed_by,
    nearest_points,
    optimal_grids,
    table_of,
    whitened,
)
from .recording import (
    SCALES,
    Batch,
    Columns,
    Coordinates,
    Probe,
    Seen,
    position,
    products_of,
    quiet,
    recording_points,
    split_inputs,
    watch,
)

logger = logging.get_logger(__name__)

#: grids that are tried beside those by dynamic programming, with one point more than calls, the last at the data
STANDARD_GRIDS = ("quadratic", "linear", "uniform_lambda", "karras")
#: how many grids, those of the smallest error of the fitted paths, are compared on paths that are not fitted
FINALISTS = 3
#: with fewer paths than that there is nothing to be held out
MIN_PATHS = 2
#: of a path, that its states and predictions are kept of: 31 MB for a recording of 60 calls
MAX_NUMBERS = 65_536
#: by how much the answers of a model to one call may differ between two runs, in half precision too
SAME_MODEL = 5e-3
#: by how much a weight is changed to see what that does, in root mean squares of the final sample
NUDGE = 0.03

Exchange = Callable[[dict[int, np.ndarray]], list[np.ndarray]]


def calibrate(
    pipe: Any,
    steps: int | Sequence[int] = (4, 6, 8, 10),
    *,
    seed: int = 0,
    num_paths: int | None = None,
    teacher_steps: int = 60,
    refinements: int = 1,
    max_batch_size: int | None = None,
    max_numbers: int = MAX_NUMBERS,
    output_dir: str | os.PathLike | None = None,
    accelerator: Any = None,
    **inputs: Any,
) -> GenieScheduler:
    r"""
    Learn where to call the model and what to weigh in each step, for few model calls of this pipeline.

    The pipeline is called as you call it, with its guidance, adapters, ControlNets, quantisation, offloading and
    compilation; the model is never differentiated. One run of `teacher_steps` calls is recorded. Of the recording
    follow time grids; on each of them one run of K calls fits row after row to the recorded states, and the grid with
    the smallest error is kept. `refinements` then move all rows together: each weight is nudged once, in a run of K
    calls, and a damped step of Gauss and Newton brings the final samples nearer to those of the recording.

    Args:
        pipe ([`DiffusionPipeline`]):
            A pipeline with a `scheduler` whose model preserves variance or matches flows, on its device, in its dtype.
        steps (`int` or sequence of `int`, defaults to `(4, 6, 8, 10)`):
            The numbers of model calls to learn. Every other number is solved.
        seed (`int`, defaults to 0): Of the noise of the first path; the next one has the next seed.
        num_paths (`int`, *optional*):
            How many paths to fit where no input is a list. Default: 8.
        teacher_steps (`int`, defaults to 60): Model calls of the recorded run.
        refinements (`int`, defaults to 1):
            How often all rows are moved together, which takes most of the time: 5 to 6 K runs of K calls each time.
            0 leaves it at the rows that were fitted one after the other.
        max_batch_size (`int`, *optional*):
            The most paths in one call of the pipeline. With fewer than there are, a row takes a run of its own.
        max_numbers (`int`, defaults to 65536):
            Of larger samples a fixed random part of so many numbers is recorded: the host then holds
            8 · `max_numbers` · `teacher_steps` bytes for each path.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where the recording and each table are kept as they are made. A run that was killed goes on from there.
        accelerator ([`accelerate.Accelerator`], *optional*):
            Of a run in several processes, each of which draws its share of the paths. All of them return the same.
        inputs:
            The pipeline's own call arguments, passed through. What is a list (`prompt=["a cat", "a dog"]`) is one for
            each path; everything else is shared by all, several pictures as a tuple. A list or tuple as
            `guidance_scale` is used in turn.

    Returns:
        [`GenieScheduler`]: With the learned `tables` in its configuration, ready to be assigned and saved.

    Raises:
        ValueError:
            If the inputs do not fit the pipeline, the pipeline does not leave to its scheduler where the model is
            called, the model returns NaN, or the recorded run has not converged.

    Example:

    ```py
    from genie_diffusers import calibrate

    pipe.scheduler = calibrate(pipe, steps=(4, 8), prompt=["a cat", "a dog"], guidance_scale=5.0)
    image = pipe("a bird", guidance_scale=5.0, num_inference_steps=8).images[0]
    ```
    """
    return Calibration(
        pipe,
        steps,
        seed=seed,
        num_paths=num_paths,
        teacher_steps=teacher_steps,
        refinements=refinements,
        max_batch_size=max_batch_size,
        max_numbers=max_numbers,
        output_dir=output_dir,
        accelerator=accelerator,
        **inputs,
    ).run()


@dataclasses.dataclass
class Recording:
    """Of the paths of this process what the teacher has seen, by number: tensors of shape `(points, numbers)`."""

    timesteps: np.ndarray
    mu: float | None
    states: dict[int, torch.Tensor]
    predictions: dict[int, torch.Tensor]


@dataclasses.dataclass
class Fit:
    """A sampler while it is learned: the points that it visits, its weights, and the error of each path."""

    grid: str
    points: list[int]
    levels: Levels
    weights: list[np.ndarray]
    errors: np.ndarray
    #: of the pipeline's calls, which may depend on how many there are
    mu: float | None = None

    @property
    def error(self) -> float:
        return float(self.errors.mean())


class Calibration:
    """[`calibrate`], and what it has found beside the sampler. The arguments are its own."""

    def __init__(
        self,
        pipe: Any,
        steps: int | Sequence[int] = (4, 6, 8, 10),
        *,
        seed: int = 0,
        num_paths: int | None = None,
        teacher_steps: int = 60,
        refinements: int = 1,
        max_batch_size: int | None = None,
        max_numbers: int = MAX_NUMBERS,
        output_dir: str | os.PathLike | None = None,
        accelerator: Any = None,
        **inputs: Any,
    ):
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or not hasattr(pipe, "set_progress_bar_config"):
            raise ValueError(f"`pipe` must be a pipeline of diffusers with a `scheduler`, got {type(pipe).__name__}.")
        self.pipe, self.inputs, self.seed = pipe, inputs, seed
        counts: list[Any] = list(steps) if isinstance(steps, (list, tuple, set, range)) else [steps]
        for name, value, least in (
            *(("steps", count, 1) for count in counts),
            ("num_paths", 1 if num_paths is None else num_paths, 1),
            ("max_batch_size", 1 if max_batch_size is None else max_batch_size, 1),
            ("max_numbers", max_numbers, 1),
            ("teacher_steps", teacher_steps, 4),
            ("refinements", refinements, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be of integers of at least {least}, got {value!r}.")
        self.steps: list[int] = sorted(set(counts))
        if not self.steps or self.steps[0] < 1 or self.steps[-1] >= teacher_steps:
            raise ValueError(
                f"`steps` must be positive and fewer than the {teacher_steps} of `teacher_steps`, got {self.steps}."
            )
        self.teacher_steps, self.refinements, self.limit = teacher_steps, refinements, max_numbers
        # clipping and thresholding would hide what there is to learn
        self.solver = GenieScheduler.from_config(
            scheduler.config,
            clip_sample=False,
            thresholding=False,
            final_sigmas_type="zero",
            analytical_first_step=False,
            time_grid=None,
            method="hermite",
            tables=None,
        )
        head = getattr(getattr(pipe, "unet", None), "derivative_head", None)
        own = set(map(str, self.steps)) & set(getattr(getattr(head, "config", None), "tables", None) or {})
        if own:
            logger.warning(
                f"`pipe.unet` has a step head that was learned for {', '.join(sorted(own, key=int))} model calls too: "
                "the calibrated tables go before those of the head, and do without its network."
            )
        self.previous = entries(scheduler.config.get("tables")) if isinstance(scheduler, GenieScheduler) else {}
        self.process, self.parametrisation = self.solver.process, self.solver._conversion()
        self.accelerator = accelerator
        share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        self.num_paths, self.batches = split_inputs(pipe, inputs, num_paths, seed, max_batch_size, share)
        self.coordinates = Coordinates(max_numbers)
        self.folder = None if output_dir is None else Path(output_dir)
        #: model calls that were made by this process, a batch counted once
        self.calls = 0
        self.fits: dict[int, Fit] = {}
        #: by how much the end of the recorded run moves when its calls are doubled, from a quarter and from half
        self.coarse_error = self.teacher_error = np.nan
        self.tables: dict[str, dict] = {}

    # --- several processes ---------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def gathered(self, own: dict[int, np.ndarray]) -> list[np.ndarray]:
        """What all processes have of their paths, in the order of the paths: sums of it round alike everywhere."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            own = dict(gather_object(list(own.items())))
        return [own[number] for number in sorted(own)]

    def _from_main(self, value: Any) -> Any:
        """What the main process has, in all of them."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (value,) = broadcast_object_list([value])
        return value

    # --- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> GenieScheduler:
        if self.folder is not None:
            self._claim(self.folder)
        try:
            self._learn_all()
        finally:
            if self.folder is not None and self.is_main and not list(self.folder.glob("recording/*.safetensors")):
                (self.folder / "calibration.json").unlink(missing_ok=True)  # nothing was begun in it
        self._check_teacher()
        return GenieScheduler.from_config(self.solver.config, tables={**self.previous, **self.tables})

    def _learn_all(self):
        with quiet(self.pipe), torch.no_grad():
            self.bar = tqdm(
                total=self._planned(), desc="Calibration", unit="call", disable=None if self.is_main else True
            )
            with self.bar:
                recording = self.record()
                self.levels, self.targets = self._levels(recording.timesteps), recording.states
                self.norms = {number: float(states[-1].norm()) for number, states in recording.states.items()}
                self.coarse_error, self.teacher_error = self._changes(recording)
                grids = self._grids(recording)
                for count in self.steps:
                    entry = self._from_main(self._kept(count))
                    if entry is None:
                        self.fits[count] = fit = self.learn(count, grids[count])
                        entry = table_of(fit.levels, fit.weights, self.learned_for(fit.mu)).to_dict()
                        self._keep(count, entry, fit)
                    self.tables[str(count)] = entry
                self.bar.total = self.bar.n

    def learned_for(self, mu: float | None) -> dict[str, Any]:
        """The numbers of the call that a table may depend on."""
        plain = (int, float, bool)
        numbers = {name: value for name, value in self.inputs.items() if isinstance(value, plain)}
        several = {
            n: v for n, v in self.inputs.items() if isinstance(v, tuple) or (n in SCALES and isinstance(v, list))
        }
        scales = {name: list(value) for name, value in several.items()}
        scales = {name: value for name, value in scales.items() if all(isinstance(one, plain) for one in value)}
        shift = {} if mu is None else {"mu": float(mu)}
        return {**numbers, **scales, **shift, "clip_sample": False, "thresholding": False}

    def _planned(self) -> int:
        """Model calls that are to come, at most."""
        batches, candidates = len(self.batches), len(STANDARD_GRIDS) + 2
        planned = self.teacher_steps * batches + 3 * self.teacher_steps // 4
        for count in self.steps:
            greedy = count if batches == 1 else batches * count * (count + 1) // 2
            weights = sum(len(columns_of(index)) for index in range(count))
            # each refinement: as it is, every weight and timestep nudged, and two steps tried
            planned += (candidates + 2 * FINALISTS * (self.num_paths >= 2 * MIN_PATHS)) * greedy
            planned += self.refinements * (weights + count + 2) * count * batches
        return planned

    # --- calls of the pipeline -----------------------------------------------------------------------------------

    def _watched(self, batch: Batch, points, visit, steps: int, after: Callable | None = None) -> Probe:
        """One call of the pipeline with a probe."""
        probe = Probe.from_config(self.solver.config)
        probe.points, probe.after = points, after

        def visited(index: int, sample: torch.Tensor, output: torch.Tensor):
            self.calls += 1
            self.bar.update()
            if not torch.isfinite(output).all():
                timestep = probe.timesteps[index]
                raise ValueError(
                    f"The model returned NaN or infinity at timestep {float(timestep):g}, step {index} of "
                    f"{len(probe.timesteps)}: nothing can be learned of this run. Use another dtype."
                )
            return visit(probe, index, sample, output)

        probe.visit = visited
        ended = watch(self.pipe, probe, batch, steps)
        if ended and probe.visited < len(probe.timesteps):
            raise ValueError(
                f"`pipe` ended after {probe.visited} of {len(probe.timesteps)} steps: a run that stops before the "
                "data cannot be calibrated."
            )
        return probe

    # --- the recording -------------------------------------------------------------------------------------------

    def record(self) -> Recording:
        """Run the teacher, or read what an earlier run has kept of it."""
        states: dict[int, torch.Tensor] = {}
        predictions: dict[int, torch.Tensor] = {}
        timesteps, mu = np.empty(0), None
        for first, batch in enumerate(self.batches):
            kept = [self._path_file(number) for number in batch.numbers]
            if all(path is not None and path.exists() for path in kept):
                for number in batch.numbers:
                    tensors = load_file(str(self._path_file(number)))
                    states[number], predictions[number] = tensors["states"], tensors["predictions"]
                    if "free" in tensors:
                        self.coordinates.free[number] = tensors["free"]
                    timesteps = tensors["timesteps"].numpy()
                    mu = float(tensors["mu"]) if "mu" in tensors else None
                self.coordinates.choose(int(tensors["size"]))
                self.bar.update(self.teacher_steps)
                continue
            probe, seen = self._teach(batch, self.teacher_steps, to_the_end=first == 0)
            timesteps, mu = np.asarray(probe.levels.timesteps), probe.mu
            for place, number in enumerate(batch.numbers):
                states[number] = torch.stack([state[place] for state in seen["states"]])
                predictions[number] = torch.stack([made[place] for made in seen["predictions"]])
                self.coordinates.leave_out(number, seen["written"][0][place])
                free = self.coordinates.free.get(number)
                if free is not None:
                    states[number] *= free
                    predictions[number] *= free
                path = kept[place]
                if path is not None:
                    tensors = {
                        "states": states[number],
                        "predictions": predictions[number],
                        "timesteps": torch.from_numpy(timesteps),
                        "size": torch.tensor(self.coordinates.size),
                    }
                    tensors |= {} if mu is None else {"mu": torch.tensor(mu, dtype=torch.float64)}
                    tensors |= {} if free is None else {"free": free}
                    _write(path, functools.partial(save_file, tensors))
        return Recording(timesteps, mu, states, predictions)

    def _teach(self, batch: Batch, steps: int, to_the_end: bool = False) -> tuple[Probe, dict[str, list]]:
        """
        A run of the solver at `steps` points, and what it saw: the states and predictions, and which numbers of a
        state are not those that it has returned.
        """
        seen: dict[str, list] = {"states": [], "predictions": [], "written": []}
        returned: list[torch.Tensor] = []
        columns: list[Columns] = []

        def points(probe: Probe) -> np.ndarray:
            found = recording_points(self.process, self.shift(probe.mu), steps)
            columns.append(Columns(self._levels(found), self.parametrisation))
            return found

        def visit(probe: Probe, index: int, sample: torch.Tensor, output: torch.Tensor):
            state = self.coordinates.of(sample, batch.numbers)
            seen["states"].append(state)
            written = state != (returned[0] if returned else state)
            seen["written"] = [written | earlier for earlier in seen["written"]] or [written]
            made = columns[0].prediction(index, sample, output)
            seen["predictions"].append(self.coordinates.of(made, batch.numbers))

        def after(index: int, following: torch.Tensor):
            returned[:] = [self.coordinates.of(following, batch.numbers)]
            if index + 1 == steps:
                seen["states"] += returned
                if not to_the_end:
                    raise Seen

        return self._watched(batch, points, visit, steps, after), seen

    def shift(self, mu: float | None) -> float:
        """By which a run at `mu` is shifted towards noise."""
        if not self.solver._flows:
            return 1.0
        visited = GenieScheduler.from_config(self.solver.config)
        visited.set_timesteps(1, mu=mu)
        return visited._shift

    def _levels(self, timesteps: np.ndarray) -> Levels:
        """The levels of a run that calls the model at `timesteps` and ends at the data."""
        alphas, sigmas = self.process.alpha(timesteps), self.process.sigma(timesteps)
        return Levels(np.asarray(timesteps), np.append(alphas, 1.0), np.append(sigmas, 0.0), self.process)

    def _changes(self, recording: Recording) -> tuple[float, float]:
        """How far runs of a quarter and of half of the calls end from one of twice as many, of the first batches."""
        batch = self.batches[0]
        ends = {2: torch.stack([recording.states[number][-1] for number in batch.numbers])}
        for part in (1, 0):
            _, seen = self._teach(batch, max(self.teacher_steps >> (2 - part), 1))
            ends[part] = seen["states"][-1]
        recorded = torch.stack([recording.predictions[number][0] for number in batch.numbers])
        changed = float((seen["predictions"][0] - recorded).norm() / recorded.norm())
        if self.folder is not None and changed > SAME_MODEL:  # the first call of every run is the same
            raise ValueError(
                f"`output_dir` holds the recording of another model: this one answers the same call {changed:.2g} "
                "away. Pass another `output_dir`, or delete it."
            )
        own = {
            number: np.array([float((ends[part] - ends[part + 1])[place].norm()) for part in (0, 1)])
            / self.norms[number]
            for place, number in enumerate(batch.numbers)
        }
        quarter, half = np.mean(self.gathered(own), axis=0)
        return float(quarter), float(half)

    def _check_teacher(self):
        """A table cannot be nearer to the solution than what it was fitted to."""
        worse = [count for count, fit in self.fits.items() if self.teacher_error > fit.error]
        if len(worse) == len(self.fits) and self.teacher_error > self.coarse_error / 2:
            if self.folder is not None and self.is_main:  # what cannot be learned from is not gone on from
                shutil.rmtree(self.folder / "recording")
                for path in (self.folder / "calibration.json", *self.folder.glob("table-*.json")):
                    path.unlink()
            raise ValueError(
                f"The recorded run does not converge: from {self.teacher_steps // 4} calls to "
                f"{self.teacher_steps // 2} its end moves by {self.coarse_error:.2g}, and from there to "
                f"{self.teacher_steps} by {self.teacher_error:.2g} of its norm. Take more `teacher_steps`. A "
                "model that was distilled to few steps follows no path that converges: use it as it is."
            )
        if worse:
            logger.warning(
                f"From half of its calls to `teacher_steps={self.teacher_steps}` the recorded run moves by "
                f"{self.teacher_error:.2g}, more than the tables of {', '.join(map(str, worse))} calls miss it by. "
                "They gain from more `teacher_steps`."
            )

    # --- grids ---------------------------------------------------------------------------------------------------

    def _grids(self, recording: Recording) -> dict[int, dict[str, list[int]]]:
        """By number of calls the grids to try, as points of the recording."""
        own = {
            number: products_of([*states[:, None], *recording.predictions[number][:, None]])[0]
            / self.norms[number] ** 2
            for number, states in recording.states.items()
        }
        products = np.sum(self.gathered(own), axis=0)
        grids: dict[int, dict[str, list[int]]] = {count: {} for count in self.steps}
        for name, power in (("optimal", 0.25), ("optimal, even", 0.0)):
            for count, points in optimal_grids(products, self.levels, self.steps, power).items():
                grids[count][name] = points
        place = position(self.process, self.shift(recording.mu))
        for name in STANDARD_GRIDS:
            scheduler = GenieScheduler.from_config(self.solver.config, time_grid=name, denoising_step=False)
            for count in self.steps:
                scheduler.set_timesteps(count, mu=recording.mu)
                nearest = nearest_points(scheduler.levels.timesteps, self.levels, place)
                if nearest is not None and nearest not in grids[count].values():
                    grids[count][name] = nearest
        for count in self.steps:  # two ways may lead to one grid
            if grids[count]["optimal, even"] == grids[count]["optimal"]:
                del grids[count]["optimal, even"]
        return grids

    # --- rows ----------------------------------------------------------------------------------------------------

    def learn(self, count: int, grids: Mapping[str, list[int]]) -> Fit:
        """The sampler of `count` calls."""
        fits = sorted((self.fitted(name, points) for name, points in grids.items()), key=lambda fit: fit.error)
        best = fits[0]
        if self.num_paths >= 2 * MIN_PATHS:
            best = min(fits[:FINALISTS], key=self.held_out_error)
        for _ in range(self.refinements):
            better = self.moved_together(best)
            if better is None:
                break
            best = better
        return best

    def held_out_error(self, fit: Fit) -> float:
        """The error of each half of the paths with rows that are fitted to the other half."""
        # of all guidance scales in each half
        scales = math.prod(
            len(self.inputs[name]) for name in SCALES if isinstance(self.inputs.get(name), (list, tuple))
        )
        halves = np.arange(self.num_paths) // scales % 2
        if len(set(halves.tolist())) == 1:
            return fit.error
        errors = [self.fitted(fit.grid, fit.points, halves == half).errors[halves != half] for half in (0, 1)]
        return float(np.concatenate(errors).mean())

    def fitted(self, name: str, points: list[int], chosen: np.ndarray | None = None) -> Fit:
        """
        Rows that are fitted one after the other, on the states to which the rows before have led.

        Args:
            chosen (`np.ndarray` of `bool`, *optional*): The paths to fit them to; all of them are moved.
        """
        levels = self._levels(self.levels.timesteps[points])
        weights: list[np.ndarray] = []
        last: list[np.ndarray] = []

        def solve(index: int, own: dict[int, np.ndarray]):
            last[:] = self.gathered(own)
            fitted_to = np.stack(last) if chosen is None else np.stack(last)[chosen]
            weights.append(fit_row(np.sum(fitted_to, axis=0), ddim_weights(levels, index)))

        if len(self.batches) == 1:
            mu = self._run(self.batches[0], levels, weights, points, solve).mu
        else:
            for index in range(len(points)):
                own: dict[int, np.ndarray] = {}
                for batch in self.batches:
                    see = lambda _, found, own=own: own.update(found)  # noqa: E731
                    mu = self._run(batch, levels, weights, points, see, index).mu
                solve(index, own)
        errors = np.sqrt([missed_by(of_path, weights[-1]) for of_path in last])
        return Fit(name, points, levels, weights, errors, mu=mu)

    def _run(
        self, batch: Batch, levels: Levels, weights: list, points: list[int], see: Callable, until: int | None = None
    ) -> Probe:
        """
        A run of K calls. Its products with the recorded states, in units of the final ones, are told to `see`.

        In a run `until` a step the rows before it are known; else each is, once it was told of.
        """
        columns = Columns(levels, self.parametrisation)

        def visit(probe: Probe, index: int, sample: torch.Tensor, output: torch.Tensor):
            tensors = columns(index, sample, output)
            if until is None or index == until:
                following = [*points[1:], len(self.levels)][index]
                target = torch.stack([self.targets[number][following] for number in batch.numbers])
                found = products_of([*(self.coordinates.of(tensor, batch.numbers) for tensor in tensors), target])
                see(index, {n: found[i] / self.norms[n] ** 2 for i, n in enumerate(batch.numbers)})
                if index == until:
                    raise Seen
            if index + 1 == len(points):
                raise Seen
            return weighted(weights[index], tensors, sample.dtype)

        return self._watched(batch, lambda probe: levels.timesteps, visit, len(points))

    def moved_together(self, fit: Fit) -> Fit | None:
        """The sampler after one step of all its numbers together; `None` if that brings nothing."""
        products, ends = self._ends(fit, with_products=True)
        moves: list[tuple[Callable[[Fit, float], Fit], float]] = []
        for index, of_paths in enumerate(products):
            for direction in whitened(np.mean(of_paths, axis=0)).T:
                moves.append((functools.partial(self._with_weights, index=index, direction=direction), NUDGE))
        rows = len(moves)
        gaps = -np.diff(np.append(fit.levels.timesteps, self.process.timestep_min))
        for index in range(1, len(gaps)):
            moves.append((functools.partial(self._with_time, index=index), 0.1 * min(gaps[index - 1 : index + 1])))
        changes: dict[int, list[torch.Tensor]] = {number: [] for number in ends}
        for move, length in moves:
            for number, end in self._ends(move(fit, length))[1].items():
                changes[number].append((end - ends[number]) / length)
        own = {}
        for number, end in ends.items():
            columns = [change[None] for change in (*changes[number], end - self.targets[number][-1])]
            own[number] = products_of(columns)[0] / self.norms[number] ** 2
        of_paths = np.stack(self.gathered(own))
        # a unit of time moves the final sample by a root mean square of one, as one of a weight moves the next sample
        unit = np.ones(len(moves) + 1)
        unit[rows:-1] = 1 / np.sqrt(np.maximum(np.diagonal(of_paths.mean(axis=0))[rows:-1], np.finfo(float).tiny))
        of_paths *= np.outer(unit, unit)
        best = None
        # moved calls are further from what is linear than other weights are: only if they are better when tried
        for kept in ([*range(rows)], [*range(len(moves))]):
            columns = [*kept, len(moves)]
            step = joint_step(of_paths[:, columns][:, :, columns])
            tried = fit
            for (move, _), length, one in zip(moves, step, unit, strict=False):
                tried = move(tried, length * one)
            own = {
                number: np.array(float((end - self.targets[number][-1]).norm()) / self.norms[number])
                for number, end in self._ends(tried)[1].items()
            }
            tried = dataclasses.replace(tried, errors=np.array(self.gathered(own)))
            if tried.error < (fit if best is None else best).error:
                best = tried
        return best

    def _with_weights(self, fit: Fit, length: float, index: int, direction: np.ndarray) -> Fit:
        weights = list(fit.weights)
        weights[index] = weights[index] + length * direction
        return dataclasses.replace(fit, weights=weights)

    def _with_time(self, fit: Fit, length: float, index: int) -> Fit:
        """With the call `index` moved, by at most two fifths of the way to its neighbours."""
        timesteps = np.array(fit.levels.timesteps, dtype=np.float64)
        before, here, after = (*timesteps, self.process.timestep_min)[index - 1 : index + 2]
        timesteps[index] = np.clip(here + length, here - 0.4 * (here - after), here + 0.4 * (before - here))
        return dataclasses.replace(fit, levels=self._levels(timesteps))

    def _ends(self, fit: Fit, with_products: bool = False):
        """Where runs end, by path, and for each step the products of what it weighs, of all paths in order."""
        ends: dict[int, torch.Tensor] = {}
        products: list[dict[int, np.ndarray]] = [{} for _ in fit.weights]
        for batch in self.batches:
            columns = Columns(fit.levels, self.parametrisation)

            def visit(probe, index, sample, output, batch=batch, columns=columns):
                tensors = columns(index, sample, output)
                if with_products:
                    found = products_of([self.coordinates.of(tensor, batch.numbers) for tensor in tensors])
                    for i, number in enumerate(batch.numbers):
                        products[index][number] = found[i] / self.norms[number] ** 2
                following = weighted(fit.weights[index], tensors, sample.dtype)
                if index + 1 < len(fit.weights):
                    return following
                for number, end in zip(batch.numbers, self.coordinates.of(following, batch.numbers), strict=True):
                    ends[number] = end
                raise Seen

            self._watched(batch, lambda probe: fit.levels.timesteps, visit, len(fit.weights))
        return [self.gathered(own) for own in products] if with_products else [], ends

    # --- what is kept ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What a recording and its tables depend on."""
        config = {key: value for key, value in self.solver.config.items() if not key.startswith("_")}
        return json.loads(
            json.dumps(
                {
                    "pipeline": type(self.pipe).__name__,
                    "scheduler": config,
                    "inputs": {name: _described(value) for name, value in self.inputs.items()},
                    "seed": self.seed,
                    "num_paths": self.num_paths,
                    "teacher_steps": self.teacher_steps,
                    "refinements": self.refinements,
                    "max_numbers": self.limit,
                },
                default=str,
            )
        )

    def _claim(self, folder: Path):
        """Begin or go on in a folder."""
        settings = self.settings()
        path = folder / "calibration.json"
        if path.exists():
            earlier = json.loads(path.read_text())
            for key, value in settings.items():
                if earlier.get(key) != value:
                    raise ValueError(
                        f"`{key}` must be {earlier.get(key)}, with which {folder} was begun, got {value}. Pass "
                        "another `output_dir`, or delete it."
                    )
        elif self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda partial: Path(partial).write_text(json.dumps(settings, indent=2) + "\n"))
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _path_file(self, number: int) -> Path | None:
        if self.folder is None:
            return None
        (self.folder / "recording").mkdir(parents=True, exist_ok=True)
        return self.folder / "recording" / f"path-{number}.safetensors"

    def _kept(self, count: int) -> dict | None:
        path = None if self.folder is None else self.folder / f"table-{count}.json"
        if path is None or not path.exists():
            return None
        kept = json.loads(path.read_text())
        levels = self._levels(np.asarray(Table.from_dict(kept["table"], self.process, count).timesteps))
        self.fits[count] = Fit(kept["grid"], [], levels, [], np.array(kept["errors"]))
        return kept["table"]

    def _keep(self, count: int, entry: dict, fit: Fit):
        if self.folder is not None and self.is_main:
            kept = {"table": entry, "grid": fit.grid, "errors": fit.errors.tolist()}
            text = json.dumps(kept, indent=2) + "\n"
            _write(self.folder / f"table-{count}.json", lambda partial: Path(partial).write_text(text))


def weighted(weights: np.ndarray, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Σ_k w_k c_k, in float32, then in `dtype`."""
    total = tensors[0] * float(weights[0])
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total.add(tensor, alpha=float(weight))
    return total.to(dtype)


def _write(path: Path, write: Callable[[Path], Any]):
    """Under another name first, so that what has this name is complete."""
    partial = path.with_name(f"partial-{path.name}")
    write(partial)
    os.replace(partial, path)


def _described(value: Any) -> Any:
    """An input, in a form that two runs can compare."""
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):
        value = value.tobytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value
