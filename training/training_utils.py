"""What the training scripts share: arguments, data as a pure function of position, checkpoints that survive a kill."""

import argparse
import csv
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from huggingface_hub import HfApi
from PIL import Image

logger = get_logger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what a published folder holds; never the training state, which is pickled
PUBLISHED_FILES = ["README.md", "*.json", "*.safetensors", "*.png"]
#: folder in `--output_dir` for what a run computes before it trains
COMPUTED = "computed"


# Arguments


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
            help="Probability of replacing a label by the null class, the last of `num_class_embeds`.",
        )
    add("--dataloader_num_workers", type=int, default=0)


def adamw(args: argparse.Namespace, parameters) -> torch.optim.Optimizer:
    """
    The optimizer that the arguments describe.

    Raises:
        ImportError: With `--use_8bit_adam`, if bitsandbytes is not installed.
    """
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`.") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def launch_command() -> str:
    """The command that runs this script, as a card may quote it: folders of this computer are shown by name only."""

    def publishable(argument: str) -> str:
        return f"path/to/{Path(argument).name}" if Path(argument).is_absolute() else argument

    script = f"{Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"
    return f"accelerate launch {script} " + " ".join(shlex.quote(publishable(a)) for a in sys.argv[1:])


def hub_id(name_or_path: str | None) -> str | None:
    """`name_or_path` if it is a repository on the Hub, None if it is a folder of this computer."""
    return None if name_or_path is None or Path(name_or_path).exists() else name_or_path


# Data


def load_pictures(
    dataset_name: str,
    resolution: int,
    channels: int,
    *,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    A data set of pictures, each cut to its central square and averaged over areas to `resolution`, decoded once.

    Args:
        dataset_name (`str`): Hub id, or a folder that `datasets.load_dataset` can open.
        resolution (`int`): Side of the result in pixels. No picture may be smaller.
        channels (`int`): 1 for grayscale, 3 for RGB.
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        dataset_split (`str`, defaults to `"train"`): Split of the data set.
        image_column (`str`, defaults to `"image"`): Column of pictures.
        label_column (`str`, *optional*): Column of integer labels.
        cache_dir (`str`, *optional*): Folder of the data set cache.

    Returns:
        `datasets.Dataset`: `"pixels"`, the bytes of a (resolution, resolution, channels) array, and `"label"`.

    Raises:
        ValueError:
            If a column is missing or of another type, a picture is too small, or `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 (grayscale) or 3 (RGB), got {channels}.")
    columns = {"image": image_column} | ({"label": label_column} if label_column is not None else {})
    return open_dataset(dataset_name, columns, dataset_config_name, dataset_split, cache_dir).map(
        _to_pixels,
        fn_kwargs={"resolution": resolution, "mode": "RGB" if channels == 3 else "L"},
        remove_columns="image",
        desc=f"Averaging to {resolution}x{resolution}",
    )


def _to_pixels(example: dict, resolution: int, mode: str) -> dict:
    return {"pixels": square(example["image"], resolution, mode).tobytes()}


def open_dataset(
    dataset_name: str,
    columns: dict[str, str],
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    A data set with nothing but the named columns, renamed to what they are for: `"image"`, `"label"` or `"caption"`.

    Raises:
        ValueError: If a column is missing or of another type.
    """
    dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=dataset_split, cache_dir=cache_dir)
    held = {"image": "pictures", "label": "integers", "caption": "text"}
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"`--{role}_column` must be one of the columns {', '.join(dataset.column_names)} of "
                f"{dataset_name}, got {column!r}."
            )
        feature = dataset.features[column]
        kind = str(getattr(feature, "dtype", ""))
        fits = {"image": isinstance(feature, datasets.Image), "label": "int" in kind, "caption": "string" in kind}
        if not fits[role]:
            raise ValueError(f"`--{role}_column` must hold {held[role]}, got {column!r} of type {feature}.")
    return dataset.select_columns(list(columns.values())).rename_columns(
        {column: role for role, column in columns.items()}
    )


def square(image: Image.Image, resolution: int, mode: str) -> Image.Image:
    """The central square, averaged over areas to `resolution`."""
    image = image.convert(mode)
    side = min(image.size)
    if side < resolution:
        raise ValueError(
            f"`--resolution` must not exceed the side of any picture, got {resolution} and a picture of "
            f"{image.width}x{image.height} pixels."
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.BOX, box=box)


def from_pixels(pixels: list[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    """Pictures of `shape`, in channels, height and width, in [−1, 1]."""
    channels, height, width = shape
    values = np.frombuffer(b"".join(pixels), dtype=np.uint8).reshape(-1, height, width, channels)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1.0


def check_labels(labels: list[int], classes: int) -> None:
    if min(labels) < 0 or max(labels) >= classes:
        raise ValueError(
            f"Labels must be between 0 and {classes - 1} for this UNet (`num_class_embeds`, less the null class)"
            f", got {min(labels)} to {max(labels)}."
        )


class TrainingStream(torch.utils.data.Dataset):
    """
    An endless stream of training samples, each a pure function of `seed` and its position in the stream.

    A run that resumes at any position, or is split over any number of processes or workers, therefore sees the same
    pictures in the same order with the same flips, dropped labels, noise and times. Position p is picture p modulo
    the size of the data set, in an order drawn anew every epoch.

    Args:
        pictures (`datasets.Dataset`): From [`load_pictures`].
        image_shape (`tuple[int, int, int]`): Channels, height and width of a picture.
        noise_shape (`tuple[int, int, int]`): Shape of the noise, in channels, height and width.
        seed (`int`): Any non-negative number.
        random_flip (`bool`, defaults to `False`): Flip half of the pictures horizontally.
        label_dropout (`float`, defaults to 0.0): Probability of replacing a label by `null_class`.
        null_class (`int`, *optional*): The class that stands for no class.
    """

    def __init__(
        self,
        pictures: datasets.Dataset,
        image_shape: tuple[int, int, int],
        noise_shape: tuple[int, int, int],
        seed: int,
        random_flip: bool = False,
        label_dropout: float = 0.0,
        null_class: int | None = None,
    ):
        self.pictures, self.image_shape, self.noise_shape, self.seed = pictures, image_shape, noise_shape, seed
        self.random_flip, self.label_dropout, self.null_class = random_flip, label_dropout, null_class
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """
        The samples at `positions`: `"images"` in [−1, 1], standard normal `"noise"`, `"times"` uniform on [0, 1) in
        float64, `"choices"` (two more such numbers, for what a script draws besides) and, if the data set has them,
        `"labels"`.
        """
        images, labels = self._rows([self._picture(position) for position in positions])
        batch = {"images": images, "times": np.empty(len(positions))}
        batch["noise"] = np.empty((len(positions), *self.noise_shape), dtype=np.float32)
        batch["choices"] = np.empty((len(positions), 2))
        if labels is not None:
            batch["labels"] = np.array(labels, dtype=np.int64)
        for i, position in enumerate(positions):
            generator = np.random.default_rng([self.seed, 1, position])
            batch["times"][i], flip, drop = generator.random(3)
            generator.standard_normal(out=batch["noise"][i], dtype=np.float32)
            if self.random_flip and flip < 0.5:
                images[i] = images[i, :, :, ::-1].copy()
            if drop < self.label_dropout:
                batch["labels"][i] = self.null_class
            batch["choices"][i] = generator.random(2)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _rows(self, numbers: list[int]) -> tuple[np.ndarray, list[int] | None]:
        """The pictures with these numbers, and their labels if there are any."""
        rows = self.pictures[numbers]
        return from_pixels(rows["pixels"], self.image_shape), rows.get("label")

    def _picture(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pictures))
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pictures))
            self._epoch, self._order = epoch, order
        return int(self._order[place])


class PositionSampler(torch.utils.data.Sampler):
    """The stream positions of one process's batches from `start` on; all processes together leave no gap."""

    def __init__(self, start: int, batch_size: int, process_index: int, num_processes: int):
        self.first, self.batch_size = start + process_index * batch_size, batch_size
        self.stride = num_processes * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.stride


def training_batches(
    stream: TrainingStream, args: argparse.Namespace, accelerator: Accelerator, first_step: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of `stream`, on the host, from the optimizer step after `first_step` on."""
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=PositionSampler(
            first_step * total_batch_size(args, accelerator),
            args.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        collate_fn=_as_it_is,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # Its own, so that starting it does not advance the global generator that dropout draws from.
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def total_batch_size(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Samples per optimizer step, over all processes and accumulated batches."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


# Runs and their checkpoints


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """
    The `Accelerator` of a training script, its log level, and its output folder.

    Raises:
        ValueError: If the output folder holds checkpoints and the run does not resume: the two would be mixed.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        diffusers.utils.logging.set_verbosity_error()
    found = complete_checkpoints(args.output_dir)
    if found and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`--output_dir` must hold no checkpoints unless a run is resumed, found {found[-1]}. Pass "
            "`--resume_from_checkpoint latest`, or another folder."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return accelerator


def computed_once(
    args: argparse.Namespace, name: str, depends_on: Iterable[str], compute: Callable[[Path], None]
) -> Path:
    """
    A file or folder that `compute` writes when it is first needed. Later runs read it again.

    Args:
        args (`argparse.Namespace`): The arguments of the script.
        name (`str`): Of the file or folder. It has this name only when it is complete.
        depends_on (iterable of `str`): The arguments that it follows from.
        compute (`Callable`): Called with the path to write to.

    Raises:
        ValueError: If it was computed with other arguments.
    """
    path = args.output_dir / COMPUTED / name
    noted, partial = path.with_name(f"{name}.arguments.json"), path.with_name(f"partial-{name}")
    arguments = {argument: str(getattr(args, argument)) for argument in depends_on}
    if path.exists():
        earlier = json.loads(noted.read_text())
        for argument, value in arguments.items():
            if earlier[argument] != value:
                raise ValueError(
                    f"`--{argument}` must be {earlier[argument]}, with which {path} was computed, got {value}. Pass "
                    f"another `--output_dir`, or delete {path.parent}."
                )
        return path
    path.parent.mkdir(exist_ok=True)
    compute(partial)
    noted.write_text(json.dumps(arguments, indent=2) + "\n")
    os.replace(partial, path)
    return path


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest first. A folder has such a name only while it is complete."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """
    Save the training state after `step` steps as `checkpoint-{step}`, then drop the oldest checkpoints.

    The folder is written under another name and renamed when it is complete, and renamed before it is deleted, so that
    a run killed at any moment leaves only complete checkpoints.
    """
    partial, discarded = args.output_dir / "partial-checkpoint", args.output_dir / "discarded-checkpoint"
    final = args.output_dir / f"checkpoint-{step}"

    def discard(checkpoint: Path) -> None:
        shutil.rmtree(discarded, ignore_errors=True)
        os.replace(checkpoint, discarded)
        shutil.rmtree(discarded)

    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        state = {"step": step, **_run_facts(accelerator, args)}
        (partial / "training_state.json").write_text(json.dumps(state, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # resumed from an earlier checkpoint than the last
            discard(final)
        os.replace(partial, final)
        if args.checkpoints_total_limit is not None:
            for checkpoint in complete_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                discard(checkpoint)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """
    Restore the state that `--resume_from_checkpoint` names.

    Returns:
        `int`: Steps already done, 0 for a run that starts from the beginning.

    Raises:
        ValueError:
            If there is no complete checkpoint at the path, or it belongs to a run with another seed or total batch
            size, whose loss curve this run would not continue.
    """
    if args.resume_from_checkpoint is None:
        return 0
    if args.resume_from_checkpoint == "latest":
        found = complete_checkpoints(args.output_dir)
        if not found:
            logger.info(f"No complete checkpoint in {args.output_dir}: starting from the beginning.")
            return 0
        checkpoint = found[-1]
    else:
        checkpoint = Path(args.resume_from_checkpoint)
    if not (CHECKPOINT.fullmatch(checkpoint.name) and (checkpoint / "training_state.json").is_file()):
        raise ValueError(
            f"`--resume_from_checkpoint` must be `latest` or a complete folder `checkpoint-<step>`, got {checkpoint}."
        )
    state = json.loads((checkpoint / "training_state.json").read_text())
    for name, value in _run_facts(accelerator, args).items():
        if state[name] != value:
            raise ValueError(
                f"A resumed run must have the {name} of its checkpoint, which is {state[name]} in {checkpoint}, "
                f"got {value}."
            )
    accelerator.load_state(str(checkpoint))
    logger.info(f"Resumed from {checkpoint}.")
    return state["step"]


def _run_facts(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, int]:
    return {"seed": args.seed, "total_batch_size": total_batch_size(args, accelerator)}


class RunLog:
    """
    The loss of every step, in `loss.csv`, in the tracker and in the progress bar. A resumed run continues the curve.

    Args:
        accelerator (`Accelerator`): Whose tracker is started.
        args (`argparse.Namespace`): The arguments of the script.
        first_step (`int`): Steps already done. What was logged after them, by a run since killed, is dropped.
    """

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace, first_step: int):
        self.accelerator, self.path = accelerator, args.output_dir / "loss.csv"
        accelerator.init_trackers(
            Path(sys.argv[0]).stem,
            config={name: value if value is None else str(value) for name, value in vars(args).items()},
            init_kwargs={"tensorboard": {"purge_step": first_step + 1}},
        )
        if not accelerator.is_main_process:
            return
        kept = [row for row in self.read(self.path) if row[0] <= first_step] if self.path.exists() else []
        rewritten = self.path.with_suffix(".partial")
        with rewritten.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("step", "loss", "learning_rate"), *kept])
        os.replace(rewritten, self.path)
        self.file = self.path.open("a", newline="")

    def write(self, step: int, loss: float, learning_rate: float) -> None:
        self.accelerator.log({"loss": loss, "learning_rate": learning_rate}, step=step)
        if self.accelerator.is_main_process:
            csv.writer(self.file, lineterminator="\n").writerow((step, loss, learning_rate))
            self.file.flush()

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)

    @staticmethod
    def read(path: Path) -> list[tuple[int, float, float]]:
        """The step, loss and learning rate of every complete line."""
        with path.open(newline="") as file:
            lines = file.read().split("\n")[1:-1]
        return [(int(step), float(loss), float(rate)) for step, loss, rate in csv.reader(lines)]

    def plot(self, path: Path) -> float:
        """Draw the curve and its running mean over 1/50 of the run; returns the mean over the last 1/50."""
        import matplotlib.figure

        steps, losses, _ = np.array(self.read(self.path)).T
        window = max(1, len(losses) // 50)
        mean = np.convolve(losses, np.full(window, 1.0 / window), mode="valid")
        figure = matplotlib.figure.Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, linewidth=0.5, alpha=0.3)
        axes.plot(steps[window - 1 :], mean)
        axes.set(xlabel="step", ylabel="loss", ylim=(0.9 * np.quantile(losses, 0.001), np.quantile(losses, 0.999)))
        figure.savefig(path, dpi=120)
        return float(mean[-1])


# Publication


def push_to_hub(args: argparse.Namespace) -> None:
    """Publish the model in `--output_dir` with its card and pictures; the training state stays where it is."""
    api = HfApi()
    repo_id = api.create_repo(
        args.hub_model_id or args.output_dir.name, private=args.hub_private_repo or None, exist_ok=True
    ).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        allow_patterns=PUBLISHED_FILES,
        ignore_patterns=["*checkpoint*/*", f"{COMPUTED}/*", f"{args.logging_dir}/*"],
        commit_message="End of training",
    )
