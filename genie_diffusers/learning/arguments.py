"""The arguments of the recipes, named as in diffusers' own examples, and what cards quote of them."""

import argparse
import shlex
import sys
from pathlib import Path


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every training script, named as in diffusers' own examples."""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Folder for the model, its card, checkpoints and logs.")
    add("--seed", type=int, default=0, help="The data order and every random draw follow from it.")
    add("--train_batch_size", type=int, default=16, help="Batch size per process.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step.")
    add("--max_train_steps", type=int, required=True, help="Optimizer steps in all, those before a resume included.")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate after the warm-up.")
    add("--lr_scheduler", default="cosine", help="Name of a schedule of `diffusers.optimization.get_scheduler`.")
    add("--lr_warmup_steps", type=int, default=500)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--use_8bit_adam", action="store_true", help="Keep the optimizer's state in 8 bits, by bitsandbytes.")
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_max_decay", type=float, default=0.9999, help="Decay of the averaged weights, which are what is saved.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in `accelerate config`.")
    add("--checkpointing_steps", type=int, default=500, help="Save the training state every so many steps.")
    add("--checkpoints_total_limit", type=int, help="Keep only this many checkpoints, the newest.")
    add("--resume_from_checkpoint", help="A checkpoint folder, or `latest` (from the start if there is none yet).")
    add("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="Tracker of the run.")
    add("--logging_dir", default="logs", help="Folder for the tracker, inside `--output_dir`.")
    add("--push_to_hub", action="store_true", help="Publish the model and its card when training ends.")
    add("--hub_model_id", help="Repository on the Hub. Default: the name of `--output_dir`.")
    add("--hub_private_repo", action="store_true")


def add_dataset_arguments(parser: argparse.ArgumentParser, **of_name) -> None:
    """Which pictures: the arguments of [`open_dataset`] and the side of a picture; `of_name` describes the first."""
    add = parser.add_argument
    add("--dataset_name", **of_name)
    add("--dataset_config_name")
    add("--dataset_split", default="train")
    add("--image_column", default="image")
    add("--cache_dir", help="Folder of the data set cache. Default: that of `datasets`.")
    add("--resolution", type=int, help="Side of a picture in pixels. Default: that of the model's `sample_size`.")


def add_data_arguments(parser: argparse.ArgumentParser, label_dropout: bool = True) -> None:
    """The arguments of [`load_pictures`] and of the augmentation; `label_dropout` where there may be a null class."""
    add_dataset_arguments(parser, required=True, help="Hub id, or a folder that `datasets.load_dataset` can open.")
    add = parser.add_argument
    add("--label_column", default="label", help="Used by class-conditional models only.")
    add("--random_flip", action="store_true", help="Flip half of the pictures horizontally.")
    if label_dropout:
        add(
            "--label_dropout",
            type=float,
            default=0.0,
            help="Probability of replacing a label by the null class: the last of a UNet, one more of a transformer.",
        )
    add("--dataloader_num_workers", type=int, default=0)


def numbers(text: str) -> list[int]:
    """`"5,10"` → `[5, 10]`, in order and each once."""
    return sorted({int(number) for number in text.split(",")})


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of [`conditioned`] beside those of a data set."""
    add = parser.add_argument
    add("--caption_column", default="text", help="Column of captions of a data set, for text-to-image models.")
    add("--max_captions", type=int, default=1000, help="Use the first of them, with their pictures.")
    add(
        "--low_resolution",
        type=int,
        help="For a `UNet2DModel` with a low-resolution picture on further channels: its side before it is enlarged.",
    )
    add(
        "--max_noise_level",
        type=int,
        default=40,
        help="For text-to-image upscalers: noise is added to low-resolution pictures, with levels from 0 to this.",
    )


# What a card quotes


def launch_command() -> str:
    """The command that runs this script, as a card may quote it: folders of this computer are shown by name only."""

    def publishable(argument: str) -> str:
        return f"path/to/{Path(argument).name}" if Path(argument).is_absolute() else argument

    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("genie_diffusers."):  # `accelerate launch -m`, from a wheel
        script = f"-m {spec.name}"
    else:
        script = f"{Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"
    return f"accelerate launch {script} " + " ".join(shlex.quote(publishable(a)) for a in sys.argv[1:])


def hub_id(name_or_path: str | None) -> str | None:
    """`name_or_path` if it is a repository on the Hub, None if it is a folder of this computer."""
    return None if name_or_path is None or Path(name_or_path).exists() else name_or_path


def source_of(name_or_path: str | None) -> str:
    """What a table says of a model or a data set."""
    return hub_id(name_or_path) or "a local folder"


def base_of(args: argparse.Namespace) -> str:
    """What code says of the base model."""
    return hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"


def repository_of(args: argparse.Namespace) -> str:
    """The name of the result on the Hub."""
    return args.hub_model_id or args.output_dir.name
