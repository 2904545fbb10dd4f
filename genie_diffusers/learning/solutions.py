"""Solutions of a diffusion model's probability-flow ODE: a teacher that draws them, and the shards that keep them."""

import argparse
import json
import os
import zlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import genie_diffusers
from genie_diffusers import GenieScheduler, GenieUNet2DModel, VariancePreserving
from genie_diffusers.core.time_grids import TIME_GRIDS, time_grid
from genie_diffusers.learning.paths import Noises, cubic, draw_numbered, predict
from genie_diffusers.models.derivative_head import fingerprint
from genie_diffusers.models.exact_slope import to_noise_prediction, velocity_of

logger = get_logger(__name__)

FACTS_FILE = "trajectories.json"


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """What the solutions are: those of which model, by which solver, at which times."""
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="The teacher: Hub id or folder of a pipeline with a `UNet2DModel` and a scheduler.",
    )
    add(
        "--scheduler",
        default="GenieScheduler",
        help="The solver, a deterministic scheduler of genie_diffusers or diffusers. Default: GenieScheduler, with "
        "the step head of the model if it has one.",
    )
    add(
        "--scheduler_options",
        type=json.loads,
        default={},
        help="Its configuration where it differs from the model's, as JSON. Clipping is off, and the time grid of "
        "GenieScheduler is uniform_lambda.",
    )
    add("--num_inference_steps", type=int, default=20, help="Steps of the solver.")
    add("--num_time_points", type=int, default=4, help="States of a solution, the picture included.")
    add("--time_grid", choices=TIME_GRIDS, default="quadratic", help="Their spacing.")
    add("--guidance_scale", type=float, default=1.0, help="Of all solutions. For models with classes.")
    add(
        "--label_dropout",
        type=float,
        default=0.0,
        help="Share of solutions of the null class, the last one; above 0 it is left out of the others.",
    )


def solution_grid(process: VariancePreserving, grid: str, num_time_points: int) -> list[float]:
    """t_1 > … > t_M after t_0 = T on a grid, the last one moved to clean data."""
    return [*time_grid(process, grid, num_time_points + 1)[1:-1].tolist(), process.timestep_data]


class Teacher:
    """
    A denoiser and a solver, and the states that the solutions have at given times.

    Between two model calls, a state is the cubic in λ through both their states and velocities dx/dλ, so the time
    points need not be among the solver's own, and the solver may be any.

    Args:
        args (`argparse.Namespace`): Those of [`add_teacher_arguments`].
        device (`torch.device`): Where the denoiser is put.

    Raises:
        ValueError: If there is no such scheduler, or a time point lies beyond its model calls.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        name = args.pretrained_model_name_or_path
        self.unet = GenieUNet2DModel.from_pretrained(name, subfolder="unet").float().eval().requires_grad_(False)
        self.unet.to(device)
        self.config = dict(GenieScheduler.load_config(name, subfolder="scheduler"))
        self.classes = self.unet.config.num_class_embeds
        self.label_dropout, self.guidance_scale = args.label_dropout, args.guidance_scale
        if self.classes is None and (args.label_dropout > 0 or args.guidance_scale != 1.0):
            raise ValueError(
                "`--label_dropout` must be 0 and `--guidance_scale` 1 for a model without classes, got "
                f"{args.label_dropout} and {args.guidance_scale}."
            )
        kind = getattr(genie_diffusers, args.scheduler, None) or getattr(diffusers, args.scheduler, None)
        if kind is None:
            raise ValueError(
                f"`--scheduler` must be a scheduler of genie_diffusers or diffusers, got {args.scheduler!r}."
            )
        own = {"time_grid": "uniform_lambda"} if kind is GenieScheduler else {}
        unclipped = {"clip_sample": False, "thresholding": False}
        self.scheduler = kind.from_config({**self.config, **unclipped, **own, **args.scheduler_options})
        if kind is GenieScheduler and self.unet.derivative_head is not None:
            self.scheduler.attach(self.unet)
        self.process = VariancePreserving.from_config(self.config)
        self.solution_timesteps = solution_grid(self.process, args.time_grid, args.num_time_points)
        self.steps = args.num_inference_steps
        self.scheduler.set_timesteps(self.steps, device=device)
        visited = sorted({float(t) for t in self.scheduler.timesteps}, reverse=True)
        points = self.solution_timesteps[:-1]
        if not all(visited[-1] <= t <= visited[0] for t in points):
            raise ValueError(
                f"`--num_inference_steps` must be such that the time points {points} lie between the first and the "
                f"last model call; {self.steps} of {args.scheduler} are at {visited}."
            )
        ends = [max(1, next(i for i, v in enumerate(visited) if v <= t)) for t in points]
        #: for each time point but the last, the two model calls around it and the weights of what is known there
        self.rows = [self._row(visited[i - 1], visited[i], t) for i, t in zip(ends, points, strict=True)]

    def _row(self, start: float, end: float, t: float) -> tuple[float, float, list[float]]:
        """The weights of x and dx/dλ at `start` and `end` in the cubic's value at `t`."""
        first, last, here = self.process.log_snr([start, end, t]).tolist()
        width = last - first
        (a_0, a_1), (b_0, b_1) = cubic((here - first) / width)
        return start, end, [a_0, width * b_0, a_1, width * b_1]

    def facts(self, args: argparse.Namespace) -> dict[str, Any]:
        """What a folder of its solutions has to remember."""
        return {
            "scheduler": args.scheduler,
            "scheduler_options": args.scheduler_options,
            "num_inference_steps": self.steps,
            "solution_timesteps": self.solution_timesteps,
            "guidance_scale": self.guidance_scale,
            "label_dropout": self.label_dropout,
            "fingerprint": fingerprint(self.unet),
        }

    def draw(self, numbers: list[int], seed: int) -> Noises:
        """Noise, labels and scales of the solutions with these numbers, each a pure function of its own."""
        return draw_numbered(self.unet, numbers, seed, self.label_dropout, self.guidance_scale)

    @torch.no_grad()
    def solve(self, noises: Noises) -> torch.Tensor:
        """The states at the time points, of shape `(batch, time, channels, height, width)`."""
        self.scheduler.set_timesteps(self.steps, device=noises.noise.device)
        sample, visited = noises.noise * self.scheduler.init_noise_sigma, {}
        needed = {timestep for start, end, _ in self.rows for timestep in (start, end)}
        for t in self.scheduler.timesteps:
            model_input = self.scheduler.scale_model_input(sample, t)
            output = predict(self.unet, model_input, t, noises)
            if float(t) in needed:  # the last visit counts: Heun's second call is at a state that it then corrects
                alpha, sigma = float(self.process.alpha(float(t))), float(self.process.sigma(float(t)))
                kind = self.config.get("prediction_type", "epsilon")
                noise = to_noise_prediction(output, model_input, alpha, sigma, kind)
                visited[float(t)] = [model_input, velocity_of(model_input, noise, sigma, kind)]  # x and dx/dλ
            sample = self.scheduler.step(output, t, sample).prev_sample
        states = [
            sum(weight * tensor for weight, tensor in zip(weights, visited[start] + visited[end], strict=True))
            for start, end, weights in self.rows
        ]
        return torch.stack([*states, sample], dim=1)


# Shards


class DamagedShardError(ValueError):
    """A shard that cannot be read, or does not hold what was written."""


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Under another name, renamed when it is complete."""
    partial = path.with_suffix(".partial")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, partial, metadata={name: str(_checksum(tensor)) for name, tensor in tensors.items()})
    os.replace(partial, path)


def check_shard(path: Path, rows: int) -> None:
    """
    Read a shard through.

    Raises:
        DamagedShardError: If it does not hold the `rows` solutions that were written.
    """
    if not path.exists():
        raise DamagedShardError(f"{path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            for name, checksum in (file.metadata() or {}).items():
                tensor = file.get_tensor(name)
                if _checksum(tensor) != int(checksum):
                    raise DamagedShardError(f"{path.name} is damaged: `{name}` is not what was written")
            found = file.get_slice("trajectory").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise DamagedShardError(f"{path.name} is damaged: {error}") from error
    if found != rows:
        raise DamagedShardError(f"{path.name} must hold {rows} solutions, got {found}")


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.numpy().tobytes())


def shard_rows(facts: dict[str, Any]) -> list[int]:
    """How many solutions each shard holds."""
    count, size = facts["num_trajectories"], facts["shard_size"]
    return [min(size, count - start) for start in range(0, count, size)]


class TrajectoryStream(torch.utils.data.Dataset):
    """
    An endless stream of the solutions in a folder, in an order drawn anew every epoch.

    Position p is solution p modulo their number, as in `TrainingStream`, so it is a pure function of `seed` too.

    Args:
        folder (`Path`): What `generate_trajectories.py` has written.
        seed (`int`): Any non-negative number.
        skip_damaged_shards (`bool`, defaults to `False`): Go on without the shards that are damaged or missing.

    Raises:
        ValueError: If the folder holds no solutions.
        DamagedShardError: If shards are damaged or missing; it names them all.
    """

    def __init__(self, folder: Path, seed: int, skip_damaged_shards: bool = False):
        facts_path = folder / FACTS_FILE
        if not facts_path.is_file():
            raise ValueError(f"`--trajectories` must be a folder with a {FACTS_FILE}, got {folder}.")
        self.facts, self.seed = json.loads(facts_path.read_text()), seed
        self.places, damaged = [], []
        for index, rows in enumerate(shard_rows(self.facts)):
            path = shard_path(folder, index)
            try:
                check_shard(path, rows)
            except DamagedShardError as error:
                damaged.append(str(error))
                continue
            self.places += [(path, row) for row in range(rows)]
        message = f"In {folder}, {'; '.join(damaged)}. Run generate_trajectories.py again to replace them"
        if damaged and not skip_damaged_shards:
            raise DamagedShardError(f"{message}, or pass `--skip_damaged_shards`.")
        if not self.places:
            raise DamagedShardError(f"No shard is left. {message}.")
        if damaged:
            logger.warning(f"{len(damaged)} shards are skipped. {message}.")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """The solutions at `positions`: `"noise"`, `"trajectory"` and, if there are classes, `"labels"`."""
        return self.rows([self._number(position) for position in positions])

    def rows(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """The solutions with these numbers, counted over the shards that are there."""
        found = []
        for number in numbers:
            path, row = self.places[number]
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            file = self._open[path]
            found.append({name: file.get_slice(name)[row : row + 1] for name in file.keys()})
        return {name: torch.cat([row[name] for row in found]) for name in found[0]}

    def _number(self, position: int) -> int:
        epoch, place = divmod(position, len(self.places))
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.places))
            self._epoch, self._order = epoch, order
        return int(self._order[place])
