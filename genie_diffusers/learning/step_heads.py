"""Step heads: tables for few model calls, and the solutions that a network learns what they leave over from."""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from genie_diffusers import GenieScheduler, StepHead
from genie_diffusers.learning.arguments import (
    add_condition_arguments,
    add_dataset_arguments,
    add_training_arguments,
    numbers,
)
from genie_diffusers.learning.conditions import CONDITION_ARGUMENTS, check_guidance, further_channels, takes_text
from genie_diffusers.learning.fitting import TablesAlone, fit_table, without_residuals
from genie_diffusers.learning.paths import (
    Noises,
    Trajectories,
    draw,
    in_batches,
    relative_error,
    solve,
    solver_of,
    teacher_of,
)
from genie_diffusers.learning.run import computed_once

logger = get_logger(__name__)

#: grids among which the tables choose, by the error on trajectories that they were not fitted to
GRIDS = ("uniform_lambda", "quadratic", "linear")
#: one path in so many is guided, where guided ones are learned from
GUIDED_PART = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil the steps of a solver for few model calls.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="The denoiser: Hub id or folder of a pipeline with a `UNet2DModel` or `UNet2DConditionModel` and a "
        "scheduler.",
    )
    parser.add_argument(
        "--table_steps",
        type=numbers,
        default=[*range(1, 21), 25, 30, 40, 50],
        help="Numbers of model calls to fit tables for, such as `5,8,10`. Default: 1 to 20, 25, 30, 40 and 50.",
    )
    parser.add_argument(
        "--head_steps",
        type=numbers,
        default=[4, 5, 6, 8, 10],
        help="Those of them for which the network is trained. It costs as much as its calls there, in training too.",
    )
    parser.add_argument(
        "--head_width", type=int, help="Channels inside the head. Default: half the UNet's, at least 32."
    )
    parser.add_argument("--teacher_steps", type=int, default=100, help="Model calls of a converged solution.")
    parser.add_argument("--fit_trajectories", type=int, default=256, help="Solutions that the tables are fitted to.")
    parser.add_argument("--train_trajectories", type=int, default=1024, help="Solutions that the network learns from.")
    parser.add_argument("--validation_trajectories", type=int, default=64, help="Solutions that errors are stated on.")
    parser.add_argument(
        "--max_guidance_scale",
        type=float,
        default=1.0,
        help="A third of what the network learns from is guided, with scales from 1 to this. For models with classes "
        "or captions.",
    )
    parser.add_argument(
        "--label_dropout",
        type=float,
        default=0.1,
        help="Share of unguided samples of the null class, the last one, or of the empty prompt.",
    )
    parser.add_argument("--solve_batch_size", type=int, default=64, help="Batch size where nothing is trained.")
    parser.add_argument(
        "--captions",
        help="For text-to-image models: a text file with a caption a line, or a data set (Hub id or folder).",
    )
    add_dataset_arguments(
        parser,
        help="For models with pictures on further channels: Hub id or folder of a data set, with captions if the "
        "model takes text.",
    )
    add_condition_arguments(parser)
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Compute every call of the denoiser again in the backward pass: the memory of one call, whatever their "
        "number, for a third more time.",
    )
    add_training_arguments(parser)
    return parser.parse_args(argv)


class StepDistillation:
    """
    The tables of a step head, and the solutions that its network learns from.

    They do not change while it learns: what was computed before a kill is read again.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        unet ([`GenieUNet2DModel`] or `Conditioned`): The denoiser with the head.
        head ([`StepHead`]): Is given its tables.
        scheduler_config (`dict`): Of the denoiser.
        device (`torch.device`): Where the denoiser is.
    """

    def __init__(self, args: argparse.Namespace, unet, head: StepHead, scheduler_config: dict, device: torch.device):
        self.args, self.unet, self.head, self.device = args, unet, head, device
        self.scheduler_config = scheduler_config
        count = args.train_trajectories
        guided = count // GUIDED_PART if args.max_guidance_scale > 1 else 0
        self.noises = {"unguided": draw(unet, count - guided, args.seed + 2, args.label_dropout)}
        if guided:
            self.noises["guided"] = draw(unet, guided, args.seed + 3, 0.0, args.max_guidance_scale)
        self.guided_share = guided / count
        conditions = [name for name in CONDITION_ARGUMENTS if name in args]
        of_tables = ["table_steps", "head_steps", "teacher_steps", "fit_trajectories", "label_dropout"]
        if tables_are_guided(args, unet):
            of_tables.append("max_guidance_scale")
        of_pictures = ["train_trajectories", "teacher_steps", "max_guidance_scale", "label_dropout"]
        tables = computed_once(args, "tables", [*conditions, *of_tables], self._write_tables)
        head.register_to_config(tables=StepHead.load_config(tables)["tables"])
        self.pictures = load_file(
            computed_once(args, "trajectories.safetensors", [*conditions, *of_pictures], self._write_pictures)
        )

    def _write_tables(self, folder: Path) -> None:
        tables = fit_tables(self.unet, self.scheduler_config, self.args, self.device)
        self.head.register_to_config(tables=tables)
        self.head.save_config(folder)

    def _write_pictures(self, path: Path) -> None:
        save_file({kind: self._solutions(noises) for kind, noises in self.noises.items()}, path)

    def _solutions(self, noises: Noises) -> torch.Tensor:
        return drawn_by(
            self.unet, teacher_of(self.scheduler_config), self.args.teacher_steps, noises, self.args, self.device
        )

    def units(self) -> dict[tuple[int, str], float]:
        """The squared error of the tables alone, for each number of model calls and kind of paths."""
        alone, units = solver_of(self.scheduler_config), {}
        alone.attach(TablesAlone(self.head.config.tables))
        for kind, noises in self.noises.items():
            some = slice(0, self.args.fit_trajectories)
            for steps in self.args.head_steps:
                drawn = drawn_by(self.unet, alone, steps, noises[some], self.args, self.device)
                units[steps, kind] = float(relative_error(drawn, self.pictures[kind][some]).square().mean())
        return units

    def draw(self, step: int, count: int) -> tuple[int, str, torch.Tensor]:
        """Model calls, kind and numbers of the paths of a training step, the same in every process."""
        generator = np.random.default_rng([self.args.seed, step])
        chances = 1.0 / np.array(self.args.head_steps)
        steps = int(generator.choice(self.args.head_steps, p=chances / chances.sum()))
        guided = self.guided_share > 0 and generator.random() < self.guided_share
        kind = "guided" if guided else "unguided"
        return steps, kind, torch.from_numpy(generator.choice(len(self.noises[kind]), count))

    def paths(self, kind: str, chosen: torch.Tensor) -> tuple[Noises, torch.Tensor]:
        """Where these paths start and end, on the device."""
        return self.noises[kind][chosen].to(self.device), self.pictures[kind][chosen].to(self.device)

    def keep_what_helps(self) -> None:
        """Leave the network out of the tables that are better alone on fresh noise."""
        keep_what_helps(self.args, self.unet, self.head, self.scheduler_config, self.device)

    def errors(self) -> dict[str, list[float]]:
        """The error for each of `--table_steps` on noise that nothing was fitted to, with the head and without."""
        args = self.args
        noises = table_noises(args, self.unet, args.validation_trajectories, args.seed + 4)
        reference = self._solutions(noises)
        sources = {
            "with the network": self.unet,
            "tables alone": TablesAlone(self.head.config.tables),
            "hermite": None,
        }
        errors = {}
        for name, source in sources.items():
            scheduler = solver_of(self.scheduler_config, time_grid="uniform_lambda")
            scheduler.attach(source)
            drawn = [drawn_by(self.unet, scheduler, steps, noises, args, self.device) for steps in args.table_steps]
            errors[name] = [float(relative_error(pictures, reference).mean()) for pictures in drawn]
        return errors


def tables_are_guided(args: argparse.Namespace, unet) -> bool:
    """Whether tables are fitted to guided paths too: for text-to-image models, always sampled with guidance."""
    return takes_text(unet) and args.max_guidance_scale > 1


def table_noises(args: argparse.Namespace, unet, count: int, seed: int) -> Noises:
    """What tables are fitted to, and they and the network judged on: as many are guided as in training."""
    noises = draw(unet, count, seed, args.label_dropout)
    if not tables_are_guided(args, unet):
        return noises
    guided, is_guided = draw(unet, count, seed, 0.0, args.max_guidance_scale), torch.arange(count) % GUIDED_PART == 0
    assert noises.labels is not None and guided.labels is not None and guided.scales is not None  # those of captions
    labels = torch.where(is_guided, guided.labels, noises.labels)
    return Noises(noises.noise, labels, torch.where(is_guided, guided.scales, 1.0))


def fit_tables(unet, scheduler_config: dict, args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """The best table of each of `--table_steps`, over the grids; the network is called in those of `--head_steps`."""
    noises = table_noises(args, unet, args.fit_trajectories * 5 // 4, args.seed + 1)
    trajectories = Trajectories(
        unet, teacher_of(scheduler_config), args.teacher_steps, noises, args.solve_batch_size, device
    )
    tables = {}
    for steps in tqdm(args.table_steps, desc="Tables"):
        candidates = []
        for grid in GRIDS:
            scheduler = solver_of(scheduler_config, time_grid=grid)
            table, error = fit_table(
                unet, scheduler, steps, noises, trajectories, args.fit_trajectories, args.solve_batch_size, device
            )
            candidates.append((error, grid, table))
        error, grid, table = min(candidates, key=lambda candidate: candidate[0])
        held_out = noises[args.fit_trajectories :]
        drawn = drawn_by(unet, solver_of(scheduler_config, time_grid="uniform_lambda"), steps, held_out, args, device)
        plain = float(relative_error(drawn, trajectories.at(np.inf)[args.fit_trajectories :]).mean())
        logger.info(f"{steps} model calls: relative error {error:.4f} on the grid {grid}, without a table {plain:.4f}")
        if error > plain and steps not in args.head_steps:
            logger.info(f"No table for {steps} model calls: the solver is better without.")
            continue
        if steps not in args.head_steps:
            table = without_residuals(table)
        tables[str(steps)] = table
    return tables


def drawn_by(unet, scheduler: GenieScheduler, steps: int, noises: Noises, args: argparse.Namespace, device):
    """The pictures of all `noises`, on the host."""
    return in_batches(lambda batch: solve(unet, scheduler, steps, batch), noises, args.solve_batch_size, device)


def keep_what_helps(args: argparse.Namespace, unet, head: StepHead, scheduler_config: dict, device) -> None:
    """Leave the network out of the tables that are better alone on fresh noise."""
    noises = table_noises(args, unet, args.validation_trajectories, args.seed + 5)
    reference = drawn_by(unet, teacher_of(scheduler_config), args.teacher_steps, noises, args, device)
    tables = dict(head.config.tables)
    scheduler = solver_of(scheduler_config)
    for steps in args.head_steps:
        errors = []
        for source in (unet, TablesAlone(tables)):
            scheduler.attach(source)
            drawn = drawn_by(unet, scheduler, steps, noises, args, device)
            errors.append(float(relative_error(drawn, reference).mean()))
        if errors[0] >= errors[1]:
            logger.info(f"{steps} model calls: {errors[1]:.4f} without the network, which would have {errors[0]:.4f}")
            tables[str(steps)] = without_residuals(tables[str(steps)])
    head.register_to_config(tables=tables)


def check(args: argparse.Namespace, unet: UNet2DModel) -> None:
    text, purpose = takes_text(unet), further_channels(unet)
    needed = {"captions": text and purpose is None, "dataset_name": purpose is not None}
    for name, is_needed in needed.items():
        value = getattr(args, name)
        if (value is not None) != is_needed:
            raise ValueError(
                f"`--{name}` must {'' if is_needed else 'not '}be given for a `{type(unet).__name__}` of "
                f"{unet.config.in_channels} input and {unet.config.out_channels} output channels, got {value!r}."
            )
    check_guidance(args, unet)
    missing = sorted(set(args.head_steps) - set(args.table_steps))
    if missing:
        raise ValueError(f"`--head_steps` must be among `--table_steps`, which lack {missing}.")
    if min(args.table_steps) < 1 or args.fit_trajectories < 8 or args.validation_trajectories < 1:
        raise ValueError(
            "`--table_steps` must be positive, `--fit_trajectories` at least 8 and `--validation_trajectories` at "
            f"least 1, got {args.table_steps}, {args.fit_trajectories} and {args.validation_trajectories}."
        )


def plot_errors(steps: list[int], errors: dict[str, list[float]], path) -> None:
    """Held-out error against the number of model calls, both logarithmic."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.loglog(steps, values, marker=".", label=name)
    axes.set(xlabel="model calls", ylabel="relative error to the converged solution")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
