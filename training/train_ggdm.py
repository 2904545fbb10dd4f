"""
Learn a sampler for few model calls by differentiating through it (DDSS, Watson et al., 2022).

The numbers of a `GGDMScheduler`, some hundred, are moved down the gradient of what its pictures are worth, through
the whole chain of steps and the frozen denoiser. `--objective kernel` is the paper's: the distance of the pictures'
features from those of real ones. `--objective trajectory` is the distance of each picture from the converged solution
of the denoiser's ODE from the same noise, which needs no data. The result is a folder with `scheduler_config.json` and
a card; see README.md here for examples.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast, set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from feature_networks import feature_network, features_of, features_of_data, has_reference
from genie_diffusers import GDDIMScheduler, GenieScheduler, GenieUNet2DModel, GGDMScheduler
from genie_diffusers.metrics import PACKAGED_CLASSIFIER, KernelDistance, ReferenceFeatures
from genie_diffusers.model_card import create_model_card
from genie_diffusers.schedulers.scheduling_ggdm import WEIGHED
from learned_tables import FAMILY, LearnedTable, MarginalTable, learned_scheduler, mean_products, sample_by
from ode_paths import Noises, Trajectories, fit_table, in_batches, relative_error, solve, solver_of, teacher_of
from training_utils import (
    RunLog,
    add_dataset_arguments,
    add_training_arguments,
    computed_once,
    hub_id,
    launch_command,
    load_checkpoint,
    load_pictures,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
)

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
    add("--num_inference_steps", type=_numbers, default=[5, 10], help="Numbers of model calls, such as `5,10`.")
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


def _numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


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


def draw(
    unet: UNet2DModel, count: int, steps: int, args: argparse.Namespace, *key: int
) -> tuple[Noises, torch.Tensor]:
    """Noises of `count` paths, and what `steps` steps may add to them; a pure function of the seed and `key`."""
    seed = np.random.SeedSequence([args.seed, *key]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    generator = torch.Generator().manual_seed(int(seed))
    size, classes = unet.config.sample_size, unet.config.num_class_embeds
    noise, *fresh = torch.randn((1 + steps, count, unet.config.in_channels, size, size), generator=generator)
    labels = scales = None
    if classes is not None:
        guided = args.guidance_scale != 1.0
        labels = torch.randint(classes - (args.null_class or guided), (count,), generator=generator)
        scales = torch.full((count,), args.guidance_scale) if guided else None
    return Noises(noise, labels, scales), torch.stack(fresh) if fresh else noise[None, :0]


class Objective:
    """
    What a batch of pictures is worth, from one row of numbers for each of them.

    Args:
        args (`argparse.Namespace`): The arguments of the script.
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
        if self.is_kernel:
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
    data = {
        name: getattr(args, name) for name in ("dataset_config_name", "dataset_split", "image_column", "cache_dir")
    }
    size, channels = args.resolution or unet.config.sample_size, unet.config.in_channels
    pictures = load_pictures(args.dataset_name, size, channels, **data).shuffle(seed=args.seed)
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
        of_sample, of_predictions = zip(*((row[:1], row[1:]) for row in fitted["weights"]), strict=True)
        tables[str(steps)] = {
            "timesteps": fitted["timesteps"],
            "sample": list(of_sample),
            "prediction": list(of_predictions),
        }
    return tables


class Sampler:
    """
    What all runs of the chain have in common.

    Args:
        unet ([`GenieUNet2DModel`]): The denoiser, frozen.
        scheduler ([`GenieScheduler`]): Of the denoiser.
        args (`argparse.Namespace`): The arguments of the script.
    """

    def __init__(self, unet: GenieUNet2DModel, scheduler: GenieScheduler, args: argparse.Namespace):
        self.unet, self.args, self.prediction_type = unet, args, scheduler.config.prediction_type
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
        (noises, fresh), device, rows = paths, self.unet.device, []
        for part in torch.arange(len(noises)).split(self.args.solve_batch_size):
            pictures = self(learned, noises[part].to(device), fresh[: len(learned), part].to(device))
            rows.append(objective.of_each(pictures, None if solutions is None else solutions[part].to(device)))
        return float(objective.of_all(torch.cat(rows)))

    def whiten(self, learned: LearnedTable, paths) -> None:
        """Choose the coordinates of the rows by the first paths of `paths`."""
        (noises, fresh), few = paths, slice(0, self.args.solve_batch_size)
        noises, fresh = noises[few].to(self.unet.device), fresh[: len(learned), few].to(self.unet.device)
        learned.whiten(mean_products(self.unet, learned, noises, fresh, self.prediction_type, self.slope_source))


def gathered(own: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The rows of all processes; gradients flow into one's own, and those of all processes add up to the whole."""
    everyone = list(accelerator.gather(own.detach()).split(len(own)))
    everyone[accelerator.process_index] = own
    return torch.cat(everyone)


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed)
    device = accelerator.device
    unet = GenieUNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet").float().eval()
    check(args, unet)
    if args.derivative_head is not None:
        unet = GenieUNet2DModel.from_unet(unet, args.derivative_head)
    unet = unet.requires_grad_(False).to(device)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = solver_of(scheduler_config)
    sampler = Sampler(unet, scheduler, args)

    # What is learned from does not change: whatever was computed before a kill is read again.
    counts, longest = args.num_inference_steps, max(args.num_inference_steps)
    by_trajectory = args.objective == "trajectory"
    validation = draw(unet, args.validation_samples, longest, args, VALIDATION)
    report = draw(unet, args.validation_samples, longest, args, REPORT)
    training = draw(unet, args.train_trajectories, 0, args, SOLUTIONS)[0] if by_trajectory else None

    def write_origin(folder: Path) -> None:
        tables = origin_tables(args, unet, scheduler_config, device)
        learned_scheduler(scheduler_config, tables).save_pretrained(folder)

    def write_solutions(path: Path) -> None:
        teacher = teacher_of(scheduler_config)
        solutions = {
            name: in_batches(
                lambda batch: solve(unet, teacher, args.teacher_steps, batch), noises, args.solve_batch_size, device
            )
            for name, noises in {"training": training, "validation": validation[0], "report": report[0]}.items()
        }
        save_file(solutions, path)

    with accelerator.main_process_first():
        origin_folder = computed_once(args, "origin", [*OF_PATHS, *OF_ORIGIN], write_origin)
        solutions = {}
        if by_trajectory:
            depends_on = [*OF_PATHS, "train_trajectories", "validation_samples"]
            solutions = load_file(computed_once(args, "trajectories.safetensors", depends_on, write_solutions))
    objective = Objective(args, unet, device)
    origin = GGDMScheduler.load_config(origin_folder)["tables"]
    missing = [steps for steps in counts if str(steps) not in origin]
    if missing:
        raise ValueError(
            f"`--num_inference_steps` must be among those of `--origin`, {', '.join(origin)}, got {missing} too."
        )
    kind = MarginalTable if args.keep_marginals else LearnedTable
    tables = {steps: kind(origin[str(steps)], scheduler.process, args.family).to(device) for steps in counts}
    units = {}
    for steps, learned in tables.items():
        if by_trajectory and learned.is_stochastic:
            raise ValueError("`--objective trajectory` needs a deterministic `--origin`.")
        sampler.whiten(learned, validation)
        for buffer in learned.buffers():
            buffer.copy_(broadcast(buffer))
        # What the origin is worth is the unit of the loss, so that every number of model calls counts the same.
        units[steps] = abs(sampler.worth(learned, objective, validation, solutions.get("validation")))

    parameters = [parameter for learned in tables.values() for parameter in learned.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    optimizer = accelerator.prepare(optimizer)
    ema = EMAModel(parameters, decay=args.ema_max_decay)
    # The tables are not prepared: their gradients are added up by hand, and each is used every few steps only.
    accelerator.register_for_checkpointing(*tables.values(), lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(device)
    log = RunLog(accelerator, args, first_step)
    logger.info(
        f"{len(torch.cat([p.flatten() for p in parameters]))} numbers of tables for {counts} model calls, "
        f"{total_batch_size(args, accelerator)} paths a step, steps {first_step + 1} to {args.max_train_steps}"
    )

    def validate(step: int) -> None:
        """Log what the averaged tables are worth on held-out noise, and the tables themselves."""
        ema.store(parameters)
        ema.copy_to(parameters)
        for steps, learned in tables.items():
            worth = sampler.worth(learned, objective, validation, solutions.get("validation"))
            values = {f"validation/{steps}": worth} | named_values(steps, learned.as_table())
            accelerator.log(values, step=step)
            logger.info(f"Step {step}, {steps} model calls: {objective.name} {worth:.5g}, origin {units[steps]:.5g}")
        ema.restore(parameters)

    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for step in range(first_step + 1, args.max_train_steps + 1):
        steps = counts[step % len(counts)]
        total = total_batch_size(args, accelerator)
        # The same draw in every process; each takes its share of the paths.
        if by_trajectory:
            chosen = np.random.default_rng([args.seed, TRAINING, step]).choice(len(training), total)
            noises, fresh = training[torch.from_numpy(chosen)], None
            targets = solutions["training"][chosen]
        else:
            (noises, fresh), targets = draw(unet, total, steps, args, TRAINING, step), None
        rows = []
        for part in torch.arange(total).split(total // args.gradient_accumulation_steps):
            own = part.split(args.train_batch_size)[accelerator.process_index]
            with accelerator.autocast():
                pictures = sampler(
                    tables[steps], noises[own].to(device), None if fresh is None else fresh[:, own].to(device)
                )
                rows.append(objective.of_each(pictures, None if targets is None else targets[own].to(device)))
        loss = objective.of_all(gathered(torch.cat(rows), accelerator)) / units[steps]
        # All batches at once, since a distance between sets is no mean: so without the division by their number.
        accelerator.backward(loss * args.gradient_accumulation_steps)
        for parameter in tables[steps].parameters():
            parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
        accelerator.clip_grad_norm_(tables[steps].parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema.step(parameters)

        log.write(step, loss.item(), learning_rate)
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        if step % args.validation_steps == 0 and accelerator.is_main_process:
            validate(step)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        worths = {}
        for name in ("origin", "learned"):
            if name == "learned":
                ema.copy_to(parameters)
            else:
                for parameter in parameters:
                    parameter.data.zero_()
            worths[name] = {
                steps: sampler.worth(learned, objective, report, solutions.get("report"))
                for steps, learned in tables.items()
            }
        learned = {str(steps): learned.as_table() for steps, learned in tables.items()}
        finish(args, scheduler_config, origin, learned, objective, worths, log)
    accelerator.end_training()


def named_values(steps: int, table: dict) -> dict[str, float]:
    """The numbers of a table, as curves are named."""
    values = {}
    for name in ("timesteps", "noise"):
        values |= {f"{steps}/{name}/{index}": float(value) for index, value in enumerate(table[name])}
    for what in WEIGHED:
        for index, row in enumerate(table.get(what, [])):
            values |= {f"{steps}/{what}/{index}/{lag}": weight for lag, weight in enumerate(row)}
    return values


def finish(
    args: argparse.Namespace,
    scheduler_config: dict,
    origin: dict[str, dict],
    learned: dict[str, dict],
    objective: Objective,
    worths: dict[str, dict[int, float]],
    log: RunLog,
) -> None:
    """Save the sampler with a card, what it is worth on held-out noise and pictures, and publish it if asked."""
    scheduler = learned_scheduler(scheduler_config, origin | learned)
    scheduler.save_pretrained(args.output_dir)
    plot_tables({steps: origin[steps] for steps in learned}, learned, args.output_dir / "tables.png")
    base = hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"
    repository = args.hub_model_id or args.output_dir.name
    facts = {
        "Base model": hub_id(args.pretrained_model_name_or_path) or "a local folder",
        "Model calls": ", ".join(sorted(origin | learned, key=int)),
        "Family": ", ".join(args.family) + (", marginals kept" if args.keep_marginals else ""),
        "Origin": f"{args.origin}, {args.time_grid}" if args.origin in ORIGINS else "an earlier result",
        "Objective": objective.name,
        "Guidance scale": f"{args.guidance_scale:g}",
        "Training": f"{args.max_train_steps:,} steps of {args.train_batch_size} × {args.gradient_accumulation_steps} "
        "paths a process",
        "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.4f} (mean over the last fiftieth of the run; 1 is "
        "the origin)",
    }
    if objective.network is not None:
        facts["Feature network"] = hub_id(args.feature_network) or Path(args.feature_network).name
    for name, values in worths.items():
        facts[f"Held-out {objective.name}, {name}"] = ", ".join(f"{n}: {worth:.5g}" for n, worth in values.items())
    names, with_head = "GeniePipeline, GGDMScheduler", ""
    if args.derivative_head is not None:
        head = hub_id(args.derivative_head) or "path/to/derivative-head"
        names = "GeniePipeline, GenieUNet2DModel, GGDMScheduler"
        with_head = (
            f'pipeline.unet = GenieUNet2DModel.from_unet(pipeline.unet, derivative_head="{head}")\n'
            "pipeline.scheduler.attach(pipeline.unet)\n"
        )
    card = create_model_card(
        repository,
        f"A sampler for {base} with {' or '.join(learned)} model calls, learned with genie_diffusers by "
        "differentiating through it. It is a table of numbers in `scheduler_config.json`; the model stays as it is.",
        usage=(
            f"from genie_diffusers import {names}\n\n"
            f'pipeline = GeniePipeline.from_pretrained("{base}")\n'
            f'pipeline.scheduler = GGDMScheduler.from_pretrained("{repository}")\n'
            f"{with_head}"
            f"images = pipeline(num_inference_steps={min(map(int, learned))}).images"
        ),
        facts=facts,
        command=launch_command(),
        pictures={
            "tables.png": "Timesteps, and how far the weights of states and predictions are from the origin's.",
            "loss.png": "Training loss and its running mean; 1 is the origin.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
    )
    card.save(args.output_dir / "README.md")
    if args.push_to_hub:
        push_to_hub(args)


def plot_tables(origin: dict[str, dict], learned: dict[str, dict], path: Path) -> None:
    """For each number of model calls: timesteps by step, and how far each weight of states and predictions moved."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 2.8 * len(learned)), layout="constrained")
    for row, (steps, table) in zip(figure.subplots(len(learned), 3, squeeze=False), learned.items(), strict=True):
        for name, shown in (("origin", origin[steps]), ("learned", table)):
            row[0].plot(shown["timesteps"], marker=".", label=name)
        row[0].set(xlabel="step", ylabel=f"timestep, {steps} calls")
        row[0].legend()
        for axes, what in zip(row[1:], ("sample", "prediction"), strict=True):
            change = np.full((int(steps), max(map(len, table[what]))), np.nan)
            for index, weights in enumerate(table[what]):
                change[index, : len(weights)] = weights
                before = origin[steps][what][index]
                change[index, : len(before)] -= before
            largest = np.nanmax(np.abs(change)) or 1.0
            image = axes.imshow(change, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
            axes.set(xlabel="steps ago", ylabel="step", title=f"change of the weights: {what}")
            figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(parse_args())
