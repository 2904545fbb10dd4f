"""Samplers for few model calls that are learned through the chain of their steps: objectives and origins."""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from genie_diffusers import GDDIMScheduler, GenieUNet2DModel, GGDMScheduler, Table
from genie_diffusers.learning.arguments import add_dataset_arguments, add_training_arguments, numbers
from genie_diffusers.learning.data import pictures_of
from genie_diffusers.learning.features import feature_network, features_of, features_of_data, has_reference
from genie_diffusers.learning.fitting import fit_table, without_residuals
from genie_diffusers.learning.paths import (
    Noises,
    Trajectories,
    in_batches,
    labelled,
    relative_error,
    solve,
    solver_of,
    teacher_of,
)
from genie_diffusers.learning.run import computed_once
from genie_diffusers.learning.tables import (
    FAMILY,
    LearnedTable,
    MarginalTable,
    learned_scheduler,
    mean_products,
    sample_by,
)
from genie_diffusers.metrics import PACKAGED_CLASSIFIER, KernelDistance, ReferenceFeatures

logger = get_logger(__name__)

ORIGINS = ("ddim", "deis", "genie", "least_squares")
#: arguments that paths of the ODE follow from, and those of which the tables are that learning starts from
OF_PATHS = (
    "pretrained_model_name_or_path",
    "num_inference_steps",
    "teacher_steps",
    "guidance_scale",
    "null_class",
    "seed",
)
OF_ORIGIN = ("origin", "time_grid", "eta", "fit_trajectories")
#: what random numbers are drawn for
TRAINING, VALIDATION, REPORT, SOLUTIONS, FIT = range(5)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn a sampler by differentiating through it.")
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="The denoiser: Hub id or folder of a pipeline with a `UNet2DModel` and a scheduler.",
    )
    add("--num_inference_steps", type=numbers, default=[5, 10], help="Numbers of model calls, such as `5,10`.")
    add(
        "--origin",
        default="least_squares",
        help="Where learning starts: `ddim`, `deis`, `genie`, `least_squares` (rows fitted to converged solutions one "
        "after the other), or the folder of an earlier result, whose other tables are kept.",
    )
    add("--time_grid", default="uniform_lambda", help="Timesteps of `--origin`.")
    add("--eta", type=float, default=0.0, help="Of `--origin ddim`; 1 is DDPM.")
    add("--objective", choices=["kernel", "trajectory"], default="trajectory", help="What is minimised.")
    add(
        "--family",
        type=lambda text: text.split(","),
        default=["states", "history", "time"],
        help=f"What is free besides the weights of the latest state and prediction, of {','.join(FAMILY)}.",
    )
    add("--keep_marginals", action="store_true", help="Keep the marginals q(x_k|x_0), for `--origin ddim`.")
    add("--derivative_head", help="Folder or Hub id of a `DerivativeHead`, for `slope` in the family.")
    add(
        "--feature_network",
        default=PACKAGED_CLASSIFIER,
        help="Folder or Hub id of an `ImageClassifier`, `package.module:Class`, or `inception`.",
    )
    add("--kernel_degree", type=int, choices=[1, 3], default=3, help="1 is the linear kernel, 3 the cubic one of KID.")
    add("--reference_pictures", type=int, default=10_000, help="Real pictures whose features are matched, at most.")
    add(
        "--trajectory_distance",
        choices=["l2", "features"],
        default="l2",
        help="Relative L2 distance of pictures, or of their features.",
    )
    add("--train_trajectories", type=int, default=1024, help="Solutions for `--objective trajectory`.")
    add("--fit_trajectories", type=int, default=256, help="Solutions for `--origin least_squares`.")
    add("--teacher_steps", type=int, default=100, help="Model calls of a converged solution.")
    add(
        "--guidance_scale", type=float, default=1.0, help="Classifier-free guidance; the last class is the null class."
    )
    add("--null_class", action="store_true", help="The last class is a null class, also without guidance.")
    add("--no_rematerialisation", action="store_true", help="Keep all calls of the denoiser for the backward pass.")
    add("--validation_samples", type=int, default=512, help="Pictures from held-out noise.")
    add("--validation_steps", type=int, default=50, help="Validate and log the tables every so many steps.")
    add("--solve_batch_size", type=int, default=64, help="Batch size where nothing is learned.")
    add_dataset_arguments(parser, help="Real pictures, if the feature network does not bring features of some.")
    add_training_arguments(parser)
    parser.set_defaults(
        train_batch_size=64, learning_rate=3e-3, lr_warmup_steps=10, adam_weight_decay=0.0, ema_max_decay=0.98
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace, unet: UNet2DModel) -> None:
    unknown = sorted(set(args.family) - set(FAMILY) - {""})
    if unknown:
        raise ValueError(f"`--family` must be of {', '.join(FAMILY)}, got {', '.join(unknown)}.")
    if args.origin not in ORIGINS and not Path(args.origin).is_dir():
        raise ValueError(f"`--origin` must be one of {', '.join(ORIGINS)} or a folder, got {args.origin!r}.")
    if "pred" in args.family and not args.keep_marginals:
        raise ValueError("`pred` is in every `--family` but with `--keep_marginals`; leave it out.")
    if args.keep_marginals and {"history", "slope"} & set(args.family):
        raise ValueError("`--keep_marginals` needs a `--family` without `history` and `slope`.")
    if ("slope" in args.family) != (args.derivative_head is not None):
        raise ValueError("`slope` in `--family` and `--derivative_head` go together.")
    if args.objective == "trajectory" and ("noise" in args.family or args.eta > 0):
        raise ValueError("`--objective trajectory` needs a deterministic sampler: no `noise`, `--eta 0`.")
    if args.guidance_scale != 1.0 and unet.config.num_class_embeds is None:
        raise ValueError(f"`--guidance_scale` must be 1 for a model without classes, got {args.guidance_scale}.")
    if args.validation_samples < 2 or min(args.num_inference_steps) < 1:
        raise ValueError(
            "`--validation_samples` must be at least 2 and `--num_inference_steps` positive, got "
            f"{args.validation_samples} and {args.num_inference_steps}."
        )


def load_denoiser(args: argparse.Namespace) -> GenieUNet2DModel:
    """The frozen denoiser, with `--derivative_head` if there is one."""
    unet = GenieUNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet").float().eval()
    check(args, unet)
    if args.derivative_head is not None:
        unet = GenieUNet2DModel.from_unet(unet, args.derivative_head)
    return unet.requires_grad_(False)


def draw(
    unet: UNet2DModel, count: int, steps: int, args: argparse.Namespace, *key: int
) -> tuple[Noises, torch.Tensor]:
    """Noises of `count` paths, and what `steps` steps may add to them; a pure function of the seed and `key`."""
    seed = np.random.SeedSequence([args.seed, *key]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    generator = torch.Generator().manual_seed(int(seed))
    size, null_class = unet.config.sample_size, args.null_class or args.guidance_scale != 1.0
    noise, *fresh = torch.randn((1 + steps, count, unet.config.in_channels, size, size), generator=generator)
    noises = labelled(noise, unet, generator, null_class=null_class).at_scale(args.guidance_scale)
    return noises, torch.stack(fresh) if fresh else noise[None, :0]


class Objective:
    """
    What a batch of pictures is worth, from one row of numbers for each of them.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        unet ([`UNet2DModel`]): The denoiser, whose size the pictures have.
        device (`torch.device`): Where the network of the features is to run.
    """

    def __init__(self, args: argparse.Namespace, unet: UNet2DModel, device: torch.device):
        self.is_kernel, self.network = args.objective == "kernel", None
        if self.is_kernel or args.trajectory_distance == "features":
            self.network = feature_network(args.feature_network, device)
        if self.is_kernel:
            reference = real_features(args, unet, self.network, device)
            self.distance = KernelDistance(reference.to(device), args.kernel_degree)
        self.name = f"{'cubic' if args.kernel_degree == 3 else 'linear'} kernel distance"
        if not self.is_kernel:
            self.name = "squared relative error" + (" of features" if self.network else "")

    def of_each(self, pictures: torch.Tensor, solutions: torch.Tensor | None) -> torch.Tensor:
        """Features of the pictures, or their squared relative errors."""
        if self.network is not None:
            pictures = features_of(self.network, pictures)
        if solutions is None:
            return pictures
        if self.network is not None:
            solutions = features_of(self.network, solutions)
        return relative_error(pictures.float(), solutions).square()

    def of_all(self, rows: torch.Tensor) -> torch.Tensor:
        return self.distance(rows) if self.is_kernel else rows.mean()


def real_features(args: argparse.Namespace, unet: UNet2DModel, network, device) -> torch.Tensor:
    """Those of `--dataset_name`, or without one those in the folder of the classifier."""
    if args.dataset_name is None:
        if not has_reference(args.feature_network):
            raise ValueError(
                "`--dataset_name` must name real pictures, which this `--feature_network` does not bring."
            )
        reference = ReferenceFeatures.from_pretrained(args.feature_network)
        return reference.features[: args.reference_pictures].float()
    size, channels = args.resolution or unet.config.sample_size, unet.config.in_channels
    pictures = pictures_of(args, size, channels, labelled=False).shuffle(seed=args.seed)
    pictures = pictures.select(range(min(args.reference_pictures, len(pictures))))
    return features_of_data(network, pictures, size, channels, device, args.solve_batch_size)


def origin_tables(args: argparse.Namespace, unet, scheduler_config: dict, device: torch.device) -> dict[str, dict]:
    """The tables that learning starts from, for each number of model calls."""
    counts = args.num_inference_steps
    solver = solver_of(scheduler_config, time_grid=args.time_grid)
    if args.origin == "ddim":
        return GGDMScheduler.from_ddim(solver, counts, args.eta).config.tables
    if args.origin == "genie":
        return GGDMScheduler.from_scheduler(solver, counts).config.tables
    if args.origin == "deis":
        deis = GDDIMScheduler.from_config(solver.config, multistep_order=3)
        return GGDMScheduler.from_scheduler(deis, counts).config.tables
    if args.origin != "least_squares":
        return GGDMScheduler.load_config(args.origin)["tables"]
    noises, _ = draw(unet, args.fit_trajectories * 5 // 4, 0, args, FIT)
    teacher, batch_size = teacher_of(scheduler_config), args.solve_batch_size
    trajectories = Trajectories(unet, teacher, args.teacher_steps, noises, batch_size, device)
    tables = {}
    for steps in counts:
        fitted, error = fit_table(unet, solver, steps, noises, trajectories, args.fit_trajectories, batch_size, device)
        logger.info(f"{steps} model calls: relative error {error:.4f} by least squares")
        tables[str(steps)] = without_residuals(fitted)
    return tables


class SamplerLearning:
    """
    Where learning starts, and the noises and solutions that it learns from.

    They do not change while it learns: what was computed before a kill is read again.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        sampler ([`Sampler`]): Runs the chain.
        scheduler_config (`dict`): Of the denoiser.

    Raises:
        ValueError: If the origin has no table for some number of model calls, or is not for the objective.
    """

    def __init__(self, args: argparse.Namespace, sampler: "Sampler", scheduler_config: dict):
        self.args, self.sampler, self.scheduler_config = args, sampler, scheduler_config
        self.by_trajectory = args.objective == "trajectory"
        unet, longest = sampler.unet, max(args.num_inference_steps)
        self.validation = draw(unet, args.validation_samples, longest, args, VALIDATION)
        self.unseen = draw(unet, args.validation_samples, longest, args, REPORT)
        folder = computed_once(args, "origin", [*OF_PATHS, *OF_ORIGIN], self._write_origin)
        self.origin: dict[str, dict] = GGDMScheduler.load_config(folder)["tables"]
        self.solutions: dict[str, torch.Tensor] = {}
        if self.by_trajectory:
            self.training = draw(unet, args.train_trajectories, 0, args, SOLUTIONS)[0]
            depends_on = [*OF_PATHS, "train_trajectories", "validation_samples"]
            path = computed_once(args, "trajectories.safetensors", depends_on, self._write_solutions)
            self.solutions = load_file(path)
        missing = [steps for steps in args.num_inference_steps if str(steps) not in self.origin]
        if missing:
            raise ValueError(
                f"`--num_inference_steps` must be among those of `--origin`, {', '.join(self.origin)}, got {missing} "
                "too."
            )
        kind = MarginalTable if args.keep_marginals else LearnedTable
        self.tables = {
            steps: kind(self.origin[str(steps)], sampler.process, args.family).to(sampler.device)
            for steps in args.num_inference_steps
        }
        if self.by_trajectory and any(table.is_stochastic for table in self.tables.values()):
            raise ValueError("`--objective trajectory` needs a deterministic `--origin`.")

    def _write_origin(self, folder: Path) -> None:
        tables = origin_tables(self.args, self.sampler.unet, self.scheduler_config, self.sampler.device)
        learned_scheduler(self.scheduler_config, tables).save_pretrained(folder)

    def _write_solutions(self, path: Path) -> None:
        teacher, unet = teacher_of(self.scheduler_config), self.sampler.unet

        def solution(batch: Noises) -> torch.Tensor:
            return solve(unet, teacher, self.args.teacher_steps, batch)

        starts = {"training": self.training, "validation": self.validation[0], "report": self.unseen[0]}
        save_file(
            {
                name: in_batches(solution, noises, self.args.solve_batch_size, self.sampler.device)
                for name, noises in starts.items()
            },
            path,
        )

    def start(self, objective: "Objective") -> dict[int, float]:
        """Choose the coordinates of the tables, alike in all processes; returns what the origins are worth."""
        units = {}
        for steps, table in self.tables.items():
            self.sampler.whiten(table, self.validation)
            for buffer in table.buffers():
                buffer.copy_(broadcast(buffer))
            units[steps] = abs(self.sampler.worth(table, objective, self.validation, self.solutions.get("validation")))
        return units

    def draw(self, step: int, steps: int, count: int) -> tuple[Noises, torch.Tensor | None, torch.Tensor | None]:
        """Noises, what the steps add to them and solutions of a training step, the same in every process."""
        if not self.by_trajectory:
            return *draw(self.sampler.unet, count, steps, self.args, TRAINING, step), None
        chosen = np.random.default_rng([self.args.seed, TRAINING, step]).choice(len(self.training), count)
        return self.training[torch.from_numpy(chosen)], None, self.solutions["training"][chosen]

    def validate(self, objective: "Objective", step: int, units: dict[int, float]) -> dict[str, float]:
        """What the tables are worth on held-out noise, and the tables themselves, as curves are named."""
        values: dict[str, float] = {}
        for steps, table in self.tables.items():
            worth = self.sampler.worth(table, objective, self.validation, self.solutions.get("validation"))
            values |= {f"validation/{steps}": worth} | named_values(steps, table.as_table())
            logger.info(f"Step {step}, {steps} model calls: {objective.name} {worth:.5g}, origin {units[steps]:.5g}")
        return values

    def report(self, objective: "Objective") -> dict[str, dict[int, float]]:
        """What origin and tables are worth on noise that nothing was chosen by; the tables are at the origin then."""

        def worths() -> dict[int, float]:
            return {
                steps: self.sampler.worth(table, objective, self.unseen, self.solutions.get("report"))
                for steps, table in self.tables.items()
            }

        learned = worths()
        for table in self.tables.values():
            for parameter in table.parameters():
                parameter.data.zero_()
        return {"origin": worths(), "learned": learned}


class Sampler:
    """
    What all runs of the chain have in common.

    Args:
        unet ([`GenieUNet2DModel`]): The denoiser, frozen.
        scheduler_config (`dict`): Of the denoiser.
        args (`argparse.Namespace`): The arguments of the recipe.
    """

    def __init__(self, unet: GenieUNet2DModel, scheduler_config: dict, args: argparse.Namespace):
        scheduler = solver_of(scheduler_config)
        self.unet, self.args, self.prediction_type = unet, args, scheduler.config.prediction_type
        self.process, self.device = scheduler.process, next(unet.parameters()).device
        self.slope_source = None
        if args.derivative_head is not None:
            self.slope_source = unet.slope_source.differentiable()
            if self.slope_source.term != "slope":
                raise ValueError(f"`--derivative_head` must be a `DerivativeHead`, got {args.derivative_head}.")
            self.slope_source.bind(scheduler.process, self.prediction_type)

    def __call__(self, learned: LearnedTable, noises: Noises, fresh: torch.Tensor) -> torch.Tensor:
        return sample_by(
            self.unet,
            learned,
            noises,
            fresh,
            self.prediction_type,
            self.slope_source,
            rematerialise=not self.args.no_rematerialisation,
        )

    @torch.no_grad()
    def worth(self, learned: LearnedTable, objective: Objective, paths, solutions: torch.Tensor | None) -> float:
        """The objective of all `paths`, a batch at a time."""
        (noises, fresh), device, rows = paths, self.device, []
        for part in torch.arange(len(noises)).split(self.args.solve_batch_size):
            pictures = self(learned, noises[part].to(device), fresh[: len(learned), part].to(device))
            rows.append(objective.of_each(pictures, None if solutions is None else solutions[part].to(device)))
        return float(objective.of_all(torch.cat(rows)))

    def whiten(self, learned: LearnedTable, paths) -> None:
        """Choose the coordinates of the rows by the first paths of `paths`."""
        (noises, fresh), few = paths, slice(0, self.args.solve_batch_size)
        noises, fresh = noises[few].to(self.device), fresh[: len(learned), few].to(self.device)
        learned.whiten(mean_products(self.unet, learned, noises, fresh, self.prediction_type, self.slope_source))


def gathered(own: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The rows of all processes; gradients flow into one's own, and those of all processes add up to the whole."""
    everyone = list(accelerator.gather(own.detach()).split(len(own)))
    everyone[accelerator.process_index] = own
    return torch.cat(everyone)


def named_values(steps: int, table: dict) -> dict[str, float]:
    """The numbers of a table, as curves are named."""
    values = {f"{steps}/timesteps/{index}": float(timestep) for index, timestep in enumerate(table["timesteps"])}
    for index, row in enumerate(table["rows"]):
        for what, weights in row.items():
            values |= {f"{steps}/{what}/{index}/{lag}": weight for lag, weight in enumerate(weights)}
    return values


def plot_tables(origin: dict[str, dict], learned: dict[str, dict], process, path: Path) -> None:
    """For each number of model calls: timesteps by step, and how far each weight of states and predictions moved."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 2.8 * len(learned)), layout="constrained")
    for row, (steps, table) in zip(figure.subplots(len(learned), 3, squeeze=False), learned.items(), strict=True):
        before = Table.from_dict(origin[steps], process).to_dict()
        for name, shown in (("origin", before), ("learned", table)):
            row[0].plot(shown["timesteps"], marker=".", label=name)
        row[0].set(xlabel="step", ylabel=f"timestep, {steps} calls")
        row[0].legend()
        prediction = "data" if any("data" in weighed for weighed in table["rows"]) else "prediction"
        for axes, what in zip(row[1:], ("sample", prediction), strict=True):
            change = np.full((int(steps), max(len(weighed.get(what, ())) for weighed in table["rows"])), np.nan)
            for index, (weighed, earlier) in enumerate(zip(table["rows"], before["rows"], strict=True)):
                change[index, : len(weighed.get(what, ()))] = weighed.get(what, ())
                change[index, : len(earlier.get(what, ()))] -= earlier.get(what, ())
            largest = np.nanmax(np.abs(change)) or 1.0
            image = axes.imshow(change, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
            axes.set(xlabel="steps ago", ylabel="step", title=f"change of the weights: {what}")
            figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=100)
