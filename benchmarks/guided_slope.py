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
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch

from genie_diffusers import ExactSlope, GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.models.exact_slope import forward_mode, velocity_of

ROOT = Path(__file__).parent
sys.path.append(str(ROOT.parent / "training"))
from train_step_head import Noises, draw, noise_of, predict, relative_error, solve, solver_of  # noqa: E402

HEAD = Path(PACKAGED_MODEL).parent / "genie-head-cifar10-16"
REFERENCE_CALLS = 100
#: every so many points of the converged solutions, where λ is in this range; quotients are over two points
STRIDE, RANGE = 6, (-4.0, 2.5)
#: in λ, to both sides
SECANT = 0.3


class OwnPaths:
    """A slope source that combines those of the branches, each along its own path."""

    def __init__(self, unet: GenieUNet2DModel, source: Callable, noises: Noises):
        self.unet, self.source, self.noises = unet, source, noises
        self.bind = source.bind

    def __call__(self, sample, noise_prediction, timestep, **kwargs):
        null = torch.full_like(self.noises.labels, self.unet.config.num_class_embeds - 1)
        slopes = []
        for labels in (null, self.noises.labels):
            own = predict(self.unet, sample, torch.tensor(int(timestep)), Noises(sample, labels, None))
            slopes.append(self.source(sample, own, timestep, **kwargs))
        return slopes[0] + self.noises.scales[:, None, None, None] * (slopes[1] - slopes[0])


def slope_by_secant(
    unet, teacher: GenieScheduler, timestep: float, sample: torch.Tensor, noises: Noises
) -> torch.Tensor:
    """dε/dλ with the exact derivative in the sample, and over `SECANT` to both sides of the timestep that in time."""
    process = teacher.process
    prediction = predict(unet, sample, torch.tensor(timestep), noises)
    velocity = velocity_of(sample, prediction, float(process.sigma(timestep)), "epsilon")
    ends = [process.log_snr(timestep) + side for side in (SECANT, -SECANT)]
    ends = np.clip(np.round(process.timestep(np.array(ends))), 0, process.timestep_max)
    ahead, behind = (predict(unet, sample, torch.tensor(end), noises) for end in ends)
    width = float(process.log_snr(ends[0]) - process.log_snr(ends[1]))
    with forward_mode(unet):
        in_sample = torch.func.jvp(lambda x: predict(unet, x, torch.tensor(timestep), noises), (sample,), (velocity,))[
            1
        ]
    return in_sample + (ahead - behind) / width


@torch.no_grad()
def measure(unet: GenieUNet2DModel, config, scale: float, args: argparse.Namespace) -> dict:
    """For each source: the relative error of its slopes, and of the pictures drawn with them."""
    noises = draw(unet, args.noises, args.seed, 0.0, max_guidance_scale=2.0)
    noises.scales = torch.full_like(noises.scales, scale)
    teacher = solver_of(config, time_grid="uniform_lambda", denoising_step=True)
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
    sources |= {f"{name}, own paths": OwnPaths(unet, source, noises) for name, source in list(sources.items())}
    squares = {name: 0.0 for name in (*sources, "secant in time", "secant in time, own paths")}
    energy = 0.0
    points = [i for i in range(1, REFERENCE_CALLS - 1, STRIDE) if RANGE[0] < lambdas[i] < RANGE[1]]
    for i in points:
        reference = (predictions[i + 1] - predictions[i - 1]) / float(lambdas[i + 1] - lambdas[i - 1])
        energy += float(reference.square().sum())
        timestep = teacher.timesteps[i]
        for name, source in sources.items():
            source.bind(teacher.process, teacher.config.prediction_type)
            predict(unet, states[i], timestep, noises)  # the call that the sources of both branches refer to
            slope = source(states[i], predictions[i], float(timestep))
            squares[name] += float((slope - reference).square().sum())
        null = torch.full_like(noises.labels, unet.config.num_class_embeds - 1)
        guided, *own = (
            slope_by_secant(unet, teacher, float(timestep), states[i], Noises(states[i], labels, scales))
            for labels, scales in ((noises.labels, noises.scales), (null, None), (noises.labels, None))
        )
        squares["secant in time"] += float((guided - reference).square().sum())
        combined = own[0] + scale * (own[1] - own[0])
        squares["secant in time, own paths"] += float((combined - reference).square().sum())
    found = {name: {"slope": (value / energy) ** 0.5} for name, value in squares.items()}
    for name, source in {"history": None, **sources}.items():
        scheduler = solver_of(config, time_grid="uniform_lambda", method="taylor")
        scheduler.attach(source)
        drawn = solve(unet, scheduler, args.steps, noises)
        found.setdefault(name, {})["pictures"] = float(relative_error(drawn, converged).mean())
    exact.remove()
    return {name: {what: round(value, 4) for what, value in values.items()} for name, values in found.items()}


def main(args: argparse.Namespace) -> None:
    plain = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float().eval()
    unet = GenieUNet2DModel.from_unet(plain, HEAD)
    config = GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")
    results = {}
    for scale in args.guidance_scales:
        results[f"{scale:g}"] = measure(unet, config, scale, args)
        print(scale, json.dumps(results[f"{scale:g}"]), flush=True)
    report = {
        "command": "python benchmarks/guided_slope.py",
        "what": "by guidance scale and source: root mean square error of dε/dλ relative to the slope of converged "
        f"solutions, and mean relative error of pictures of {args.steps} Taylor steps; {args.noises} noises",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "results": results,
    }
    (ROOT / "results" / "guided_slope.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Slopes of guided predictions, by two ways of guiding them.")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--noises", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="Steps of the pictures.")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
