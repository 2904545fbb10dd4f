"""
Train a pixel-space diffusion or flow-matching model from a data set of pictures, class-conditional if the model is.

The loss is the squared error of what the model predicts at timesteps that the process draws. The result is a pipeline
folder with a card; see README.md here for examples. A run that is killed at any moment goes on from its last
checkpoint with the loss curve it would have had, and the curve does not depend on the number of processes that share a
batch.
"""

import argparse

import torch
import torch.nn.functional as F

from genie_diffusers.learning.arguments import repository_of, source_of
from genie_diffusers.learning.data import TrainingStream, check_labels, pictures_of
from genie_diffusers.learning.diffusions import PROCESSES, load_model, num_classes, parse_args, sample_grid
from genie_diffusers.learning.run import Run


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    model, schedule = load_model(args)
    diffusion = PROCESSES[args.process](schedule)
    classes = num_classes(model, args.label_dropout)
    resolution, in_channels = model.config.sample_size, model.config.in_channels
    image_channels = diffusion.image_channels(in_channels)
    with run.accelerator.main_process_first():
        pictures = pictures_of(args, resolution, image_channels, labelled=classes is not None)
    if classes is not None:
        check_labels(pictures.unique("label"), classes)
    stream = TrainingStream(
        pictures,
        (image_channels, resolution, resolution),
        (in_channels, resolution, resolution),
        args.seed,
        args.random_flip,
        args.label_dropout,
        null_class=classes,
    )
    run.learn(model)
    batches = run.batches(stream)

    def loss(step: int, part: int) -> torch.Tensor:
        batch = next(batches)
        # The timesteps stay on the host until the model needs them: their coefficients are computed there.
        timesteps = diffusion.timesteps(batch["times"])
        images, noise = (batch[name].to(run.device, non_blocking=True) for name in ("images", "noise"))
        labels = None if classes is None else batch["labels"].to(run.device, non_blocking=True)
        noisy, target = diffusion.add_noise(images, noise, timesteps), diffusion.target(images, noise, timesteps)
        prediction = run.model(noisy, timesteps.to(run.device), class_labels=labels).sample
        return F.mse_loss(prediction.float(), target)

    def show(step: int) -> None:
        with run.averaged():
            run.log.image("samples", sample_grid(diffusion, model, classes, args), step)

    what = f"{model.num_parameters():,} parameters, {len(pictures)} pictures of {resolution}x{resolution}"
    run.fit(loss, what, every=args.sample_steps, then=show)
    if run.is_main:
        diffusion.pipeline(model).save_pretrained(args.output_dir)
        grid = sample_grid(diffusion, model, classes, args)
        grid.save(args.output_dir / "samples.png")
        run.log.image("samples", grid, args.max_train_steps)
        write_card(run, diffusion, model, classes, len(pictures))
    run.end()


def write_card(run: Run, diffusion, model, classes: int | None, count: int) -> None:
    args, pipeline = run.args, type(diffusion.pipeline(model)).__name__
    call = "pipeline(batch_size=4, " if classes is None else "pipeline(class_labels=[0, 1, 2, 3], "
    run.publish(
        f"{'An unconditional' if classes is None else 'A class-conditional'} pixel-space diffusion model trained with "
        f"genie_diffusers. {diffusion.summary}",
        usage=(
            f"from genie_diffusers import {pipeline}\n\n"
            f'pipeline = {pipeline}.from_pretrained("{repository_of(args)}")\n'
            f'images = {call}num_inference_steps=20).images\nimages[0].save("sample.png")'
        ),
        facts={
            "Data": f"{source_of(args.dataset_name)}, {count:,} pictures",
            "Resolution": f"{model.config.sample_size}x{model.config.sample_size}, averaged over areas",
            "Parameters": f"{model.num_parameters():,}",
            "Classes": "none" if classes is None else f"{classes}",
            "Null class": f"{classes}" if args.label_dropout > 0 else "none",
            "Prediction type": diffusion.prediction_type,
            "Steps": f"{args.max_train_steps:,} of {run.total_batch_size} pictures",
        },
        pictures={"samples.png": "Samples of the averaged weights."},
    )


if __name__ == "__main__":
    main(parse_args())
