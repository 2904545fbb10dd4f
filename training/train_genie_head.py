"""
Distil the slope of a diffusion model's noise prediction into a small derivative head (GENIE, Dockhorn et al., 2022).

The denoiser is frozen. The target is dε/dλ along the probability-flow ODE: as in the paper, by forward-mode autodiff
over sample and time together, or as the secant over a short piece of the path, which averages out how noisily a
denoiser trained at integer timesteps depends on time. The result is a head: a folder of its own with a card; see
README.md here for examples.
"""

import argparse

import torch
import torch.nn.functional as F

from genie_diffusers import GenieScheduler
from genie_diffusers.learning.arguments import base_of, source_of
from genie_diffusers.learning.conditions import conditioned, load_unet, sampling_code, with_head
from genie_diffusers.learning.derivative_heads import (
    SlopeDistillation,
    check,
    head_of,
    held_out_error,
    parse_args,
    plot_error,
    sample_grid,
    shown_scale,
    streams,
)
from genie_diffusers.learning.run import Run


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    unet = load_unet(args.pretrained_model_name_or_path)
    check(args, unet)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = GenieScheduler.from_config(scheduler_config)
    head = head_of(args, unet, scheduler)
    unet = with_head(unet, head).requires_grad_(False).to(run.device)
    head.requires_grad_(True)
    with run.accelerator.main_process_first():
        unet, latents = conditioned(unet, args, run.accelerator.mixed_precision, run.device, latents=True)
        stream, validation = streams(args, unet, latents)
    distillation = SlopeDistillation(
        unet,
        scheduler.process,
        scheduler.config.prediction_type,
        args.secant_width if args.target == "secant" else None,
        args.max_guidance_scale,
        args.label_dropout,
    )
    run.learn(head)
    batches = run.batches(stream)

    def loss(step: int, part: int) -> torch.Tensor:
        inputs, slope = distillation(next(batches), run.device)
        # Mean squared error in dε/dλ is the paper's, γ²-weighted in dε/dγ = −(1/γ) dε/dλ.
        return F.mse_loss(run.model(**inputs).float(), slope)

    sizes = f"{head.num_parameters():,} on {unet.num_parameters() - head.num_parameters():,} of the UNet"
    run.fit(loss, f"A head of {sizes}, {len(stream.pictures)} pictures")
    if run.is_main:
        head.eval().save_pretrained(args.output_dir)
        error = held_out_error(
            distillation, head, validation, args.validation_samples, args.train_batch_size, run.device
        )
        plot_error(error, scheduler.process, args.output_dir / "error.png")
        grid = sample_grid(unet, scheduler.config, args, run.device)
        grid.save(args.output_dir / "samples.png")
        run.log.image("samples", grid, args.max_train_steps)
        write_card(run, unet, sizes, error, len(stream.pictures))
    run.end()


def write_card(run: Run, unet, sizes: str, error, count: int) -> None:
    args = run.args
    options = {"time_grid": "linear", "analytical_first_step": True, "clip_sample": False}
    run.publish(
        "A derivative head for GENIE (https://huggingface.co/papers/2210.05475), distilled with genie_diffusers: it "
        f"predicts how the noise prediction of the denoiser of {base_of(args)} changes along the sampling path, so "
        "that `GenieScheduler` takes second-order steps at one model call each.",
        usage=sampling_code(args, unet, args.num_inference_steps, **options),
        facts={
            "Base model": source_of(args.pretrained_model_name_or_path),
            "Data": f"{source_of(args.dataset_name)}, {count:,} pictures",
            "Parameters": sizes,
            "Steps": f"{args.max_train_steps:,} of {run.total_batch_size} points",
            "Target": "derivative at the point" if args.target == "jvp" else f"secant over Δλ = {args.secant_width:g}",
            "Largest guidance scale": f"{args.max_guidance_scale:g}",
            "Held-out relative error of dε/dλ": ", ".join(f"{value:.2f}" for value in error)
            + f" (tenths of the timesteps, from clean to noisy; {args.validation_samples} pictures)",
        },
        pictures={
            "samples.png": f"{args.num_inference_steps} model calls at guidance scale {shown_scale(args):g}: with "
            "the head (top), without (bottom).",
            "error.png": "Error of the predicted slope on held-out pictures, by noise level.",
        },
    )


if __name__ == "__main__":
    main(parse_args())
