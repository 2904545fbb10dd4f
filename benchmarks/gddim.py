"""
Quality of gDDIM against other samplers on variance-preserving, blurring and Langevin models, by model calls.

    python benchmarks/gddim.py

samples the three packaged checkpoints, class-conditional and unguided, from the same seeds and classes with every
sampler, and writes `benchmarks/results/gddim.json`, `gddim.md`, the pictures `gddim_pictures_20.png` and
`gddim_pictures_50.png`, and `gddim_path.png`, the noise prediction of a single data point along its path. The first is
written after every cell; `--resume` then goes on. `--only path` draws the last alone, `--only table` writes `gddim.md`
from the cells that are there.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp

from genie_diffusers import CriticallyDampedLangevin, GDDIMPipeline, GDDIMScheduler, GeniePipeline
from genie_diffusers.core.solvers.gddim import square_root
from genie_diffusers.core.time_grids import time_grid
from genie_diffusers.metrics import QualityDistance
from quality import from_json, number, to_json, write_json

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parents[1] / "genie_diffusers" / "checkpoints"
#: the packaged checkpoint, and the sampler of the paper's comparison
PROCESSES = {"VP": "ddpm-cifar10-16", "blurring": "blurring-cifar10-16", "CLD": "cld-cifar10-16"}
#: settings of the schedulers; all draw on the paper's grid, even in √t, with a final denoising step
GDDIM = {
    "gDDIM, order 1": {"multistep_order": 1},
    "gDDIM, order 2": {"multistep_order": 2},
    "gDDIM, order 3": {"multistep_order": 3},
    "gDDIM, order 1, K = L": {"multistep_order": 1, "parametrization": "L"},
    "gDDIM, order 2, K = L": {"multistep_order": 2, "parametrization": "L"},
    "gDDIM, order 3, K = L": {"multistep_order": 3, "parametrization": "L"},
    "ancestral (η = 1)": {"multistep_order": 1, "eta": 1.0},
}
DISTANCES = (("frechet_distance", "Fréchet distance", 1.0), ("kernel_distance", "Kernel distance, × 1000", 1e3))
EULER_MARUYAMA, RK45 = "Euler–Maruyama", "probability flow, RK45"
#: what the others are compared with at more calls
OURS, OTHERS, FEW_CALLS = "gDDIM, order 3", ("ancestral (η = 1)", EULER_MARUYAMA, RK45), (10, 20)


def load(name: str) -> GDDIMPipeline:
    """A packaged checkpoint with a gDDIM scheduler on the paper's grid."""
    folder = CHECKPOINTS / PROCESSES[name]
    if name == "VP":
        pipe = GeniePipeline.from_pretrained(folder)
        options = {"time_grid": "quadratic", "interpolation": "timestep"}
        options |= {"analytical_first_step": False, "denoising_step": True}
        pipe = GDDIMPipeline(pipe.unet, GDDIMScheduler.from_config(pipe.scheduler.config, **options))
    else:
        pipe = GDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Model:
    """
    A checkpoint as a function of (state, timestep) → ε for K = R, with its classes; it counts its calls.

    States are float64 and only the network is float32: conversions to ε and back nearly cancel near pure noise.
    """

    def __init__(self, pipe: GDDIMPipeline, labels: torch.Tensor):
        self.pipe, self.labels, self.calls = pipe, labels, 0
        self.process = pipe.scheduler.process

    @torch.no_grad()
    def __call__(self, state: torch.Tensor, timestep: float) -> torch.Tensor:
        self.calls += 1
        times = torch.full((len(state),), timestep)
        if not self.pipe.scheduler.config.get("preconditioned", False):
            return self.pipe.unet(state.float(), times, class_labels=self.labels).sample.double()
        scaling, of_state, of_output = (self.weight(w) for w in self.process.preconditioning(timestep))
        seen = self.process.combine([scaling], [state])
        output = self.pipe.unet(seen.float(), times, class_labels=self.labels).sample.double()
        return self.process.combine([of_state, of_output], [state, output])

    def denoised(self, state: torch.Tensor, timestep: float) -> torch.Tensor:
        """The pictures of E[u_0 | u] = Ψ^{−1} (u − R ε)."""
        to_data = np.linalg.inv(self.process.mean(timestep))
        weights = [self.weight(to_data), self.weight(-to_data @ self.process.root(timestep))]
        return self.process.pictures(self.process.combine(weights, [state, self(state, timestep)])).float()

    @staticmethod
    def weight(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values)


def euler_maruyama(
    model: Model, state: torch.Tensor, calls: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """du = (F u + G Gᵀ R^{−T} ε) dt + G dw, from noise to data, then a denoising step."""
    process = model.process
    times = time_grid(process, "quadratic", calls)
    for start, end in pairwise(times):
        step, diffusion = end - start, process.diffusion(start)
        transposed = np.linalg.inv(process.root(start)).swapaxes(-1, -2)
        identity = np.broadcast_to(np.eye(process.weight_shape[-1]), process.weight_shape)
        # G Gᵀ is diagonal in all three processes
        weights = (identity + step * process.drift(start), step * diffusion @ transposed, np.sqrt(-step * diffusion))
        noise = torch.stack([torch.randn(state.shape[1:], generator=generator) for generator in generators]).double()
        state = process.combine([model.weight(w) for w in weights], [state, model(state, start), noise])
    return model.denoised(state, times[-1])


class OutOfCalls(Exception):
    pass


def runge_kutta(model: Model, state: torch.Tensor, tolerance: float, budget: float = np.inf) -> torch.Tensor:
    """The probability-flow ODE by the adaptive RK45 of scipy, then a denoising step."""
    process, before = model.process, model.calls

    def velocity(timestep, flat):
        if model.calls - before >= budget - 1:
            raise OutOfCalls
        now = torch.from_numpy(flat).reshape(state.shape)
        of_prediction = 0.5 * process.diffusion(timestep) @ np.linalg.inv(process.root(timestep)).swapaxes(-1, -2)
        weights = [model.weight(process.drift(timestep)), model.weight(of_prediction)]
        return process.combine(weights, [now, model(now, timestep)]).flatten().numpy()

    ends = (process.timestep_max, process.timestep_min)
    solution = solve_ivp(velocity, ends, state.flatten().numpy(), method="RK45", rtol=tolerance, atol=tolerance)
    end = torch.from_numpy(solution.y[:, -1]).reshape(state.shape)
    return model.denoised(end, process.timestep_min)


def tolerance_for(model: Model, state: torch.Tensor, calls: int) -> float | None:
    """The smallest of some tolerances with which RK45 stays within `calls` on a few states; None if none does."""
    model = Model(model.pipe, model.labels[: len(state)])
    for tolerance in 10.0 ** np.arange(-5, 0.5, 0.5):
        try:
            runge_kutta(model, state, tolerance, calls)
            return tolerance
        except OutOfCalls:
            continue
    return None


def samplers_of(name: str) -> list[str]:
    """For numbers instead of matrices both roots are the same."""
    return [key for key in (*GDDIM, EULER_MARUYAMA, RK45) if name == "CLD" or "K = L" not in key]


def sample(
    pipe: GDDIMPipeline, sampler: str, calls: int, seeds: Sequence[int], labels: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, float] | None:
    """Pictures in [−1, 1] but for overshoots, and the mean number of model calls; None if they do not suffice."""
    config, tolerance = pipe.scheduler.config, None
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    pictures, used = [], []
    for start in range(0, len(seeds), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        noise = torch.stack([torch.randn(channels, size, size, generator=generator) for generator in generators])
        classes = labels[start : start + batch_size]
        model = Model(pipe, classes)
        if sampler in GDDIM:
            pipe.scheduler = type(pipe.scheduler).from_config(config, **GDDIM[sampler])
            options = {"num_inference_steps": calls, "latents": noise, "generator": generators}
            pictures.append(pipe(class_labels=classes, output_type="latent", **options).images)
            pipe.scheduler = type(pipe.scheduler).from_config(config)
            model.calls = calls
        elif sampler == EULER_MARUYAMA:
            pictures.append(euler_maruyama(model, model.process.prior(noise.double()), calls, generators))
        else:
            state = model.process.prior(noise.double())
            tolerance = tolerance or tolerance_for(model, state[:8], calls)
            if tolerance is None:
                return None
            pictures.append(runge_kutta(model, state, tolerance))
        used.append(model.calls)
    return torch.cat(pictures), float(np.mean(used))


def write_table(results: dict[str, Any], path: Path) -> None:
    """The distances in the shape of the paper's Table 3, then what others with more calls are behind gDDIM."""
    cells, steps = results["cells"], results["settings"]["steps"]
    lines = [
        f"Written by `{results['command']}`: {results['settings']['num_samples']} pictures a cell, standard errors by "
        "jackknife. Differences are between the same seeds and classes. RK45: in brackets the calls of its tolerance, "
        "– where not even a tolerance of 1 is loose enough."
    ]
    for distance, title, scale in DISTANCES:
        lines += ["", f"## {title}", "", "| Process | Sampler | " + " | ".join(f"{n} calls" for n in steps) + " |"]
        lines += ["|---" * (2 + len(steps)) + "|"]
        for name in PROCESSES:
            for sampler in samplers_of(name):
                entries = []
                for calls in steps:
                    cell = cells.get(f"{name}, {sampler}@{calls}")
                    if not cell:  # not measured, or not enough calls
                        entries.append("" if cell is None else "–")
                        continue
                    taken = f" ({cell['calls']:.0f})" if sampler == RK45 else ""
                    entries.append(number(from_json(cell[distance]), scale) + taken)
                lines += [f"| {name} | {sampler} | " + " | ".join(entries) + " |"]
    for few in FEW_CALLS:
        more = [n for n in steps if n >= few]
        lines += ["", f"## Fréchet distance above that of {OURS}, with {few} calls"]
        lines += ["", "| Process | Sampler | " + " | ".join(f"{n} calls" for n in more) + " |"]
        lines += ["|---" * (2 + len(more)) + "|"]
        for name in PROCESSES:
            ours = cells.get(f"{name}, {OURS}@{few}")
            for sampler in OTHERS if ours else ():
                entries = []
                for n in more:
                    other = cells.get(f"{name}, {sampler}@{n}")
                    if other:
                        above = from_json(other["frechet_distance"]) - from_json(ours["frechet_distance"])
                    entries.append(number(above) if other else "–")
                lines += [f"| {name} | {sampler} | " + " | ".join(entries) + " |"]
    path.write_text("\n".join(lines) + "\n")


def draw_pictures(pipes: dict[str, GDDIMPipeline], calls: int, path: Path, columns: int = 10) -> None:
    """All samplers that get by with `calls`, the same seed and class in every column."""
    rows = [
        (f"{name}, {sampler}", sample(pipe, sampler, calls, range(columns), torch.arange(columns) % 10, columns))
        for name, pipe in pipes.items()
        for sampler in samplers_of(name)
    ]
    rows = [(label, drawn) for label, drawn in rows if drawn is not None]
    figure = Figure(figsize=(6.2, 0.45 * len(rows)), layout="constrained")
    for axes, (label, drawn) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        images = drawn[0].clamp(-1, 1) / 2 + 0.5
        axes.imshow(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy())
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        axes.set(xticks=[], yticks=[])
    figure.suptitle(f"{calls} model calls", fontsize=9)
    figure.savefig(path, dpi=150)


def draw_path(path: Path) -> None:
    """Both components of ε along the exact path of a single data point, for the two roots of CLD."""
    process = CriticallyDampedLangevin()
    timesteps = np.geomspace(process.timestep_min, process.timestep_max, 400)
    noise = np.array([1.0, 0.5])
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, root, title in zip(panels, "RL", ("K = R (gDDIM)", "K = L (Cholesky)"), strict=True):
        change = np.linalg.inv(process.root(timesteps)) @ square_root(process, timesteps, root)
        epsilon = (change.swapaxes(-1, -2) @ noise[:, None])[..., 0]
        axes.plot(timesteps / 999, epsilon, label=["position", "velocity"])
        axes.set(xscale="log", xlabel="τ", title=title)
    panels[0].set_ylabel("ε")
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100], help="Model calls.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Pictures a cell, at least 100.")
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=100_000, help="Of the first picture; the next one has the next.")
    parser.add_argument("--processes", nargs="+", choices=list(PROCESSES), default=list(PROCESSES))
    parser.add_argument("--only", choices=["path", "pictures", "table"], help="Draw or write this alone.")
    parser.add_argument("--resume", action="store_true", help="Keep the cells that are there.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    if args.only in (None, "path"):
        draw_path(args.output_dir / "gddim_path.png")
    if args.only == "path":
        return
    path = args.output_dir / "gddim.json"
    if args.only == "table":
        write_table(json.loads(path.read_text()), path.with_suffix(".md"))
        return
    pipes = {name: load(name) for name in args.processes}
    if args.only == "pictures":
        for calls in (20, 50):
            draw_pictures(pipes, calls, args.output_dir / f"gddim_pictures_{calls}.png")
        return
    distance = QualityDistance.from_pretrained()
    settings = {"num_samples": args.num_samples, "seed": args.seed, "steps": args.steps}
    earlier = json.loads(path.read_text()) if args.resume and path.exists() else {"settings": settings, "cells": {}}
    for key in ("num_samples", "seed"):
        if earlier["settings"][key] != settings[key]:
            raise ValueError(
                f"`--{key}` must be that of {path.name}, {earlier['settings'][key]}, got {settings[key]}."
            )
    results: dict[str, Any] = {
        "command": f"python benchmarks/gddim.py --num_samples {args.num_samples} --batch_size {args.batch_size}",
        "environment": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "settings": settings,
        "cells": earlier["cells"],
    }
    seeds = range(args.seed, args.seed + args.num_samples)
    labels = torch.from_numpy(np.random.default_rng(args.seed).integers(10, size=args.num_samples))
    todo = [(name, sampler, calls) for calls in args.steps for name in pipes for sampler in samplers_of(name)]
    for name, sampler, calls in todo:
        key = f"{name}, {sampler}@{calls}"
        if key in results["cells"]:
            continue
        drawn = sample(pipes[name], sampler, calls, seeds, labels, args.batch_size)
        cell: dict[str, Any] = {}
        if drawn is not None:
            images, used = drawn
            finite = images.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)
            cell = {"calls": used, **{k: to_json(estimate) for k, estimate in distance(finite).items()}}
        results["cells"][key] = cell
        print(key, number(from_json(cell["frechet_distance"])) if cell else "–", flush=True)
        write_json(results, path)
    write_table(results, path.with_suffix(".md"))
    for calls in (20, 50):
        draw_pictures(pipes, calls, args.output_dir / f"gddim_pictures_{calls}.png")


if __name__ == "__main__":
    main()
