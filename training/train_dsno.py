"""
Train a neural operator that draws the whole trajectory of a diffusion model in one call: DSNO (Zheng et al., 2023).

The teacher's solutions of the probability-flow ODE come from `generate_trajectories.py`, or are drawn on the fly; no
data set is needed. The operator starts from the teacher's weights. For each time point, what its UNet is told and how
its output is weighed are fitted to some solutions first, so that training starts from the best that the teacher can do
in one call. The result is a folder with a `DSNOPipeline` and a card; see README.md here for examples.
"""

import argparse
import functools

import torch

from genie_diffusers import DSNOPipeline, DSNOUNet2DModel
from genie_diffusers.learning.arguments import repository_of, source_of
from genie_diffusers.learning.operators import (
    OperatorLoss,
    Solutions,
    check,
    learning_rates,
    parse_args,
    solutions_of,
    start_operator,
)
from genie_diffusers.learning.run import Run


def main(args: argparse.Namespace) -> None:
    check(args)
    run = Run(args, alike=True)
    solutions = solutions_of(args, run.device)
    with run.accelerator.main_process_first():
        unet = start_operator(args, solutions)
    distance = OperatorLoss(args, solutions.teacher, run.device)
    held_out = solutions.held_out()
    start_errors = held_out.errors(unet.eval().to(run.device))
    run.learn(unet, schedule=functools.partial(learning_rates, args))
    batches = run.batches(solutions.source)

    def loss(step: int, part: int) -> torch.Tensor:
        noise, labels, states = solutions.of(next(batches))
        return distance(run.model(noise, labels).trajectory.float(), states)

    def show(step: int) -> None:
        with run.averaged():
            run.log.image("samples", held_out.grid(unet.eval()), step)
            run.log.note(step, f"held-out relative errors {listed(held_out.errors(unet))}")
        unet.train()

    what = f"{unet.num_parameters():,} parameters, solutions {solutions}, relative errors {listed(start_errors)}"
    run.fit(loss, what, every=args.sample_steps, then=show)
    if run.is_main:
        DSNOPipeline(unet.eval()).save_pretrained(args.output_dir)
        grid = held_out.grid(unet)
        grid.save(args.output_dir / "samples.png")
        run.log.image("samples", grid, args.max_train_steps)
        write_card(run, unet, solutions, distance, start_errors, held_out.errors(unet))
    run.end()


def listed(errors: list[float]) -> str:
    return ", ".join(f"{error:.4f}" for error in errors)


def write_card(
    run: Run,
    unet: DSNOUNet2DModel,
    solutions: Solutions,
    distance: OperatorLoss,
    start_errors: list[float],
    errors: list[float],
) -> None:
    args = run.args
    own = sum(parameter.numel() for parameter in unet.temporal_layers.parameters())
    conditional = "class_labels=[0, 1, 2, 3]" if solutions.teacher.classes is not None else "batch_size=4"
    run.publish(
        "A neural operator that draws in one model call what its teacher, a diffusion model, draws in many, and the "
        "states on the way. Trained with genie_diffusers, after DSNO (https://huggingface.co/papers/2211.13449), on "
        "solutions of the teacher's probability-flow ODE, without data.",
        usage=(
            "from genie_diffusers import DSNOPipeline\n\n"
            f'pipeline = DSNOPipeline.from_pretrained("{repository_of(args)}")\n'
            f'images = pipeline({conditional}).images\nimages[0].save("sample.png")'
        ),
        facts={
            "Teacher": source_of(args.pretrained_model_name_or_path),
            "Solutions": f"{solutions}, of {args.num_inference_steps} steps of {args.scheduler}, guidance scale "
            f"{args.guidance_scale:g}",
            "Time points": ", ".join(f"{t:g}" for t in unet.config.solution_timesteps),
            "Timesteps that the UNet is told": ", ".join(f"{t:g}" for t in unet.config.timesteps),
            "Parameters": f"{unet.num_parameters():,}, {own:,} of them in {len(unet.temporal_layers)} temporal layers "
            f"of {args.modes} frequencies",
            "Loss": str(distance),
            "Steps": f"{args.max_train_steps:,} of {run.total_batch_size} solutions",
            "Held-out relative error at each time point": listed(errors),
            "The same before training": listed(start_errors),
        },
        pictures={
            "samples.png": "Pairs of rows from the same noises: the teacher's pictures above, the operator's below.",
        },
    )


if __name__ == "__main__":
    main(parse_args())
