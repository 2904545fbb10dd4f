"""
Distil a solver for few model calls from a diffusion model alone: no data set is needed.

Converged solutions of the probability-flow ODE, from noise, are the teacher. For each number of model calls a table of
weights is fitted to them by least squares, step after step, on the states that the table itself reaches. Then a small
network is trained on what the weights leave over, through the whole chain of steps and the frozen denoiser, so that
it answers for everything its own corrections cause later. The result is a `StepHead`: a folder of its own with a card;
see README.md here for examples.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from conditions import add_condition_arguments, conditioned, load_unet, rematerialised, with_head
from genie_diffusers import GenieScheduler, GenieUNet2DModel, StepHead
from genie_diffusers.model_card import create_model_card
from genie_diffusers.models.exact_slope import to_noise_prediction
from training_utils import (
    RunLog,
    adamw,
    add_training_arguments,
    hub_id,
    launch_command,
    load_checkpoint,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
)

logger = get_logger(__name__)

#: grids among which the tables choose, by the error on trajectories that they were not fitted to
GRIDS = ("uniform_lambda", "quadratic", "linear")
#: predictions a row weighs, this one and earlier ones
HISTORY = 4
#: of the mean square of the columns: enough to keep nearly equal predictions from large opposite weights
RIDGE = 1e-7


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
        type=_numbers,
        default=[*range(1, 21), 25, 30, 40, 50],
        help="Numbers of model calls to fit tables for, such as `5,8,10`. Default: 1 to 20, 25, 30, 40 and 50.",
    )
    parser.add_argument(
        "--head_steps",
        type=_numbers,
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
    add_condition_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


@dataclass
class Noises:
    """Where paths start: noise, labels if there are classes, and guidance scales if they are guided."""

    noise: torch.Tensor
    labels: torch.Tensor | None
    scales: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Noises":
        return Noises(
            *(None if values is None else values[index] for values in (self.noise, self.labels, self.scales))
        )

    def to(self, device: torch.device) -> "Noises":
        return Noises(*(None if values is None else values.to(device) for values in vars(self).values()))


def draw(unet: UNet2DModel, count: int, seed: int, label_dropout: float, max_guidance_scale: float = 1.0) -> Noises:
    """Noises of `count` paths: guided, with scales uniform from 1 to `max_guidance_scale`, if that is more than 1."""
    generator = torch.Generator().manual_seed(seed)
    size, classes = unet.config.sample_size, unet.config.num_class_embeds
    noise = torch.randn((count, unet.config.in_channels, size, size), generator=generator)
    labels = scales = None
    if classes is not None:
        has_null_class = label_dropout > 0 or max_guidance_scale > 1
        labels = torch.randint(classes - has_null_class, (count,), generator=generator)
        if max_guidance_scale > 1:
            scales = 1.0 + (max_guidance_scale - 1.0) * torch.rand(count, generator=generator)
        else:
            labels[torch.rand(count, generator=generator) < label_dropout] = classes - 1
    return Noises(noise, labels, scales)


def predict(unet: GenieUNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, noises: Noises) -> torch.Tensor:
    """The model's output, guided where the paths are."""
    if noises.scales is None:
        return unet(sample, timestep, class_labels=noises.labels).sample[:, : sample.shape[1]]
    labels = torch.cat([torch.full_like(noises.labels, unet.config.num_class_embeds - 1), noises.labels])
    output = unet(torch.cat([sample, sample]), timestep, class_labels=labels).sample[:, : sample.shape[1]]
    null, conditional = output.chunk(2)
    return null + noises.scales[:, None, None, None] * (conditional - null)


def noise_of(output: torch.Tensor, sample: torch.Tensor, scheduler: GenieScheduler, index: int) -> torch.Tensor:
    """ε from the model's output in step `index`."""
    alpha, sigma = float(scheduler.alphas[index]), float(scheduler.noise_stds[index])
    return to_noise_prediction(output, sample, alpha, sigma, scheduler.config.prediction_type)


def solve(unet: GenieUNet2DModel, scheduler: GenieScheduler, steps: int, noises: Noises) -> torch.Tensor:
    """The pictures that `scheduler` draws in `steps` model calls."""
    scheduler.set_timesteps(steps, device=noises.noise.device)
    sample = noises.noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.step(predict(unet, sample, timestep, noises), timestep, sample).prev_sample
    return sample


def in_batches(function, noises: Noises, batch_size: int, device: torch.device) -> torch.Tensor:
    """`function` of all paths, without gradients, a batch at a time; the result stays on the host."""
    with torch.no_grad():
        parts = [
            function(noises[start : start + batch_size].to(device)).cpu()
            for start in range(0, len(noises), batch_size)
        ]
    return torch.cat(parts)


class TablesAlone:
    """The slope source of a head without its network: nothing is added to what the tables weigh."""

    def __init__(self, tables: dict[str, dict]):
        self.tables = {steps: {**table, "residuals": [0.0] * int(steps)} for steps, table in tables.items()}

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope):
        raise NotImplementedError("No step of these tables weighs a slope.")


class Trajectories:
    """
    Converged solutions at every noise level: cubic Hermite interpolation in λ of a densely stepped solver.

    Args:
        unet ([`GenieUNet2DModel`]): The denoiser.
        scheduler ([`GenieScheduler`]): A converging solver without a source.
        steps (`int`): Its model calls.
        noises ([`Noises`]): Where the paths start.
        batch_size (`int`): Paths at a time.
        device (`torch.device`): Where the denoiser is.
    """

    def __init__(self, unet, scheduler: GenieScheduler, steps: int, noises: Noises, batch_size: int, device):
        def states_and_velocities(batch: Noises) -> torch.Tensor:
            scheduler.set_timesteps(steps, device=device)
            sample, kept = batch.noise, []
            for index, timestep in enumerate(scheduler.timesteps):
                output = predict(unet, sample, timestep, batch)
                noise, sigma = noise_of(output, sample, scheduler, index), float(scheduler.noise_stds[index])
                kept.append(torch.stack([sample, sigma**2 * sample - sigma * noise], dim=1))  # x and dx/dλ, Eq. (1)
                sample = scheduler.step(output, timestep, sample).prev_sample
            kept.append(torch.stack([sample, torch.zeros_like(sample)], dim=1))
            return torch.stack(kept, dim=1)

        self.states, self.velocities = in_batches(states_and_velocities, noises, batch_size, device).unbind(2)
        self.log_snrs = scheduler.lambdas

    def at(self, log_snr: float) -> torch.Tensor:
        """The states at λ, or the clean pictures at infinity."""
        if np.isinf(log_snr):
            return self.states[:, -1]
        index = int(np.clip(np.searchsorted(self.log_snrs, log_snr) - 1, 0, len(self.log_snrs) - 3))
        width = float(self.log_snrs[index + 1] - self.log_snrs[index])
        u = float(log_snr - self.log_snrs[index]) / width
        (x_0, x_1), (v_0, v_1) = (values[:, index : index + 2].unbind(1) for values in (self.states, self.velocities))
        values = (2 * u**3 - 3 * u**2 + 1) * x_0 + (3 * u**2 - 2 * u**3) * x_1
        return values + width * ((u**3 - 2 * u**2 + u) * v_0 + (u**3 - u**2) * v_1)


def relative_error(sample: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """‖x − reference‖ / ‖reference‖ of each sample, shape `(batch,)`."""
    return (sample - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def fit_table(
    unet: GenieUNet2DModel,
    scheduler: GenieScheduler,
    steps: int,
    noises: Noises,
    trajectories: Trajectories,
    fitted: int,
    batch_size: int,
    device: torch.device,
) -> tuple[dict, float]:
    """
    Learn the rows of a run of `steps` model calls at the timesteps that `scheduler` sets.

    Step after step, the weights of x_n, ε_n, ε_{n−1}, … are those whose sum is nearest to the converged solutions at
    the next point. They are pulled a little towards those of DDIM. All paths, fitted or not, are then moved by them.

    Returns:
        `tuple[dict, float]`:
            The table, with the root mean squares of what it misses, and the mean relative error of the paths from
            number `fitted` on, which it was not fitted to.
    """
    scheduler.set_timesteps(steps)
    sample, predictions, rows, residuals = noises.noise, [], [], []
    for index, timestep in enumerate(scheduler.timesteps):
        moving = Noises(sample, noises.labels, noises.scales)
        output = in_batches(lambda batch, t=timestep: predict(unet, batch.noise, t, batch), moving, batch_size, device)
        predictions = [noise_of(output, sample, scheduler, index), *predictions][:HISTORY]
        columns = torch.stack([sample, *predictions], dim=-1)
        target = trajectories.at(scheduler.lambdas[index + 1])
        ddim = torch.zeros(columns.shape[-1], dtype=torch.float64)
        ratio = scheduler.alphas[index + 1] / scheduler.alphas[index]
        ddim[0], ddim[1] = ratio, scheduler.noise_stds[index + 1] - ratio * scheduler.noise_stds[index]
        matrix = columns[:fitted].flatten(0, -2).double()
        missed = target[:fitted].flatten().double() - matrix @ ddim
        gram = matrix.T @ matrix
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weights = ddim + torch.linalg.solve(gram + ridge, matrix.T @ missed)
        sample = columns @ weights.to(columns.dtype)
        rows.append([float(f"{weight:.9g}") for weight in weights])
        residuals.append(float(f"{(target - sample)[:fitted].square().mean().sqrt():.4g}"))
    table = {"timesteps": scheduler.timesteps.tolist(), "weights": rows, "residuals": residuals}
    error = relative_error(sample[fitted:], trajectories.at(np.inf)[fitted:]).mean()
    return table, float(error)


def fit_tables(unet, scheduler_config: dict, args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """The best table of each of `--table_steps`, over the grids; the network is called in those of `--head_steps`."""
    noises = draw(unet, args.fit_trajectories * 5 // 4, args.seed + 1, args.label_dropout)
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
            table["residuals"] = [0.0] * steps
        tables[str(steps)] = table
    return tables


def solver_of(scheduler_config: dict, **options) -> GenieScheduler:
    """The solver of the model, without clipping: it would hide what there is to learn."""
    return GenieScheduler.from_config(
        scheduler_config,
        **{"clip_sample": False, "thresholding": False, "final_sigmas_type": "zero", "analytical_first_step": False},
        **{"method": "hermite", "denoising_step": False, **options},
    )


def teacher_of(scheduler_config: dict) -> GenieScheduler:
    return solver_of(scheduler_config, time_grid="uniform_lambda", denoising_step=True)


def drawn_by(unet, scheduler: GenieScheduler, steps: int, noises: Noises, args: argparse.Namespace, device):
    """The pictures of all `noises`, on the host."""
    return in_batches(lambda batch: solve(unet, scheduler, steps, batch), noises, args.solve_batch_size, device)


def check(args: argparse.Namespace, unet: UNet2DModel) -> None:
    classes = unet.config.num_class_embeds
    if args.max_guidance_scale < 1.0 or (args.max_guidance_scale > 1.0 and classes is None):
        raise ValueError(
            "`--max_guidance_scale` must be at least 1, and 1 for a model without classes or captions, got "
            f"{args.max_guidance_scale}."
        )
    missing = sorted(set(args.head_steps) - set(args.table_steps))
    if missing:
        raise ValueError(f"`--head_steps` must be among `--table_steps`, which lack {missing}.")
    if min(args.table_steps) < 1 or args.fit_trajectories < 8 or args.validation_trajectories < 1:
        raise ValueError(
            "`--table_steps` must be positive, `--fit_trajectories` at least 8 and `--validation_trajectories` at "
            f"least 1, got {args.table_steps}, {args.fit_trajectories} and {args.validation_trajectories}."
        )


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed)  # the same in all processes, whose heads start alike
    device = accelerator.device
    unet = load_unet(args.pretrained_model_name_or_path)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = solver_of(scheduler_config)
    head = StepHead.for_unet(unet, scheduler.config, width=args.head_width)
    unet = with_head(unet, head).requires_grad_(False).to(device)
    head.requires_grad_(True)
    if args.gradient_checkpointing:
        rematerialised(unet)
    with accelerator.main_process_first():
        unet = conditioned(unet, args, accelerator.mixed_precision, device)
    check(args, unet)

    # What is learned from does not change: whatever was computed before a kill is read again.
    guided = args.train_trajectories // 3 if args.max_guidance_scale > 1 else 0
    train = {"unguided": draw(unet, args.train_trajectories - guided, args.seed + 2, args.label_dropout)}
    if guided:
        train["guided"] = draw(unet, guided, args.seed + 3, 0.0, args.max_guidance_scale)
    tables_file, pairs_file = args.output_dir / "tables", args.output_dir / "trajectories.safetensors"
    with accelerator.main_process_first():
        if not (tables_file / "config.json").exists():
            head.register_to_config(tables=fit_tables(unet, scheduler_config, args, device))
            head.save_config(tables_file)
        head.register_to_config(tables=StepHead.load_config(tables_file)["tables"])
        if not pairs_file.exists():
            pictures = {
                name: drawn_by(unet, teacher_of(scheduler_config), args.teacher_steps, noises, args, device)
                for name, noises in train.items()
            }
            save_file(pictures, pairs_file.with_suffix(".partial"))
            pairs_file.with_suffix(".partial").replace(pairs_file)
    pictures = load_file(pairs_file)
    scheduler.attach(unet)

    optimizer = adamw(args, head.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    ema = EMAModel(head.parameters(), decay=args.ema_max_decay, foreach=True)
    # The head is not prepared: it runs many times a step, inside the UNet, so its gradients are averaged by hand.
    accelerator.register_for_checkpointing(head, optimizer, lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(device)
    log = RunLog(accelerator, args, first_step)
    logger.info(
        f"A head of {head.num_parameters():,} parameters on a UNet of "
        f"{unet.num_parameters() - head.num_parameters():,}, {total_batch_size(args, accelerator)} paths a step, "
        f"steps {first_step + 1} to {args.max_train_steps}"
    )
    # What the tables alone miss is the unit of the loss, so that every number of model calls counts the same.
    alone = solver_of(scheduler_config)
    alone.attach(TablesAlone(head.config.tables))
    units = {}
    for name, noises in train.items():
        some = slice(0, args.fit_trajectories)
        for steps in args.head_steps:
            drawn = drawn_by(unet, alone, steps, noises[some], args, device)
            units[steps, name] = float(relative_error(drawn, pictures[name][some]).square().mean())
    chances = 1.0 / np.array(args.head_steps)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for step in range(first_step + 1, args.max_train_steps + 1):
        # The same draw in every process; each takes its share of the paths.
        generator = np.random.default_rng([args.seed, step])
        steps = int(generator.choice(args.head_steps, p=chances / chances.sum()))
        name = "guided" if guided and generator.random() < guided / args.train_trajectories else "unguided"
        chosen = generator.choice(len(train[name]), total_batch_size(args, accelerator))
        step_loss = torch.zeros((), device=device)
        for part in np.split(chosen, args.gradient_accumulation_steps):
            own = torch.from_numpy(np.split(part, accelerator.num_processes)[accelerator.process_index])
            with accelerator.autocast():
                drawn = solve(unet, scheduler, steps, train[name][own].to(device))
            errors = relative_error(drawn.float(), pictures[name][own].to(device))
            loss = errors.square().mean() / units[steps, name]
            accelerator.backward(loss)  # which divides by the number of accumulated batches
            step_loss += loss.detach() / args.gradient_accumulation_steps
        for parameter in head.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        accelerator.clip_grad_norm_(head.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema.step(head.parameters())

        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        log.write(step, mean_loss, learning_rate)
        progress.update()
        progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        finish(args, unet, head, ema, scheduler_config, log, device)
    accelerator.end_training()


def keep_what_helps(args: argparse.Namespace, unet, head: StepHead, scheduler_config: dict, device) -> None:
    """Leave the network out of the tables that are better alone on fresh noise."""
    noises = draw(unet, args.validation_trajectories, args.seed + 5, args.label_dropout)
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
            tables[str(steps)] = {**tables[str(steps)], "residuals": [0.0] * steps}
    head.register_to_config(tables=tables)


def finish(
    args: argparse.Namespace,
    unet: GenieUNet2DModel,
    head: StepHead,
    ema: EMAModel,
    scheduler_config: dict,
    log: RunLog,
    device: torch.device,
) -> None:
    """Save the averaged weights with their tables, the errors on held-out noise and a card, and publish if asked."""
    ema.copy_to(head.parameters())
    head.eval()
    keep_what_helps(args, unet, head, scheduler_config, device)
    head.save_pretrained(args.output_dir)
    noises = draw(unet, args.validation_trajectories, args.seed + 4, args.label_dropout)
    reference = drawn_by(unet, teacher_of(scheduler_config), args.teacher_steps, noises, args, device)
    sources = {"with the network": unet, "tables alone": TablesAlone(head.config.tables), "hermite": None}
    errors = {}
    for name, source in sources.items():
        scheduler = solver_of(scheduler_config, time_grid="uniform_lambda")
        scheduler.attach(source)
        drawn = [drawn_by(unet, scheduler, steps, noises, args, device) for steps in args.table_steps]
        errors[name] = [float(relative_error(pictures, reference).mean()) for pictures in drawn]
    plot_errors(args.table_steps, errors, args.output_dir / "error.png")
    shown = [n for n in (5, 8, 10, 15, 20) if n in args.table_steps] or args.table_steps[:5]
    facts = {
        "Base model": hub_id(args.pretrained_model_name_or_path) or "a local folder",
        "Parameters": f"{head.num_parameters():,} on {unet.num_parameters() - head.num_parameters():,} of the UNet",
        "Tables": f"{args.table_steps}, fitted to {args.fit_trajectories} solutions",
        "Network": f"for {args.head_steps} model calls, {args.max_train_steps:,} steps of {args.train_batch_size} "
        f"paths a process, from {args.train_trajectories:,} solutions of {args.teacher_steps} model calls",
        "Largest guidance scale": f"{args.max_guidance_scale:g}",
        "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run; 1 is "
        "the squared error of the tables alone)",
    }
    for name, values in errors.items():
        by_steps = dict(zip(args.table_steps, values, strict=True))
        facts[f"Held-out relative error, {name}"] = ", ".join(f"{n}: {by_steps[n]:.4f}" for n in shown)
    model_class, pipeline_class, call = "GenieUNet2DModel", "GeniePipeline", "num_inference_steps=8"
    if args.captions is not None:
        model_class = "GenieUNet2DConditionModel"
        pipeline_class = f"GenieStableDiffusion{'XL' if 'text_embeds' in unet.names else ''}Pipeline"
        call = f'"a photo of a cat", {call}'
    repository = args.hub_model_id or args.output_dir.name
    base = hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"
    card = create_model_card(
        repository,
        f"A distilled solver for {base}, made with genie_diffusers: weights and a small network that land each step "
        "of a short sampling run near the converged solution of the probability-flow ODE. It was distilled from the "
        "denoiser alone, without data.",
        usage=(
            f"from genie_diffusers import {pipeline_class}, GenieScheduler, {model_class}\n\n"
            f'pipe = {pipeline_class}.from_pretrained("{base}")\n'
            f"pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config, clip_sample=False)\n"
            f'pipe.unet = {model_class}.from_unet(pipe.unet, derivative_head="{repository}")\n'
            f"images = pipe({call}).images"
        ),
        facts=facts,
        command=launch_command(),
        pictures={
            "error.png": "Distance to the converged solution, on noise that nothing was fitted to.",
            "loss.png": "Training loss and its running mean, in units of the error of the tables alone.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
    )
    card.save(args.output_dir / "README.md")
    if args.push_to_hub:
        push_to_hub(args)


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


if __name__ == "__main__":
    main(parse_args())
