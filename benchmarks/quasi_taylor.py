"""
Quasi-Taylor samplers against what they expand, DDIM and DDPM, and against Heun's method, at equal model calls.

    python benchmarks/quasi_taylor.py

writes `quasi_taylor.json` and `quasi_taylor.png` to `benchmarks/results/` and prints a table. Deterministic samplers:
relative L2 distance to the converged solution of the probability-flow ODE from the same noise. Stochastic ones have no
such solution: roughness, the mean squared difference of neighbouring pixels, in units of that of DDPM with 100 calls
(below 1: too smooth, above: noise is left). Both are means over pictures with their standard errors.
"""

import argparse
import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import HeunDiscreteScheduler
from matplotlib.figure import Figure

from genie_diffusers import GeniePipeline, GenieScheduler, QuasiTaylorScheduler
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.core.solvers.quasi_taylor import limit_weights

RESULTS = Path(__file__).parent / "results"
CALLS = (5, 10, 20, 50, 100)
#: for the ODE also a grid that differs much from diffusers' default at few calls
GRIDS = {"ode": {"linspace": CALLS, "uniform_lambda": CALLS[:3]}, "sde": {"linspace": CALLS}}
ORDERS = (1, 2, 3)


class Limit(QuasiTaylorScheduler):
    """DDIM (`method="ode"`) and the DDPM posterior (`"sde"`) on any time grid."""

    def row(self, levels, index: int, known: int):
        ends = [values[index + end] for end in (0, 1) for values in (levels.alphas, levels.sigmas)]
        weights = limit_weights(self.config.method, *ends)._asdict()
        return {(name, 0): float(weight) for name, weight in weights.items()}


def draw(pipe: GeniePipeline, scheduler, num_inference_steps: int, seeds: range) -> torch.Tensor:
    pipe.scheduler = scheduler
    return pipe(
        class_labels=torch.tensor(seeds) % 10,
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images.double()


def distance(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (samples - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def roughness(samples: torch.Tensor) -> torch.Tensor:
    return samples.diff(dim=-1).square().flatten(1).mean(1) + samples.diff(dim=-2).square().flatten(1).mean(1)


def statistics(values: torch.Tensor, unit: float = 1.0) -> dict[str, float]:
    return {"mean": float(values.mean()) / unit, "standard_error": float(values.std()) / len(values) ** 0.5 / unit}


def samplers(config) -> dict[str, tuple]:
    """Name → a scheduler, whether it is stochastic, and the model calls to measure it at."""
    unclipped = {"clip_sample": False, "analytical_first_step": False, "denoising_step": True}
    heun = {key: config[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    found: dict[str, tuple] = {"Heun, linspace": (HeunDiscreteScheduler(**heun), False, CALLS)}
    for method, limit in (("ode", "DDIM"), ("sde", "DDPM")):
        for grid, calls in GRIDS[method].items():
            options = {**unclipped, "method": method, "time_grid": grid}
            found[f"{limit}, {grid}"] = (Limit.from_config(config, **options), method == "sde", calls)
            for order in ORDERS:
                scheduler = QuasiTaylorScheduler.from_config(config, **options, taylor_order=order)
                found[f"quasi-Taylor {method} {order}, {grid}"] = (scheduler, method == "sde", calls)
    return found


def plot(results: dict, path: Path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = ("distance to the solution of the ODE", "roughness / that of DDPM with 100 calls")
    for axis, key, title in zip(figure.subplots(1, 2), ("distance", "roughness"), titles, strict=True):
        for name, rows in results[key].items():
            if name.endswith("uniform_lambda"):
                continue
            means, errors = ([row[what] for row in rows] for what in ("mean", "standard_error"))
            axis.errorbar([row["calls"] for row in rows], means, errors, marker="o", label=name, capsize=3)
        axis.set(xscale="log", yscale="log", xlabel="model calls", title=title)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / "quasi_taylor.json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # steps that take the limit are counted
    diffusers.utils.logging.disable_progress_bar()
    pipe = GeniePipeline.from_pretrained(PACKAGED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    seeds = range(1000, 1000 + args.pictures)
    solution = draw(pipe, GenieScheduler.from_config(config, analytical_first_step=False), 150, seeds)
    ancestral = Limit.from_config(config, method="sde", time_grid="linspace", analytical_first_step=False)
    unit = float(roughness(draw(pipe, ancestral, CALLS[-1], seeds)).mean())

    results: dict = {"distance": {}, "roughness": {}}
    for name, (scheduler, stochastic, all_calls) in samplers(config).items():
        rows = []
        for calls in all_calls:
            is_heun = isinstance(scheduler, HeunDiscreteScheduler)
            samples = draw(pipe, scheduler, (calls + 1) // 2 if is_heun else calls, seeds)
            found = statistics(roughness(samples), unit) if stochastic else statistics(distance(samples, solution))
            found |= {"calls": len(scheduler.timesteps)}
            if type(scheduler) is QuasiTaylorScheduler:
                found |= {"steps_at_the_limit": int(np.sum(scheduler.departures > 1))}
            rows.append(found)
        results["roughness" if stochastic else "distance"][name] = rows
        cells = [f"{row['mean']:.3f} ± {row['standard_error']:.3f}" for row in rows]
        print(f"{name:36}", *cells, [row.get("steps_at_the_limit", 0) for row in rows], flush=True)
    results |= {"command": "python benchmarks/quasi_taylor.py", "pictures": args.pictures}
    results |= {"environment": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
