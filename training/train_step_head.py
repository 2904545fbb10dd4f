"""
Distil a solver for few model calls from a diffusion model alone: no data set is needed.

Converged solutions of the probability-flow ODE, from noise, are the teacher. For each number of model calls a table of
weights is fitted to them by least squares, step after step, on the states that the table itself reaches. Then a small
network is trained on what the weights leave over, through the whole chain of steps and the frozen denoiser, so that
it answers for everything its own corrections cause later. The result is a `StepHead`: a folder of its own with a card;
see README.md here for examples.
"""

import argparse

import torch

from genie_diffusers import GenieScheduler, StepHead
from genie_diffusers.learning.arguments import base_of, source_of
from genie_diffusers.learning.conditions import conditioned, load_unet, rematerialised, sampling_code, with_head
from genie_diffusers.learning.paths import relative_error, solve, solver_of
from genie_diffusers.learning.run import Run
from genie_diffusers.learning.step_heads import (
    StepDistillation,
    check,
    parse_args,
    plot_errors,
    tables_are_guided,
)


def main(args: argparse.Namespace) -> None:
    run = Run(args, alike=True)
    unet = load_unet(args.pretrained_model_name_or_path)
    check(args, unet)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = solver_of(scheduler_config)
    head = StepHead.for_unet(unet, scheduler.config, width=args.head_width)
    unet = with_head(unet, head).requires_grad_(False).to(run.device)
    head.requires_grad_(True)
    if args.gradient_checkpointing:
        rematerialised(unet)
    with run.accelerator.main_process_first():
        unet, _ = conditioned(unet, args, run.accelerator.mixed_precision, run.device)
        distillation = StepDistillation(args, unet, head, scheduler_config, run.device)
    # through every step of the chain, the features of the frozen UNet included
    scheduler.attach(unet.slope_source.differentiable())
    run.learn(head, prepare=False)  # it runs many times a step, inside the UNet
    units = distillation.units()

    def loss(step: int, part: int) -> torch.Tensor:
        steps, kind, chosen = distillation.draw(step, run.total_batch_size)
        noises, pictures = distillation.paths(kind, run.share(chosen, part))
        with run.accelerator.autocast():
            drawn = solve(unet, scheduler, steps, noises)
        # What the tables alone miss is the unit, so that every number of model calls counts the same.
        return relative_error(drawn.float(), pictures).square().mean() / units[steps, kind]

    sizes = f"{head.num_parameters():,} on {unet.num_parameters() - head.num_parameters():,} of the UNet"
    run.fit(loss, f"A head of {sizes}")
    if run.is_main:
        head.eval()
        distillation.keep_what_helps()
        head.save_pretrained(args.output_dir)
        errors = distillation.errors()
        plot_errors(args.table_steps, errors, args.output_dir / "error.png")
        write_card(run, unet, sizes, errors)
    run.end()


def write_card(run: Run, unet, sizes: str, errors: dict[str, list[float]]) -> None:
    args = run.args
    shown = [n for n in (5, 8, 10, 15, 20) if n in args.table_steps] or args.table_steps[:5]
    facts = {
        "Base model": source_of(args.pretrained_model_name_or_path),
        "Parameters": sizes,
        "Tables": f"{args.table_steps}, fitted to {args.fit_trajectories} solutions"
        + (", a third of them guided" if tables_are_guided(args, unet) else ""),
        "Network": f"for {args.head_steps} model calls, {args.max_train_steps:,} steps of {args.train_batch_size} "
        f"paths a process, from {args.train_trajectories:,} solutions of {args.teacher_steps} model calls",
        "Largest guidance scale": f"{args.max_guidance_scale:g}",
    }
    for name, values in errors.items():
        by_steps = dict(zip(args.table_steps, values, strict=True))
        facts[f"Held-out relative error, {name}"] = ", ".join(f"{n}: {by_steps[n]:.4f}" for n in shown)
    run.publish(
        f"A distilled solver for {base_of(args)}, made with genie_diffusers: weights and a small network that land "
        "each step of a short sampling run near the converged solution of the probability-flow ODE."
        + ("" if args.dataset_name else " It was distilled from the denoiser alone, without data."),
        usage=sampling_code(args, unet, 8, clip_sample=False),
        facts=facts,
        pictures={"error.png": "Distance to the converged solution, on noise that nothing was fitted to."},
        unit="1 is the squared error of the tables alone",
    )


if __name__ == "__main__":
    main(parse_args())
