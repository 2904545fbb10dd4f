"""
Learn how to encode: the rows of a `GenieInverseScheduler` that its decoder best finds back to the pictures from.

What is off after a round trip is not the error of encoder and decoder, but what the one does that the other does not
undo. Here the weights of the encoder, some hundred numbers, are moved down the gradient of the round trip's error on
real pictures, through encoder, decoder and the frozen denoiser. The decoder is a plain `GenieScheduler`. The result is
a folder with `scheduler_config.json` and a card; see README.md here.
"""

import argparse

import torch

from genie_diffusers import GenieInverseScheduler, GenieUNet2DModel
from genie_diffusers.learning.arguments import base_of, repository_of, source_of
from genie_diffusers.learning.data import pictures_of
from genie_diffusers.learning.encoders import RoundTrips, check, encoder_of, parse_args, streams
from genie_diffusers.learning.run import Run


def main(args: argparse.Namespace) -> None:
    run = Run(args, alike=True)
    name = args.pretrained_model_name_or_path
    unet = GenieUNet2DModel.from_pretrained(name, subfolder="unet").float().eval().requires_grad_(False).to(run.device)
    check(args, unet)
    encoder = encoder_of(args)
    with run.accelerator.main_process_first():
        size, channels = unet.config.sample_size, unet.config.in_channels
        pictures = pictures_of(args, size, channels, labelled=unet.config.num_class_embeds is not None)
    training, held_out = streams(args, unet, pictures)
    trips = RoundTrips(args, unet, encoder, held_out)
    before = trips.start()
    run.learn(*trips.tables, prepare=False)  # of which one is used in each step, and called many times
    batches = run.batches(training)

    def loss(step: int, part: int) -> torch.Tensor:
        steps = args.num_inference_steps[step % len(before)]
        with run.accelerator.autocast():
            errors = trips.errors(steps, next(batches))
        # Errors differ much between pictures, and their squares would leave the few worst to count; the unit is
        # that of the start, so that every number of model calls counts the same.
        return errors.sqrt().mean() / before[steps]

    run.fit(loss, f"{sum(parameter.numel() for parameter in run.parameters)} numbers, {len(pictures)} pictures")
    if run.is_main:
        after = trips.worths()
        # What learning has not made better stays as it was.
        encoding = (encoder.config.tables or {}) | {
            str(steps): trips[steps].rows() for steps in before if after[steps] < before[steps]
        }
        GenieInverseScheduler.from_config(encoder.config, tables=encoding).save_pretrained(args.output_dir)
        write_card(run, encoding, before, after)
    run.end()


def write_card(run: Run, encoding: dict, before: dict[int, float], after: dict[int, float]) -> None:
    args, base = run.args, base_of(run.args)
    facts = {
        "Base model": source_of(args.pretrained_model_name_or_path),
        "Data": source_of(args.dataset_name),
        "Model calls": ", ".join(encoding) or "none: nothing was learned",
        "Training": f"{args.max_train_steps:,} steps of {args.train_batch_size} × {args.gradient_accumulation_steps} "
        "pictures a process",
    }
    for name, errors in {"solver" if args.origin is None else "origin": before, "learned": after}.items():
        facts[f"Held-out relative error of the round trip, {name}"] = ", ".join(
            f"{steps}: {error:.5f}" for steps, error in errors.items()
        )
    run.publish(
        f"Weights that encode pictures with {base}, made with genie_diffusers, learned by the error of the round trip "
        "to noise and back. They are a table of numbers in `scheduler_config.json`; the model stays as it is.",
        usage=(
            "from genie_diffusers import GenieInverseScheduler, GeniePipeline, GenieScheduler\n\n"
            f'pipe = GeniePipeline.from_pretrained("{base}")\n'
            f'pipe.scheduler = GenieInverseScheduler.from_pretrained("{repository_of(args)}")\n'
            "pipe.scheduler.attach(None)  # these rows are for a sampler without a head\n"
            f'noise = pipe(latents=pictures, num_inference_steps={min(after)}, output_type="latent").images\n'
            "pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)\n"
            "pipe.scheduler.attach(None)\n"
            f"again = pipe(latents=noise, num_inference_steps={min(after)}).images"
        ),
        facts=facts,
        unit="1 is where learning starts",
    )


if __name__ == "__main__":
    main(parse_args())
