"""
Train a small classifier, on whose features the quality of samples is measured.

The result is a folder with the model and a card; see README.md here for examples. A run that is killed at any moment
goes on from its last checkpoint with the loss curve it would have had.
"""

import argparse

import datasets
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from genie_diffusers import ImageClassifier
from genie_diffusers.metrics import ReferenceFeatures
from genie_diffusers.model_card import create_model_card
from training_utils import (
    RunLog,
    TrainingStream,
    adamw,
    add_data_arguments,
    add_training_arguments,
    from_pixels,
    hub_id,
    launch_command,
    load_checkpoint,
    load_pictures,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
    training_batches,
)

logger = get_logger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a classifier of pictures.")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 128], help="As in the model.")
    parser.add_argument("--layers_per_block", type=int, default=2, help="As in the model.")
    parser.add_argument("--label_smoothing", type=float, default=0.1, help="Share of the target spread over classes.")
    parser.add_argument(
        "--crop_padding", type=int, default=2, help="Shift pictures at random by up to so many pixels."
    )
    parser.add_argument("--test_split", default="test", help="Split that the accuracy is measured on.")
    add_data_arguments(parser, label_dropout=False)
    add_training_arguments(parser)
    parser.set_defaults(resolution=32)
    return parser.parse_args(argv)


def random_crop(images: torch.Tensor, padding: int, choices: torch.Tensor) -> torch.Tensor:
    """
    Pictures shifted by up to `padding` pixels, with what comes in from outside mirrored at the edge.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): Pictures.
        padding (`int`): Largest shift.
        choices (`torch.Tensor` of shape `(batch, 2)`): Uniform on [0, 1): where in the range of shifts.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4, mode="reflect")
    corners = (choices * (2 * padding + 1)).long().tolist()
    return torch.stack(
        [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, corners, strict=True)]
    )


@torch.no_grad()
def picture_features(model: ImageClassifier, pictures: datasets.Dataset, batch_size: int = 500) -> torch.Tensor:
    """Features of all `pictures`."""
    size, channels = model.config.sample_size, model.config.in_channels
    features = []
    for batch in pictures.iter(batch_size):
        images = torch.from_numpy(from_pixels(batch["pixels"], (channels, size, size)))
        features.append(model.features(images.to(model.device)).cpu())
    return torch.cat(features)


def write_card(args: argparse.Namespace, facts: dict) -> None:
    repository = args.hub_model_id or args.output_dir.name
    card = create_model_card(
        repository,
        "A small classifier trained with genie_diffusers. The distance of generated from real pictures is measured on "
        "its features: numbers that compare samplers of one model, and that nothing measured on another network "
        "compares to.",
        usage=(
            "from genie_diffusers import ImageClassifier\n\n"
            f'classifier = ImageClassifier.from_pretrained("{repository}")\n'
            "features = classifier.features(images)  # pictures in [-1, 1]"
        ),
        facts=facts,
        command=launch_command(),
        pictures={"loss.png": "Training loss and its running mean."},
        dataset=hub_id(args.dataset_name),
        pipeline_tag="image-classification",
    )
    card.save(args.output_dir / "README.md")


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed, device_specific=True)
    data = {"dataset_config_name": args.dataset_config_name, "image_column": args.image_column}
    data |= {"label_column": args.label_column, "cache_dir": args.cache_dir}
    with accelerator.main_process_first():
        pictures, test_pictures = (
            load_pictures(args.dataset_name, args.resolution, 3, dataset_split=split, **data)
            for split in (args.dataset_split, args.test_split)
        )
    model = ImageClassifier(
        sample_size=args.resolution,
        num_classes=max(pictures.unique("label")) + 1,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
    )
    shape = (model.config.in_channels, args.resolution, args.resolution)
    stream = TrainingStream(pictures, shape, (0, 0, 0), args.seed, args.random_flip)

    optimizer = adamw(args, model.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=args.ema_max_decay, foreach=True)
    # The schedule is not prepared: prepared, it would step once for every process.
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(accelerator.device)
    log = RunLog(accelerator, args, first_step)

    logger.info(
        f"{len(pictures)} pictures of {args.resolution}x{args.resolution}, {model.num_parameters():,} parameters, "
        f"{total_batch_size(args, accelerator)} pictures a step, steps {first_step + 1} to {args.max_train_steps}"
    )
    batches = training_batches(stream, args, accelerator, first_step)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    prepared.train()
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            images = random_crop(batch["images"], args.crop_padding, batch["choices"]).to(accelerator.device)
            labels = batch["labels"].to(accelerator.device)
            with accelerator.accumulate(prepared):
                logits = prepared(images).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / args.gradient_accumulation_steps
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema.step(model.parameters())

        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        log.write(step, mean_loss, learning_rate)
        progress.update()
        progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        ema.copy_to(model.parameters())
        # The features are those of the saved, rounded weights.
        model.eval().half().save_pretrained(args.output_dir)
        model.float()
        features, test_features = (picture_features(model, split) for split in (pictures, test_pictures))
        mean, covariance = features.double().mean(dim=0), features.double().T.cov()
        ReferenceFeatures(mean, covariance, test_features).save_pretrained(args.output_dir)
        predictions = model.cpu().classifier(test_features).argmax(dim=1)
        accuracy = (predictions == torch.tensor(test_pictures["label"])).double().mean()
        facts = {
            "Data": f"{hub_id(args.dataset_name) or 'a local folder'}, {len(pictures):,} pictures",
            "Resolution": f"{args.resolution}x{args.resolution}, averaged over areas",
            "Parameters": f"{model.num_parameters():,}",
            "Classes": f"{model.config.num_classes}",
            "Features": f"{args.block_out_channels[-1]}",
            "Steps": f"{args.max_train_steps:,} of {total_batch_size(args, accelerator)} pictures",
            "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run)",
            "Accuracy": f"{accuracy:.2%} of the {len(test_pictures):,} pictures of the test split",
        }
        write_card(args, facts)
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
