"""
The slope of a guided prediction: along the guided path, or combined from the branches' own, as in the paper's code.

    python benchmarks/guided_slope.py

writes `benchmarks/results/guided_slope.json`, measured on the packaged class-conditional checkpoint. The reference is
the slope of the guided prediction along converged guided solutions, as a centred difference quotient. Both sources,
exact derivatives and the packaged derivative head, are asked once for each branch along the guided velocity, and once
for each branch along its own; the latter are then combined as null + w (conditional − null). A third one, whose
derivative in time is a difference quotient, shows what a model trained at integer timesteps has not learned.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch

from genie_diffusers import ExactSlope, GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.paths import (
    Noises,
    draw_guided,
    noise_of,
    predict,
    relative_error,
    solve,
    solver_of,
    teacher_of,
)
from genie_diffusers.models.exact_slope import forward_mode, velocity_of

ROOT = Path(__file__).parent
HEAD = Path(PACKAGED_MODEL).parent / "genie-head-cifar10-16"
REFERENCE_CALLS = 100
#: every so many points of the converged solutions, where λ is in this range; quotients are over two points
STRIDE, RANGE = 6, (-4.0, 2.5)
#: in λ, to both sides
SECANT = 0.3
OWN_PATHS = ", own paths"


class OwnPaths:
    """A slope source that combines those of the branches, each along its own path."""

    def __init__(self, unet: GenieUNet2DModel, source: Callable, noises: Noises):
        self.unet, self.source, self.noises = unet, source, noises
        self.bind, self.acquire, self.release = source.bind, source.acquire, source.release

    def __call__(self, sample, noise_prediction, timestep, **kwargs):
        def slope(branch: Noises) -> torch.Tensor:
            self.source.forget()  # the call of the pipeline
            return self.source(sample, predict(self.unet, sample, torch.tensor(int(timestep)), branch), timestep)

        return combined(slope, self.unet, self.noises)


def combined(slope: Callable[[Noises], torch.Tensor], unet: GenieUNet2DModel, noises: Noises) -> torch.Tensor:
    """null + w (conditional − null) of what `slope` says of both branches, or the conditional one without guidance."""
    conditional = slope(Noises(noises.noise, noises.labels, None))
    if noises.scales is None:
        return conditional
    null = slope(Noises(noises.noise, torch.full_like(noises.labels, unet.config.num_class_embeds - 1), None))
    return null + noises.scales[:, None, None, None] * (conditional - null)


def slope_by_secant(unet, process, timestep: int, sample: torch.Tensor, noises: Noises) -> torch.Tensor:
    """dε/dλ with the exact derivative in the sample, and over `SECANT` to both sides of the timestep that in time."""
    prediction = predict(unet, sample, torch.tensor(timestep), noises)
    velocity = velocity_of(sample, prediction, float(process.sigma(timestep)), "epsilon")
    ends = [process.log_snr(timestep) + side for side in (SECANT, -SECANT)]
    ends = np.clip(np.round(process.timestep(np.array(ends))), 0, process.timestep_max)
    ahead, behind = (predict(unet, sample, torch.tensor(end), noises) for end in ends)
    width = float(process.log_snr(ends[0]) - process.log_snr(ends[1]))
    with forward_mode(unet):
        _, in_sample = torch.func.jvp(
            lambda x: predict(unet, x, torch.tensor(timestep), noises), (sample,), (velocity,)
        )
    return in_sample + (ahead - behind) / width


@torch.no_grad()
def measure(unet: GenieUNet2DModel, config, scale: float, args: argparse.Namespace) -> dict[str, dict]:
    """By source: the relative errors of its slopes, and of the pictures drawn with them, one for each noise."""
    noises = draw_guided(unet, args.noises, args.seed, scale)
    teacher = teacher_of(config)
    teacher.set_timesteps(REFERENCE_CALLS)
    sample, states, predictions = noises.noise, [], []
    for index, timestep in enumerate(teacher.timesteps):
        output = predict(unet, sample, timestep, noises)
        states.append(sample)
        predictions.append(noise_of(output, sample, teacher, index))
        sample = teacher.step(output, timestep, sample).prev_sample
    converged, lambdas = sample, teacher.lambdas

    exact = ExactSlope(unet)
    sources = {"exact": exact, "head": unet.slope_source}
    of_model = list(sources.values())
    sources |= {f"{name}{OWN_PATHS}": OwnPaths(unet, source, noises) for name, source in list(sources.items())}
    for source in sources.values():
        source.bind(teacher.process, teacher.config.prediction_type)
    squares = {name: torch.zeros(len(noises)) for name in ("secant in time", f"secant in time{OWN_PATHS}", *sources)}
    energy = torch.zeros(len(noises))
    points = [i for i in range(1, REFERENCE_CALLS - 1, STRIDE) if RANGE[0] < lambdas[i] < RANGE[1]]
    for i in points:
        reference = (predictions[i + 1] - predictions[i - 1]) / float(lambdas[i + 1] - lambdas[i - 1])
        energy += reference.square().sum(dim=(1, 2, 3))
        timestep, state = int(teacher.timesteps[i]), states[i]

        def secant(branch: Noises, timestep=timestep, state=state) -> torch.Tensor:
            return slope_by_secant(unet, teacher.process, timestep, state, branch)

        slopes = {"secant in time": secant(noises), f"secant in time{OWN_PATHS}": combined(secant, unet, noises)}
        for name, source in sources.items():
            for each in of_model:
                each.forget()
            predict(unet, state, torch.tensor(timestep), noises)  # the call that the sources of both branches refer to
            slopes[name] = source(state, predictions[i], float(timestep))
        for name, slope in slopes.items():
            squares[name] += (slope - reference).square().sum(dim=(1, 2, 3))
    found = {name: {"slope": (square / energy).sqrt()} for name, square in squares.items()}
    for name, source in {**sources, "history": None}.items():
        scheduler = solver_of(config, time_grid="uniform_lambda", method="taylor")
        scheduler.attach(source)
        drawn = solve(unet, scheduler, args.steps, noises)
        found.setdefault(name, {})["pictures"] = relative_error(drawn, converged)
    exact.remove()
    return found


def summary(found: dict[str, dict]) -> dict[str, dict]:
    """Means and standard errors, for own paths also of the difference from the guided path on the same noises."""
    report: dict[str, dict] = {}
    for name, errors in found.items():
        report[name] = {what: estimate(values) for what, values in errors.items()}
        guided = found.get(name.removesuffix(OWN_PATHS), {})
        if name.endswith(OWN_PATHS):
            differences = {what: estimate(values - guided[what]) for what, values in errors.items()}
            report[name]["less those of the guided path"] = differences
    return report


def estimate(values: torch.Tensor) -> dict[str, float]:
    error = values.std() / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 4), "standard_error": round(float(error), 4)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Slopes of guided predictions, by two ways of guiding them.")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--noises", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="Steps of the pictures.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    unet = GenieUNet2DModel.from_unet(GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float(), HEAD)
    config = GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")
    results = {}
    for scale in args.guidance_scales:
        results[f"{scale:g}"] = summary(measure(unet.eval(), config, scale, args))
        print(scale, json.dumps(results[f"{scale:g}"]), flush=True)
    report = {
        "command": "python benchmarks/guided_slope.py",
        "what": "by guidance scale and source: root mean square error of dε/dλ along a converged guided solution, "
        f"relative to that slope, and relative error of a picture of {args.steps} Taylor steps; mean and standard "
        f"error over {args.noises} noises",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "results": results,
    }
    (args.output_dir / "guided_slope.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
