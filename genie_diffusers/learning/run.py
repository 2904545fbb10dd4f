"""
One run of a recipe: optimizer, averaged weights, the loop, checkpoints that survive a kill, the curve and the card.

A recipe says what is learned and what the loss is; everything that happens around it is here, once.
"""

import argparse
import csv
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from PIL import Image
from tqdm.auto import tqdm

from genie_diffusers.learning.arguments import hub_id, launch_command, repository_of
from genie_diffusers.learning.data import PositionSampler
from genie_diffusers.model_card import create_model_card

logger = get_logger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what a checkpoint is of, and what its run must have in common with one that goes on from it
STATE_FILE = "training_state.json"
#: what a published folder holds; never the training state, which is pickled
PUBLISHED_FILES = ["README.md", "*.json", "*.safetensors", "*.png"]
#: folder in `--output_dir` for what a run computes before it trains
COMPUTED = "computed"
#: arguments of every recipe that count something
COUNTS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
)


class Run:
    """
    A run of a recipe. In this order: `Run(args)`, [`~Run.learn`], [`~Run.fit`], [`~Run.publish`].

    Args:
        args (`argparse.Namespace`): Those of [`~genie_diffusers.learning.arguments.add_training_arguments`], at least.
        alike (`bool`, defaults to `False`):
            Whether all processes draw the same random numbers from the global generators: for modules that are learned
            without being prepared, and start alike only so.

    Attributes:
        accelerator (`Accelerator`): Of the run.
        first_step (`int`): Steps already done, after `learn`.
        log ([`RunLog`]): The curve, after `learn`.

    Raises:
        ValueError:
            If a number of steps, batches or checkpoints is below 1, the output folder holds checkpoints and the run
            does not resume, there is no complete checkpoint at the path that it resumes from, it belongs to a run with
            another seed or total batch size, whose curve this run would not continue, or has all the steps already.
        ImportError: With `--use_8bit_adam`, if bitsandbytes is not installed.
    """

    def __init__(self, args: argparse.Namespace, alike: bool = False):
        for name in COUNTS:
            count = getattr(args, name)
            if count is not None and count < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {count}.")
        optimizer_class(args)
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        )
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        if not self.accelerator.is_local_main_process:
            datasets.utils.logging.set_verbosity_error()
            datasets.disable_progress_bars()
            diffusers.utils.logging.set_verbosity_error()
        self.checkpoint = self._find_checkpoint()
        args.output_dir.mkdir(parents=True, exist_ok=True)
        set_seed(args.seed, device_specific=not alike)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def total_batch_size(self) -> int:
        """Samples per optimizer step, over all processes and accumulated batches."""
        return self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps

    # What is learned

    def learn(self, *modules: torch.nn.Module, prepare: bool = True, schedule: Callable | None = None) -> None:
        """
        Start or resume learning: the optimizer, its schedule, the averaged weights and the curve.

        Args:
            modules (`torch.nn.Module`): What is learned.
            prepare (`bool`, defaults to `True`):
                Let accelerate prepare the one module, which [`~Run.fit`] then calls once for each batch, as
                [`~Run.model`]. Without it gradients are averaged by hand, for what is called many times a step, inside
                of another module, or in some steps only.
            schedule (`Callable`, *optional*):
                Optimizer → learning rate schedule. Default: the one that `--lr_scheduler` names.
        """
        args, accelerator = self.args, self.accelerator
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        optimizer = adamw(args, self.parameters)
        # The schedule is not prepared: prepared, it would step once for every process.
        self.lr_scheduler = (schedule or self._named_schedule)(optimizer)
        self.model = accelerator.prepare(*modules) if prepare else None
        self.optimizer = accelerator.prepare(optimizer)
        # A table's few numbers are averaged one after the other: in float64 the last bit of published ones follows
        # from it.
        together = self.parameters[0].dtype != torch.float64
        self.ema = EMAModel(self.parameters, decay=args.ema_max_decay, foreach=together)
        accelerator.register_for_checkpointing(*(() if prepare else modules), self.lr_scheduler, self.ema)
        self.first_step = 0
        if self.checkpoint is not None:
            accelerator.load_state(str(self.checkpoint))
            self.first_step = _state_of(self.checkpoint)["step"]
            logger.info(f"Resumed from {self.checkpoint}.")
        self.ema.to(self.device)
        self.log = RunLog(accelerator, args, self.first_step)

    def _named_schedule(self, optimizer: torch.optim.Optimizer):
        return get_scheduler(
            self.args.lr_scheduler,
            optimizer,
            num_warmup_steps=self.args.lr_warmup_steps,
            num_training_steps=self.args.max_train_steps,
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what is learned has its averaged weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    # The loop

    def batches(self, stream: torch.utils.data.Dataset) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches of a stream such as [`TrainingStream`], on the host, from the first step on."""
        loader = torch.utils.data.DataLoader(
            stream,
            batch_sampler=PositionSampler(
                self.first_step * self.total_batch_size,
                self.args.train_batch_size,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
            collate_fn=_as_it_is,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            # Its own, so that starting it does not advance the global generator that dropout draws from.
            generator=torch.Generator(),
        )
        return iter(loader)

    def share(self, chosen: torch.Tensor, part: int) -> torch.Tensor:
        """Of a total batch that all processes have drawn alike, what this process does in accumulated batch `part`."""
        of_all = chosen.chunk(self.args.gradient_accumulation_steps)[part]
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def fit(
        self,
        loss: Callable[[int, int], torch.Tensor],
        what: str,
        *,
        of_all_batches: bool = False,
        every: int | None = None,
        then: Callable[[int], None] | None = None,
    ) -> None:
        """
        Minimise `loss` up to `--max_train_steps`, and leave the averaged weights in what is learned.

        Args:
            loss (`Callable`):
                The numbers of the step, from 1, and of the accumulated batch in it, from 0 → the mean loss of this
                process's batch.
            what (`str`): What is learned and from what, for the log.
            of_all_batches (`bool`, defaults to `False`):
                The loss is that of all batches of the step and all processes together, and depends in each process on
                its own part of them.
            every (`int`, *optional*): Call `then` every so many steps, in the main process.
            then (`Callable`, *optional*): Called with the number of the step.

        Raises:
            FloatingPointError: If the loss or its gradient is not finite. The checkpoints remain.
        """
        args, accelerator = self.args, self.accelerator
        logger.info(
            f"{what}, {self.total_batch_size} samples a step, steps {self.first_step + 1} to {args.max_train_steps}"
        )
        batches = 1 if of_all_batches else args.gradient_accumulation_steps
        if self.model is not None:
            self.model.train()
        progress = tqdm(
            initial=self.first_step,
            total=args.max_train_steps,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        for step in range(self.first_step + 1, args.max_train_steps + 1):
            step_loss: torch.Tensor | float = 0.0
            for part in range(batches):
                with nullcontext() if self.model is None else accelerator.accumulate(self.model):
                    value = loss(step, part)
                    # accelerate divides by the number of accumulated batches, also where there is one for all of them
                    accelerator.backward(value * args.gradient_accumulation_steps if of_all_batches else value)
                step_loss = step_loss + value.detach() / batches
            if self.model is None:
                for parameter in self._stepped():
                    parameter.grad = accelerator.reduce(parameter.grad, reduction="sum" if of_all_batches else "mean")
            clipped = self._stepped() if self.model is None else self.model.parameters()
            norm = accelerator.clip_grad_norm_(clipped, args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            self.lr_scheduler.step()
            self.ema.step(self.parameters)

            mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
            self._check_finite(step, mean_loss, norm)
            self.log.write(step, mean_loss, learning_rate)
            progress.update()
            progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
            if every is not None and then is not None and step % every == 0 and self.is_main:
                then(step)
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                save_checkpoint(accelerator, args, step)
        progress.close()
        self.ema.copy_to(self.parameters)

    def _stepped(self) -> list[torch.nn.Parameter]:
        """What has a gradient in this step."""
        return [parameter for parameter in self.parameters if parameter.grad is not None]

    def _check_finite(self, step: int, loss: float, norm: torch.Tensor | None) -> None:
        # In fp16 gradients overflow at times: such steps are skipped, and the loss scaled less in the next.
        values = {"loss": loss}
        if norm is not None and self.accelerator.scaler is None:
            values["norm of the gradient"] = float(norm)
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The {name} of step {step} is {value}. Lower `--learning_rate`, or `--max_grad_norm`; "
                    f"{_listed_checkpoints(self.args.output_dir)}"
                )

    # Checkpoints

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from, if any."""
        args, found = self.args, complete_checkpoints(self.args.output_dir)
        if args.resume_from_checkpoint is None:
            if found:
                raise ValueError(
                    f"`--output_dir` must hold no checkpoints unless a run is resumed, found {found[-1]}. Pass "
                    "`--resume_from_checkpoint latest`, or another folder."
                )
            return None
        if args.resume_from_checkpoint == "latest":
            if not found:
                logger.info(f"No complete checkpoint in {args.output_dir}: starting from the beginning.")
                return None
            checkpoint = found[-1]
        else:
            checkpoint = Path(args.resume_from_checkpoint)
        if not (CHECKPOINT.fullmatch(checkpoint.name) and (checkpoint / STATE_FILE).is_file()):
            raise ValueError(
                "`--resume_from_checkpoint` must be `latest` or a complete folder `checkpoint-<step>`, got "
                f"{checkpoint}."
            )
        state = _state_of(checkpoint)
        for name, value in _run_facts(self.accelerator, args).items():
            if state[name] != value:
                raise ValueError(
                    f"A resumed run must have the {name} of its checkpoint, which is {state[name]} in {checkpoint}, "
                    f"got {value}."
                )
        # A run that was killed after its last step has still to write its result.
        card, is_own = args.output_dir / "README.md", checkpoint in found
        has_card = card.exists() and card.stat().st_mtime >= (checkpoint / STATE_FILE).stat().st_mtime
        least = state["step"] + (0 if is_own and not has_card else 1)
        if args.max_train_steps < least:
            raise ValueError(
                f"`--max_train_steps` must be above the {state['step']} steps that are done in {checkpoint}, got "
                f"{args.max_train_steps}."
            )
        return checkpoint

    # The result

    def publish(
        self,
        description: str,
        *,
        usage: str,
        facts: dict[str, Any],
        pictures: dict[str, str] | None = None,
        unit: str = "",
        **card,
    ) -> None:
        """
        Write the card of the result in `--output_dir`, with the curve, and publish both if asked.

        Args:
            description (`str`): What the result is.
            usage (`str`): Python code that uses it.
            facts (`dict`): Rows of a table.
            pictures (`dict`, *optional*): Names in the folder → captions, besides the curve.
            unit (`str`): What a loss of 1 is, for caption and table.
            card: Further arguments of [`create_model_card`].
        """
        args = self.args
        note = f"; {unit}" if unit else ""
        final = f"{self.log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run{note})"
        create_model_card(
            repository_of(args),
            description,
            usage=usage,
            facts=facts | {"Final loss": final},
            command=launch_command(),
            pictures=(pictures or {}) | {"loss.png": f"Training loss and its running mean{note}."},
            base_model=hub_id(getattr(args, "pretrained_model_name_or_path", None)),
            dataset=hub_id(getattr(args, "dataset_name", None)),
            **card,
        ).save(args.output_dir / "README.md")
        if args.push_to_hub:
            push_to_hub(args)

    def end(self) -> None:
        self.accelerator.end_training()


def optimizer_class(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or with `--use_8bit_adam` that of bitsandbytes, which may be missing."""
    if not args.use_8bit_adam:
        return torch.optim.AdamW
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`.") from error
    return bitsandbytes.optim.AdamW8bit


def adamw(args: argparse.Namespace, parameters) -> torch.optim.Optimizer:
    """The optimizer that the arguments describe."""
    return optimizer_class(args)(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def _as_it_is(batch):
    return batch


def computed_once(
    args: argparse.Namespace, name: str, depends_on: Iterable[str], compute: Callable[[Path], None]
) -> Path:
    """
    A file or folder that `compute` writes when it is first needed. Later runs read it again.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
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
            before = earlier.get(argument)
            if before != value:
                raise ValueError(
                    f"`--{argument}` must be {before}, with which {path} was computed, got {value}. Pass another "
                    f"`--output_dir`, or delete {path.parent}."
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
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


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
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # resumed from an earlier checkpoint than the last
            discard(final)
        os.replace(partial, final)
        if args.checkpoints_total_limit is not None:
            for checkpoint in complete_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                discard(checkpoint)
    accelerator.wait_for_everyone()


def _run_facts(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, int]:
    total = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    return {"seed": args.seed, "total_batch_size": total}


def _state_of(checkpoint: Path) -> dict[str, int]:
    return json.loads((checkpoint / STATE_FILE).read_text())


def _listed_checkpoints(output_dir: Path) -> str:
    found = [path.name for path in complete_checkpoints(output_dir)]
    return f"{', '.join(found)} in {output_dir} can be gone on from." if found else f"{output_dir} has no checkpoint."


class RunLog:
    """
    The loss of every step, in `loss.csv`, in the tracker and in the progress bar. A resumed run continues the curve.

    Args:
        accelerator (`Accelerator`): Whose tracker is started.
        args (`argparse.Namespace`): The arguments of the recipe.
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

    def note(self, step: int, text: str) -> None:
        """A line in the log of the terminal."""
        logger.info(f"Step {step}: {text}")

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


def push_to_hub(args: argparse.Namespace) -> None:
    """Publish the model in `--output_dir` with its card and pictures; the training state stays where it is."""
    api = HfApi()
    repo_id = api.create_repo(repository_of(args), private=args.hub_private_repo or None, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        allow_patterns=PUBLISHED_FILES,
        ignore_patterns=["*checkpoint*/*", f"{COMPUTED}/*", f"{args.logging_dir}/*"],
        commit_message="End of training",
    )
