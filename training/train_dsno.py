"""
Train a neural operator that draws the whole trajectory of a diffusion model in one call: DSNO (Zheng et al., 2023).

The teacher's solutions of the probability-flow ODE come from `generate_trajectories.py`, or are drawn on the fly; no
data set is needed. The operator starts from the teacher's weights. For each time point, what its UNet is told and how
its output is weighed are fitted to some solutions first, so that training starts from the best that the teacher can do
in one call. The result is a folder with a `DSNOPipeline` and a card; see README.md here for examples.
"""

import argparse
import bisect
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from generate_trajectories import Teacher, TrajectoryStream, add_teacher_arguments
from genie_diffusers import DSNOPipeline, DSNOUNet2DModel, ImageClassifier, VariancePreserving
from genie_diffusers.core.time_grids import distinct_integers
from genie_diffusers.metrics import PACKAGED_CLASSIFIER
from genie_diffusers.model_card import create_model_card
from genie_diffusers.models.derivative_head import fingerprint
from ode_paths import Noises, in_batches, predict, relative_error
from training_utils import (
    RunLog,
    add_training_arguments,
    computed_once,
    hub_id,
    launch_command,
    load_checkpoint,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
    training_batches,
)

logger = get_logger(__name__)

#: timesteps among which what the UNet is told is chosen
CANDIDATES = 40
#: arguments that what the operator starts from follows from
OF_START = (
    "pretrained_model_name_or_path",
    "scheduler",
    "scheduler_options",
    "num_inference_steps",
    "num_time_points",
    "time_grid",
    "guidance_scale",
    "label_dropout",
    "trajectories",
    "fit_trajectories",
    "seed",
)
#: number of the first held-out noise: no training gets there, whatever its seed
HELD_OUT = 2**40


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a neural operator from noise to the whole trajectory.")
    add_teacher_arguments(parser)
    add = parser.add_argument
    add(
        "--trajectories",
        type=Path,
        help="Folder of solutions from generate_trajectories.py, whose solver, guidance and label dropout then count; "
        "the operator's time points must be among theirs. Default: solutions are drawn when they are needed.",
    )
    add("--skip_damaged_shards", action="store_true", help="Go on without shards that are damaged or missing.")
    add("--modes", type=int, default=2, help="Frequencies of the temporal layers; 0 leaves these out.")
    add("--fit_trajectories", type=int, default=256, help="Solutions that the start is fitted to.")
    add("--validation_trajectories", type=int, default=256, help="Solutions that errors are stated on.")
    add("--loss", choices=["l1", "l2"], default="l1", help="Distance of states, in pixels.")
    add(
        "--max_loss_weight", type=float, default=1e4, help="A time point counts √SNR, but at least 1 and at most this."
    )
    add("--feature_loss_weight", type=float, default=0.0, help="Weight of a distance in features, added to `--loss`.")
    add("--feature_network", default=PACKAGED_CLASSIFIER, help="Folder or Hub id of the `ImageClassifier` for it.")
    add(
        "--lr_milestones",
        type=lambda text: [int(step) for step in text.split(",")],
        help="Steps, such as `2000,3000`, at which the learning rate falls by `--lr_gamma`, instead of "
        "`--lr_scheduler`.",
    )
    add("--lr_gamma", type=float, default=0.5)
    add("--sample_steps", type=int, help="Log a grid of pictures every so many steps. Default: only at the end.")
    add("--dataloader_num_workers", type=int, default=0)
    add("--solve_batch_size", type=int, default=64, help="Batch size where nothing is trained.")
    add_training_arguments(parser)
    return parser.parse_args(argv)


# What the operator starts from


def fit_start(
    unet: torch.nn.Module, process: VariancePreserving, noises: Noises, states: torch.Tensor, batch_size: int
) -> tuple[list[float], list[list[float]], list[float]]:
    """
    For each time point the timestep τ at which the teacher's output on pure noise tells most about the state there.

    x_{t_m} ≈ a x_T + b F(x_T, τ) is fitted by least squares for candidates of τ; later time points choose first, and
    earlier ones among larger τ.

    Args:
        unet (`torch.nn.Module`): The teacher.
        process ([`VariancePreserving`]): Its diffusion.
        noises ([`Noises`]): x_T, on the device of the teacher.
        states (`torch.Tensor` of shape `(batch, time, channels, height, width)`): x_{t_m}.
        batch_size (`int`): Noises at a time.

    Returns:
        `tuple`: τ, (a, b) and the root mean square of what they miss, of each time point.
    """
    points = np.linspace(process.timestep_max, process.timestep_min, CANDIDATES)
    if process.is_discrete:
        points = distinct_integers(points, process.num_train_timesteps - 1)
    targets = states.transpose(0, 1).flatten(1).double()
    fits = []
    for tau in points.tolist():
        timestep = torch.tensor(tau, device=noises.noise.device)
        with torch.no_grad():
            parts = (noises[start : start + batch_size] for start in range(0, len(noises), batch_size))
            output = torch.cat([predict(unet, part.noise, timestep, part) for part in parts])
        columns = torch.stack([noises.noise.flatten(), output.flatten()]).double()
        weights = torch.linalg.solve(columns @ columns.T, columns @ targets.T)
        fits.append((tau, weights.T.tolist(), (targets - weights.T @ columns).square().mean(1).sqrt().tolist()))
    chosen, end = [], len(fits)
    for m in reversed(range(len(targets))):
        end = min(range(m, end), key=lambda i, m=m: fits[i][2][m])
        chosen.insert(0, (float(fits[end][0]), fits[end][1][m], fits[end][2][m]))
    timesteps, output_weights, missed = (list(values) for values in zip(*chosen, strict=True))
    return timesteps, output_weights, missed


# Loss


def loss_weights(process: VariancePreserving, solution_timesteps: list[float], largest: float) -> torch.Tensor:
    """√SNR = α/σ of each time point, clamped to [1, `largest`] (Zheng et al., 2023, Section 4), with mean 1."""
    alphas, sigmas = process.alpha(solution_timesteps), process.sigma(solution_timesteps)
    weights = torch.from_numpy(alphas / np.maximum(sigmas, 1e-12)).clamp(1.0, largest)
    return (weights / weights.mean()).float()


def state_errors(prediction: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean absolute (`"l1"`) or squared (`"l2"`) difference at each time point, shape `(time,)`."""
    difference = prediction - target
    return (difference.abs() if loss == "l1" else difference.square()).mean(dim=(0, 2, 3, 4))


def feature_errors(
    prediction: torch.Tensor, target: torch.Tensor, feature_maps: Callable[[torch.Tensor], list[torch.Tensor]]
) -> torch.Tensor:
    """
    Squared difference of features normalised at each pixel, summed over the maps of a network, shape `(time,)`.

    This is LPIPS (Zhang et al., 2018, Eq. (1)) without its learned weights of channels.
    """
    errors = prediction.new_zeros(prediction.shape[1])
    for found, wanted in zip(feature_maps(prediction.flatten(0, 1)), feature_maps(target.flatten(0, 1)), strict=True):
        unit = [torch.nn.functional.normalize(values, dim=1) for values in (found, wanted)]
        squares = (unit[0] - unit[1]).square().sum(dim=1).mean(dim=(1, 2))
        errors = errors + squares.unflatten(0, prediction.shape[:2]).mean(dim=0)
    return errors


def learning_rates(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """The schedule that is asked for by name, or a warm-up and milestones."""
    if args.lr_milestones is None:
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )

    def factor(step: int) -> float:
        return min(1.0, step / max(1, args.lr_warmup_steps)) * args.lr_gamma ** bisect.bisect(args.lr_milestones, step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# Solutions


class NoiseStream(torch.utils.data.Dataset):
    """An endless stream of noises and labels, each a pure function of its position, for solutions drawn on the fly."""

    def __init__(self, teacher: Teacher, seed: int):
        self.teacher, self.seed = teacher, seed

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        noises = self.teacher.draw(positions, self.seed)
        batch = {"noise": noises.noise, "labels": noises.labels, "scales": noises.scales}
        return {name: values for name, values in batch.items() if values is not None}


def solved_batches(
    batches: Iterator[dict[str, torch.Tensor]], columns: list[int] | None, teacher: Teacher, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Noise, labels and states: read (`columns` are the operator's time points), or drawn by the teacher."""
    for batch in batches:
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        labels = batch.get("labels")
        if columns is None:
            states = teacher.solve(Noises(batch["noise"], labels, batch.get("scales")))
        else:
            states = batch["trajectory"][:, columns]
        yield batch["noise"], labels, states


def choose_columns(stored: list[float], wanted: list[float]) -> list[int]:
    """Where the operator's time points are among those of the solutions."""
    missing = [t for t in wanted if not np.isclose(stored, t).any()]
    if missing:
        raise ValueError(
            "`--num_time_points` and `--time_grid` must be such that the operator's time points are among those of "
            f"`--trajectories`, {stored}; {missing} are not."
        )
    return [int(np.isclose(stored, t).argmax()) for t in wanted]


class HeldOut:
    """Solutions of noises that no training sees, and the operator beside them."""

    def __init__(self, teacher: Teacher, count: int, seed: int, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self.noises = teacher.draw([HELD_OUT + i for i in range(count)], seed)
        self.states = in_batches(teacher.solve, self.noises, batch_size, device)

    def trajectories(self, unet: DSNOUNet2DModel) -> torch.Tensor:
        def draw(noises: Noises) -> torch.Tensor:
            return unet(noises.noise, noises.labels).trajectory

        return in_batches(draw, self.noises, self.batch_size, self.device)

    def errors(self, unet: DSNOUNet2DModel) -> list[float]:
        """Mean relative error of the operator at each time point."""
        pairs = zip(self.trajectories(unet).unbind(1), self.states.unbind(1), strict=True)
        return [float(relative_error(found, wanted).mean()) for found, wanted in pairs]

    def grid(self, unet: DSNOUNet2DModel, columns: int = 10) -> Image.Image:
        """Pairs of rows from the same noises: the teacher's pictures above, the operator's below."""
        count = min(2 * columns, len(self.noises)) // columns * columns or len(self.noises)
        columns = min(columns, count)
        rows = []
        for pictures in (self.states[:count, -1], self.trajectories(unet)[:count, -1]):
            pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            rows.append([Image.fromarray(picture.squeeze()) for picture in pixels])
        images = []
        for start in range(0, count, columns):
            images += [image for row in rows for image in row[start : start + columns]]
        factor = max(1, 64 // images[0].width)
        images = [i.resize((factor * i.width, factor * i.height), Image.Resampling.NEAREST) for i in images]
        return make_image_grid(images, len(images) // columns, columns)


# The run


def check(args: argparse.Namespace) -> None:
    if min(args.fit_trajectories, args.validation_trajectories) < 1:
        raise ValueError(
            "`--fit_trajectories` and `--validation_trajectories` must be at least 1, got "
            f"{args.fit_trajectories} and {args.validation_trajectories}."
        )
    if args.max_loss_weight < 1.0 or args.feature_loss_weight < 0.0:
        raise ValueError(
            "`--max_loss_weight` must be at least 1 and `--feature_loss_weight` at least 0, got "
            f"{args.max_loss_weight} and {args.feature_loss_weight}."
        )
    if args.skip_damaged_shards and args.trajectories is None:
        raise ValueError("`--skip_damaged_shards` needs `--trajectories`.")


def start_operator(
    args: argparse.Namespace, teacher: Teacher, stream, columns: list[int] | None, accelerator: Accelerator
) -> DSNOUNet2DModel:
    """The operator before its first step; a resumed run reads what was fitted for it."""
    options = {"num_time_points": args.num_time_points, "time_grid": args.time_grid, "modes": args.modes}
    options["scheduler_config"] = teacher.config

    def write_start(folder: Path) -> None:
        if columns is None:
            noises = teacher.draw(list(range(args.fit_trajectories)), args.seed)
            states = in_batches(teacher.solve, noises, args.solve_batch_size, accelerator.device)
        else:
            some = stream.rows(list(range(min(args.fit_trajectories, len(stream)))))
            states = some["trajectory"][:, columns]
            guided = teacher.guidance_scale != 1.0
            scales = torch.full((len(states),), teacher.guidance_scale) if guided else None
            noises = Noises(some["noise"], some.get("labels"), scales)
        noises, states = noises.to(accelerator.device), states.to(accelerator.device)
        timesteps, weights, missed = fit_start(teacher.unet, teacher.process, noises, states, args.solve_batch_size)
        for t, tau, rms in zip(teacher.solution_timesteps, timesteps, missed, strict=True):
            logger.info(f"State at t = {t:g} from the output at {tau:g}: root mean square error {rms:.4f}")
        model = DSNOUNet2DModel.from_unet(teacher.unet, **options, timesteps=timesteps, output_weights=weights)
        model.save_config(folder)

    with accelerator.main_process_first():
        folder = computed_once(args, "start", OF_START, write_start)
    start = DSNOUNet2DModel.load_config(folder)
    fitted = {name: start[name] for name in ("timesteps", "output_weights")}
    return DSNOUNet2DModel.from_unet(teacher.unet, **options, **fitted).requires_grad_(True)


def main(args: argparse.Namespace) -> None:
    check(args)
    accelerator = start_accelerator(args)
    set_seed(args.seed)  # the same in all processes, whose operators start alike
    device = accelerator.device
    stream, columns = None, None
    if args.trajectories is not None:
        stream = TrajectoryStream(args.trajectories, args.seed, args.skip_damaged_shards)
        for name in ("scheduler", "scheduler_options", "num_inference_steps", "guidance_scale", "label_dropout"):
            setattr(args, name, stream.facts[name])
    teacher = Teacher(args, device)
    if stream is not None:
        columns = choose_columns(stream.facts["solution_timesteps"], teacher.solution_timesteps)
        if not np.allclose(stream.facts["fingerprint"], fingerprint(teacher.unet), atol=1e-5):
            raise ValueError(
                f"`--trajectories` must be solutions of `--pretrained_model_name_or_path`; those in "
                f"{args.trajectories} are of a model with other weights."
            )
    unet = start_operator(args, teacher, stream, columns, accelerator)
    weights = loss_weights(teacher.process, teacher.solution_timesteps, args.max_loss_weight).to(device)
    feature_maps = None
    if args.feature_loss_weight > 0:
        classifier = ImageClassifier.from_pretrained(args.feature_network).eval().requires_grad_(False).to(device)
        feature_maps = classifier.feature_maps
    held_out = HeldOut(teacher, args.validation_trajectories, args.seed, args.solve_batch_size, device)

    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = learning_rates(args, optimizer)
    model, optimizer = accelerator.prepare(unet, optimizer)
    start_errors = held_out.errors(unet.eval())
    ema = EMAModel(unet.parameters(), decay=args.ema_max_decay, foreach=True)
    # The schedule is not prepared: prepared, it would step once for every process.
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(device)
    log = RunLog(accelerator, args, first_step)

    def of_average(function: Callable):
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        result = function(unet.eval())
        ema.restore(unet.parameters())
        unet.train()
        return result

    logger.info(
        f"{'Solutions drawn on the fly' if stream is None else f'{len(stream):,} solutions'}, "
        f"{unet.num_parameters():,} parameters, {total_batch_size(args, accelerator)} solutions a step, steps "
        f"{first_step + 1} to {args.max_train_steps}; relative errors at the start {_listed(start_errors)}"
    )
    source = NoiseStream(teacher, args.seed) if stream is None else stream
    batches = solved_batches(training_batches(source, args, accelerator, first_step), columns, teacher, device)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    model.train()
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_loss = torch.zeros((), device=device)
        for _ in range(args.gradient_accumulation_steps):
            noise, labels, states = next(batches)
            with accelerator.accumulate(model):
                prediction = model(noise, labels).trajectory.float()
                errors = state_errors(prediction, states, args.loss)
                if feature_maps is not None:
                    errors = errors + args.feature_loss_weight * feature_errors(prediction, states, feature_maps)
                loss = (weights * errors).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / args.gradient_accumulation_steps
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema.step(unet.parameters())

        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        log.write(step, mean_loss, learning_rate)
        progress.update()
        progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        if args.sample_steps is not None and step % args.sample_steps == 0 and accelerator.is_main_process:
            log.image("samples", of_average(held_out.grid), step)
            logger.info(f"Step {step}: held-out relative errors {_listed(of_average(held_out.errors))}")
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        finish(args, teacher, unet.eval(), held_out, start_errors, stream, log, accelerator)
    accelerator.end_training()


def _listed(errors: list[float]) -> str:
    return ", ".join(f"{error:.4f}" for error in errors)


def finish(
    args: argparse.Namespace,
    teacher: Teacher,
    unet: DSNOUNet2DModel,
    held_out: HeldOut,
    start_errors: list[float],
    stream: TrajectoryStream | None,
    log: RunLog,
    accelerator: Accelerator,
) -> None:
    """Save the averaged weights as a pipeline, with the errors on held-out noise and a card, and publish if asked."""
    DSNOPipeline(unet).save_pretrained(args.output_dir)
    grid = held_out.grid(unet)
    grid.save(args.output_dir / "samples.png")
    log.image("samples", grid, args.max_train_steps)
    own = sum(parameter.numel() for parameter in unet.temporal_layers.parameters())
    loss = args.loss.upper() + (
        f" + {args.feature_loss_weight:g} × distance in features of {Path(args.feature_network).name}"
        if args.feature_loss_weight > 0
        else ""
    )
    facts = {
        "Teacher": hub_id(args.pretrained_model_name_or_path) or "a local folder",
        "Solutions": f"{f'{len(stream):,}' if stream else 'drawn on the fly'}, of {args.num_inference_steps} steps of "
        f"{args.scheduler}, guidance scale {args.guidance_scale:g}",
        "Time points": ", ".join(f"{t:g}" for t in unet.config.solution_timesteps),
        "Timesteps that the UNet is told": ", ".join(f"{t:g}" for t in unet.config.timesteps),
        "Parameters": f"{unet.num_parameters():,}, {own:,} of them in {len(unet.temporal_layers)} temporal layers of "
        f"{args.modes} frequencies",
        "Loss": f"{loss}, √SNR weights up to {args.max_loss_weight:g}",
        "Steps": f"{args.max_train_steps:,} of {total_batch_size(args, accelerator)} solutions",
        "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run)",
        "Held-out relative error at each time point": _listed(held_out.errors(unet)),
        "The same before training": _listed(start_errors),
    }
    repository = args.hub_model_id or args.output_dir.name
    conditional = "class_labels=[0, 1, 2, 3]" if teacher.classes is not None else "batch_size=4"
    card = create_model_card(
        repository,
        "A neural operator that draws in one model call what its teacher, a diffusion model, draws in many, and the "
        "states on the way. Trained with genie_diffusers, after DSNO (https://huggingface.co/papers/2211.13449), on "
        "solutions of the teacher's probability-flow ODE, without data.",
        usage=(
            "from genie_diffusers import DSNOPipeline\n\n"
            f'pipeline = DSNOPipeline.from_pretrained("{repository}")\n'
            f'images = pipeline({conditional}).images\nimages[0].save("sample.png")'
        ),
        facts=facts,
        command=launch_command(),
        pictures={
            "samples.png": "Pairs of rows from the same noises: the teacher's pictures above, the operator's below.",
            "loss.png": "Training loss and its running mean.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
    )
    card.save(args.output_dir / "README.md")
    if args.push_to_hub:
        push_to_hub(args)


if __name__ == "__main__":
    main(parse_args())
