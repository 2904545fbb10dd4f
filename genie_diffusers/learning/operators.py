"""Neural operators from noise to the whole trajectory: where they start, and what their errors are."""

import argparse
import bisect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image

from genie_diffusers import DSNOUNet2DModel, ImageClassifier, VariancePreserving
from genie_diffusers.core.time_grids import distinct_integers
from genie_diffusers.learning.arguments import add_training_arguments
from genie_diffusers.learning.paths import Noises, in_batches, predict, relative_error
from genie_diffusers.learning.run import computed_once
from genie_diffusers.learning.solutions import Teacher, TrajectoryStream, add_teacher_arguments
from genie_diffusers.metrics import PACKAGED_CLASSIFIER
from genie_diffusers.models.derivative_head import fingerprint

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
    chosen: list[tuple[float, list[float], float]] = []
    end = len(fits)
    for m in reversed(range(len(targets))):
        end = m + int(np.argmin([missed[m] for _, _, missed in fits[m:end]]))
        chosen.insert(0, (float(fits[end][0]), fits[end][1][m], fits[end][2][m]))
    taus, output_weights, errors = zip(*chosen, strict=True)
    return list(taus), list(output_weights), list(errors)


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


class OperatorLoss:
    """
    The weighted errors of the states at all time points, and of their features if asked.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        teacher ([`Teacher`]): Of the operator.
        device (`torch.device`): Where the operator is.
    """

    def __init__(self, args: argparse.Namespace, teacher: Teacher, device: torch.device):
        self.args, self.feature_maps = args, None
        self.weights = loss_weights(teacher.process, teacher.solution_timesteps, args.max_loss_weight).to(device)
        if args.feature_loss_weight > 0:
            classifier = ImageClassifier.from_pretrained(args.feature_network).eval().requires_grad_(False)
            self.feature_maps = classifier.to(device).feature_maps

    def __call__(self, prediction: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        errors = state_errors(prediction, states, self.args.loss)
        if self.feature_maps is not None:
            features = feature_errors(prediction, states, self.feature_maps)
            errors = errors + self.args.feature_loss_weight * features
        return (self.weights * errors).mean()

    def __str__(self) -> str:
        features = (
            f" + {self.args.feature_loss_weight:g} × distance in features of {Path(self.args.feature_network).name}"
        )
        return (
            f"{self.args.loss.upper()}{features if self.feature_maps is not None else ''}, √SNR weights up to "
            f"{self.args.max_loss_weight:g}"
        )


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


def solutions_of(args: argparse.Namespace, device: torch.device) -> "Solutions":
    """What the arguments name: those in `--trajectories`, whose solver then counts, or those drawn on the fly."""
    stream = None
    if args.trajectories is not None:
        stream = TrajectoryStream(args.trajectories, args.seed, args.skip_damaged_shards)
        for name in ("scheduler", "scheduler_options", "num_inference_steps", "guidance_scale", "label_dropout"):
            setattr(args, name, stream.facts[name])
    return Solutions(Teacher(args, device), stream, args, device)


class Solutions:
    """
    The teacher's solutions: read from a folder, or drawn when they are needed.

    Args:
        teacher ([`Teacher`]): Of the operator.
        stream ([`TrajectoryStream`], *optional*): Those in a folder.
        args (`argparse.Namespace`): The arguments of the recipe.
        device (`torch.device`): Where the teacher is.

    Raises:
        ValueError: If the operator's time points are not among those of the stream, or these are of another model.
    """

    def __init__(self, teacher: Teacher, stream: TrajectoryStream | None, args: argparse.Namespace, device):
        self.teacher, self.stream, self.args, self.device = teacher, stream, args, device
        if stream is None:
            return
        self.columns = choose_columns(stream.facts["solution_timesteps"], teacher.solution_timesteps)
        if not np.allclose(stream.facts["fingerprint"], fingerprint(teacher.unet), atol=1e-5):
            raise ValueError(
                f"`--trajectories` must be solutions of `--pretrained_model_name_or_path`; those in "
                f"{args.trajectories} are of a model with other weights."
            )

    def __str__(self) -> str:
        return "drawn on the fly" if self.stream is None else f"{len(self.stream):,}"

    @property
    def source(self) -> torch.utils.data.Dataset:
        """The endless stream of batches."""
        return NoiseStream(self.teacher, self.args.seed) if self.stream is None else self.stream

    def of(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Noise, labels and states of a batch of the stream, on the device."""
        batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
        labels = batch.get("labels")
        if self.stream is None:
            states = self.teacher.solve(Noises(batch["noise"], labels, batch.get("scales")))
        else:
            states = batch["trajectory"][:, self.columns]
        return batch["noise"], labels, states

    def some(self, count: int) -> tuple[Noises, torch.Tensor]:
        """`count` solutions that are always the same: where they start, and their states."""
        if self.stream is None:
            noises = self.teacher.draw(list(range(count)), self.args.seed)
            return noises, in_batches(self.teacher.solve, noises, self.args.solve_batch_size, self.device)
        rows = self.stream.rows(list(range(min(count, len(self.stream)))))
        noises = Noises(rows["noise"], rows.get("labels"), None).at_scale(self.teacher.guidance_scale)
        return noises, rows["trajectory"][:, self.columns]

    def held_out(self) -> "HeldOut":
        """Solutions that no training sees."""
        args = self.args
        return HeldOut(self.teacher, args.validation_trajectories, args.seed, args.solve_batch_size, self.device)


def start_operator(args: argparse.Namespace, solutions: Solutions) -> DSNOUNet2DModel:
    """The operator before its first step; a resumed run reads what was fitted for it."""
    teacher = solutions.teacher
    options = {"num_time_points": args.num_time_points, "time_grid": args.time_grid, "modes": args.modes}
    options["scheduler_config"] = teacher.config

    def write_start(folder: Path) -> None:
        noises, states = solutions.some(args.fit_trajectories)
        noises, states = noises.to(solutions.device), states.to(solutions.device)
        timesteps, weights, missed = fit_start(teacher.unet, teacher.process, noises, states, args.solve_batch_size)
        for t, tau, rms in zip(teacher.solution_timesteps, timesteps, missed, strict=True):
            logger.info(f"State at t = {t:g} from the output at {tau:g}: root mean square error {rms:.4f}")
        model = DSNOUNet2DModel.from_unet(teacher.unet, **options, timesteps=timesteps, output_weights=weights)
        model.save_config(folder)

    start = DSNOUNet2DModel.load_config(computed_once(args, "start", OF_START, write_start))
    fitted = {name: start[name] for name in ("timesteps", "output_weights")}
    return DSNOUNet2DModel.from_unet(teacher.unet, **options, **fitted).requires_grad_(True)
