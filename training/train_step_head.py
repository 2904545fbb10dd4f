"""
Distil a solver for few model calls from a diffusion model alone: no data set is needed.

Converged solutions of the probability-flow ODE, from noise, are the teacher. For each number of model calls a table of
weights is fitted to them by least squares, step after step, on the states that the table itself reaches. Then a small
network is trained on what the weights leave over, through the whole chain of steps and the frozen denoiser, so that
it answers for everything its own corrections cause later. The result is a `StepHead`: a folder of its own with a card;
see README.md here for examples.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from conditions import (
    CONDITION_ARGUMENTS,
    add_condition_arguments,
    check_guidance,
    conditioned,
    further_channels,
    load_unet,
    rematerialised,
    sampling_code,
    takes_text,
    with_head,
)
from genie_diffusers import GenieScheduler, GenieUNet2DModel, StepHead
from genie_diffusers.model_card import create_model_card
from ode_paths import (
    Noises,
    TablesAlone,
    Trajectories,
    draw,
    fit_table,
    in_batches,
    relative_error,
    solve,
    solver_of,
    teacher_of,
)
from training_utils import (
    RunLog,
    adamw,
    add_dataset_arguments,
    add_training_arguments,
    computed_once,
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


def _numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


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


def drawn_by(unet, scheduler: GenieScheduler, steps: int, noises: Noises, args: argparse.Namespace, device):
    """The pictures of all `noises`, on the host."""
    return in_batches(lambda batch: solve(unet, scheduler, steps, batch), noises, args.solve_batch_size, device)


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


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed)  # the same in all processes, whose heads start alike
    device = accelerator.device
    unet = load_unet(args.pretrained_model_name_or_path)
    check(args, unet)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = solver_of(scheduler_config)
    head = StepHead.for_unet(unet, scheduler.config, width=args.head_width)
    unet = with_head(unet, head).requires_grad_(False).to(device)
    head.requires_grad_(True)
    if args.gradient_checkpointing:
        rematerialised(unet)
    with accelerator.main_process_first():
        unet, _ = conditioned(unet, args, accelerator.mixed_precision, device)

    # What is learned from does not change: whatever was computed before a kill is read again.
    guided = args.train_trajectories // 3 if args.max_guidance_scale > 1 else 0
    train = {"unguided": draw(unet, args.train_trajectories - guided, args.seed + 2, args.label_dropout)}
    if guided:
        train["guided"] = draw(unet, guided, args.seed + 3, 0.0, args.max_guidance_scale)
    conditions = [name for name in CONDITION_ARGUMENTS if name in args]
    of_tables = ["table_steps", "head_steps", "teacher_steps", "fit_trajectories", "label_dropout"]
    of_pictures = ["train_trajectories", "teacher_steps", "max_guidance_scale", "label_dropout"]

    def write_tables(folder: Path) -> None:
        head.register_to_config(tables=fit_tables(unet, scheduler_config, args, device))
        head.save_config(folder)

    def write_pictures(path: Path) -> None:
        teacher = teacher_of(scheduler_config)
        drawn = {name: drawn_by(unet, teacher, args.teacher_steps, train[name], args, device) for name in train}
        save_file(drawn, path)

    with accelerator.main_process_first():
        tables = computed_once(args, "tables", [*conditions, *of_tables], write_tables)
        head.register_to_config(tables=StepHead.load_config(tables)["tables"])
        pictures = computed_once(args, "trajectories.safetensors", [*conditions, *of_pictures], write_pictures)
    pictures = load_file(pictures)
    # through every step of the chain, the features of the frozen UNet included
    scheduler.attach(unet.slope_source.differentiable())

    optimizer = adamw(args, head.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    ema = EMAModel(head.parameters(), decay=args.ema_max_decay, foreach=True)
    # The head is not prepared: it runs many times a step, inside the UNet, so its gradients are averaged by hand.
    optimizer = accelerator.prepare(optimizer)
    accelerator.register_for_checkpointing(head, lr_scheduler, ema)
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
    repository = args.hub_model_id or args.output_dir.name
    base = hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"
    card = create_model_card(
        repository,
        f"A distilled solver for {base}, made with genie_diffusers: weights and a small network that land each step "
        "of a short sampling run near the converged solution of the probability-flow ODE."
        + ("" if args.dataset_name else " It was distilled from the denoiser alone, without data."),
        usage=sampling_code(args, unet, 8, clip_sample=False),
        facts=facts,
        command=launch_command(),
        pictures={
            "error.png": "Distance to the converged solution, on noise that nothing was fitted to.",
            "loss.png": "Training loss and its running mean, in units of the error of the tables alone.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
        dataset=hub_id(args.dataset_name),
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
