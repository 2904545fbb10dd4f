"""
What gDDIM's corrector is worth with and without its closure, on exact and on trained models.

    python benchmarks/gddim_corrector.py

The corrector moves the state once the model was called on it, at no further call. The closure lets the prediction move
along, as if the data were standard normal; without it, the prediction is that of the uncorrected state. Writes
`benchmarks/results/gddim_corrector.md`: mean relative error to a solution in many calls, on the packaged checkpoints,
and on the mixtures of `head_free.py`, there on the better one of two grids.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path.append(str(ROOT))
from genie_diffusers import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMPipeline, GDDIMScheduler  # noqa: E402
from genie_diffusers.cli import PACKAGED_MODEL  # noqa: E402
from genie_diffusers.core.solvers.gddim import gddim  # noqa: E402
from head_free import mixtures  # noqa: E402

CALLS, ORDERS = (5, 8, 10, 15, 20), (1, 2, 3)
GRIDS = ("uniform_lambda", "quadratic")


class _Plain:
    """The corrector of the paper's weights alone: steps go on with the prediction of the uncorrected state."""

    def row(self, levels, index, known):
        return gddim(levels, index, known, **self._options())


class PlainGDDIM(_Plain, GDDIMScheduler):
    pass


class PlainCLD(_Plain, GDDIMCLDScheduler):
    pass


class PlainBlurring(_Plain, GDDIMBlurringScheduler):
    pass


PLAIN = {GDDIMScheduler: PlainGDDIM, GDDIMCLDScheduler: PlainCLD, GDDIMBlurringScheduler: PlainBlurring}
#: (closure, corrector)
VARIANTS = {"with closure": (True, True), "without": (False, True), "no corrector": (True, False)}


def of_mixture(mixture, dimensions: int, count: int):
    noise = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def draw(scheduler, calls: int) -> torch.Tensor:
        scheduler.set_timesteps(calls)
        sample = noise
        for index, timestep in enumerate(scheduler.timesteps):
            output = mixture(sample, float(scheduler.alphas[index]), float(scheduler.noise_stds[index]), timestep)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        return sample

    reference = draw(GDDIMScheduler(multistep_order=3, time_grid="uniform_lambda"), 600)

    def error(closure: bool, calls: int, **options) -> float:
        cls = GDDIMScheduler if closure else PlainGDDIM
        return min(relative(draw(cls(time_grid=grid, **options), calls), reference) for grid in GRIDS)

    return error


def of_checkpoint(name: str, count: int):
    folder = Path(PACKAGED_MODEL).parent / name
    if name.startswith("ddpm"):
        from genie_diffusers import GeniePipeline

        plain = GeniePipeline.from_pretrained(folder)
        options = {"clip_sample": False, "time_grid": "uniform_lambda", "denoising_step": True}
        scheduler = GDDIMScheduler.from_config(plain.scheduler.config, **options)
        pipe = GDDIMPipeline(plain.unet, scheduler)
    else:
        pipe = GDDIMPipeline.from_pretrained(folder)
    pipe.unet.float()
    pipe.set_progress_bar_config(disable=True)
    config, kind = pipe.scheduler.config, type(pipe.scheduler)

    def draw(cls, calls: int, **options) -> torch.Tensor:
        pipe.scheduler = cls.from_config(config, **options)
        generators = [torch.Generator().manual_seed(1000 + i) for i in range(count)]
        labels = torch.arange(count) % 10
        run = {"num_inference_steps": calls, "generator": generators, "output_type": "latent"}
        return pipe(class_labels=labels, **run).images.double()

    reference = draw(kind, 200, multistep_order=3, corrector=False)
    return lambda closure, calls, **options: relative(
        draw(kind if closure else PLAIN[kind], calls, **options), reference
    )


def relative(sample: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((sample - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24, help="Of each checkpoint.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    lines = [
        "Written by `python benchmarks/gddim_corrector.py`: mean relative error to a solution in many calls.",
        "",
        "| | order | corrector | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |",
        "|---" * (3 + len(CALLS)) + "|",
    ]
    problems = {name: lambda rest=rest: of_mixture(*rest) for name, *rest in mixtures()}
    for name in ("ddpm-cifar10-16", "cld-cifar10-16", "blurring-cifar10-16"):
        problems[name] = lambda name=name: of_checkpoint(name, args.pictures)
    for name, problem in problems.items():
        error = problem()
        for order in ORDERS:
            for variant, (closure, corrector) in VARIANTS.items():
                found = [error(closure, calls, multistep_order=order, corrector=corrector) for calls in CALLS]
                lines.append(f"| {name} | {order} | {variant} | " + " | ".join(f"{e:.4g}" for e in found) + " |")
                print(lines[-1], flush=True)
    args.output_dir.mkdir(exist_ok=True)
    (args.output_dir / "gddim_corrector.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
