"""What a calibrated sampler is worth on paths that it was not fitted to, beside diffusers' own solvers."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, make_image_grid
from PIL.Image import Image, Resampling

from ..schedulers.scheduling_genie import GenieScheduler
from .calibrator import Calibration
from .recording import Batch, Probe, Seen, call, quiet, recording_points, watch

logger = logging.get_logger(__name__)

#: diffusers' solvers that a card compares with, as they come from the configuration
PEERS = {
    "UniPC": "UniPCMultistepScheduler",
    "DPM-Solver++(2M)": "DPMSolverMultistepScheduler",
    "DEIS": "DEISMultistepScheduler",
    "Euler": "FlowMatchEulerDiscreteScheduler",
}
#: of a flow-matching configuration for solvers that serve both kinds
FLOW_KEYS = ("use_dynamic_shifting", "time_shift_type", "shift_terminal", "base_shift", "max_shift")


def peer(name: str, solver: GenieScheduler) -> SchedulerMixin | None:
    """A solver of diffusers with the model's configuration; `None` where it does not serve such models."""
    scheduler_class = getattr(diffusers, PEERS[name])
    config = dict(solver.config)
    known = inspect.signature(scheduler_class).parameters
    if solver._flows:
        if name == "Euler":
            given = {
                key: config[key] for key in (*FLOW_KEYS, "base_image_seq_len", "max_image_seq_len") if key in config
            }
            return scheduler_class(shift=config["flow_shift"], **given)
        given = {key: config[key] for key in FLOW_KEYS if key in config and key in known}
        own = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["flow_shift"]}
        return scheduler_class(**own, **given)
    if name == "Euler":
        return None
    theirs = {key: value for key, value in config.items() if key in known and value is not None}
    return scheduler_class.from_config(theirs)


@torch.no_grad()
def ends_of(calibration: Calibration, scheduler: SchedulerMixin, batches: Sequence[Batch], steps: int) -> torch.Tensor:
    """Where the pipeline's runs with `scheduler` end, one row of numbers for each path."""
    pipe, ends = calibration.pipe, []
    for batch in batches:
        last: list[torch.Tensor] = []
        step = scheduler.step

        @functools.wraps(step)
        def watched(*args, step=step, last=last, **kwargs):
            result = step(*args, **kwargs)
            last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
            return result

        scheduler.step = watched
        pipe.scheduler = scheduler
        if scheduler is calibration.solver:  # pipelines of this package attach the head of their model
            scheduler.attach(None)
        try:
            with quiet(pipe):
                call(pipe, batch, steps)
        finally:
            del scheduler.step
        ends.append(calibration.coordinates.of(last[0], batch.numbers))
    return torch.cat(ends)


def converging(calibration: Calibration, steps: int) -> Probe:
    """The solver, at the points that a recording of `steps` calls has."""
    probe = Probe.from_config(calibration.solver.config)
    probe.asked, probe.visit = steps, lambda index, sample, output: None
    probe.points = lambda probe: recording_points(calibration.process, calibration.shift(probe.mu), steps)
    return probe


@torch.no_grad()
def solved(calibration: Calibration, batches: Sequence[Batch], steps: int) -> torch.Tensor:
    """Where a converging run of `steps` calls ends, one row of numbers for each path."""
    ends = []
    for batch in batches:
        probe = converging(calibration, steps)

        def after(index: int, following: torch.Tensor, batch=batch):
            if index + 1 == steps:
                ends.append(calibration.coordinates.of(following, batch.numbers))
                raise Seen

        probe.after = after
        with quiet(calibration.pipe):
            watch(calibration.pipe, probe, batch, steps)
    return torch.cat(ends)


def held_out_errors(
    calibration: Calibration, scheduler: GenieScheduler, batches: Sequence[Batch]
) -> dict[str, dict[int, np.ndarray]]:
    """
    By sampler and number of calls the relative distance of each path to a run of twice as many calls as the recorded.

    Args:
        calibration ([`Calibration`]): That has run.
        scheduler ([`GenieScheduler`]): What it returned.
        batches (sequence of [`Batch`]): Paths that it was not fitted to.
    """
    reference = solved(calibration, batches, 2 * calibration.teacher_steps)
    samplers: dict[str, SchedulerMixin | None] = {
        "calibrated": scheduler,
        "GenieScheduler, not calibrated": calibration.solver,
    }
    samplers |= {name: peer(name, calibration.solver) for name in PEERS}
    errors: dict[str, dict[int, np.ndarray]] = {}
    for name, sampler in samplers.items():
        if sampler is None:
            continue
        try:
            for steps in calibration.steps:
                ends = ends_of(calibration, sampler, batches, steps)
                distances = (ends - reference).norm(dim=1) / reference.norm(dim=1)
                errors.setdefault(name, {})[steps] = distances.numpy()
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            # what diffusers' schedulers raise where they cannot follow: `mu` or `sigmas` that they do not take, no
            # `init_noise_sigma`, a conversion that is missing
            if name not in PEERS:
                raise
            logger.warning(f"{PEERS[name]} is left out of the comparison: this pipeline cannot use it ({error}).")
            errors.pop(name, None)
    return errors


def table_of_errors(errors: Mapping[str, Mapping[int, np.ndarray]]) -> str:
    """Mean errors and their standard errors, as Markdown."""
    counts = list(next(iter(errors.values())))
    lines = ["| Model calls | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for name, row in errors.items():
        cells = []
        for count in counts:
            values = row[count]
            spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():.4f} ± {spread:.4f}" if len(values) > 1 else f"{values.mean():.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(errors: Mapping[str, Mapping[int, np.ndarray]], path: Path) -> bool:
    """Error against model calls; `False` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("There is no plot of the errors: that needs matplotlib.")
        return False
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, row in errors.items():
        width, marker = (2, "s") if name == "calibrated" else (1, ".")
        axes.plot(list(row), [values.mean() for values in row.values()], label=name, linewidth=width, marker=marker)
    axes.set(xlabel="model calls", ylabel="relative error to the converged run", yscale="log")
    axes.set_xticks(list(next(iter(errors.values()))))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True


@torch.no_grad()
def pictures(
    calibration: Calibration, scheduler: GenieScheduler, peers: Sequence[str], batch: Batch, path: Path
) -> str | None:
    """
    The converged run, the calibrated sampler and others at equal calls, a row of pictures each, written to `path`.

    Args:
        calibration ([`Calibration`]): That has run.
        scheduler ([`GenieScheduler`]): What it returned.
        peers (sequence of `str`): Those of [`PEERS`] that the pipeline can use; the first one is shown.
        batch ([`Batch`]): What to draw.
        path (`Path`): The file to write.

    Returns:
        `str`: Its caption; `None`, and a sentence, for pipelines that make no pictures.
    """
    pipe, steps = calibration.pipe, max(calibration.steps)
    shown: dict[str, tuple[SchedulerMixin | None, int]] = {
        f"{calibration.teacher_steps} calls": (
            converging(calibration, calibration.teacher_steps),
            calibration.teacher_steps,
        ),
        f"calibrated, {steps} calls": (scheduler, steps),
        **{f"{name}, {steps} calls": (peer(name, calibration.solver), steps) for name in peers[:1]},
    }
    rows = []
    for sampler, count in shown.values():
        with quiet(pipe):
            pipe.scheduler = sampler
            found = call(pipe, batch, count, output_type="pil", return_dict=False)[0]
        if not isinstance(found, list) or not isinstance(found[0], Image):
            logger.warning(f"There are no pictures in the card: {type(pipe).__name__} draws none.")
            return None
        rows.append(found)
    enlarged = max(1, 64 // rows[0][0].width)  # small ones can be looked at too
    images = [
        image.resize([enlarged * side for side in image.size], Resampling.NEAREST) for row in rows for image in row
    ]
    make_image_grid(images, len(rows), len(rows[0])).save(path)
    return "From above: " + "; ".join(shown) + ". The same noise in each column."
