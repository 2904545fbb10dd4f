"""
Distil the slope of a diffusion model's noise prediction into a small derivative head (GENIE, Dockhorn et al., 2022).

The denoiser is frozen. The target is dε/dλ along the probability-flow ODE: as in the paper, by forward-mode autodiff
over sample and time together, or as the secant over a short piece of the path, which averages out how noisily a
denoiser trained at integer timesteps depends on time. The result is a head: a folder of its own with a card; see
README.md here for examples.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from conditions import (
    LatentStream,
    add_condition_arguments,
    check_guidance,
    conditioned,
    decoded,
    further_channels,
    load_unet,
    sampling_code,
    takes_text,
    with_head,
)
from genie_diffusers import DerivativeHead, GenieScheduler, GenieUNet2DModel, VariancePreserving
from genie_diffusers.model_card import create_model_card
from genie_diffusers.models.derivative_head import fingerprint
from genie_diffusers.models.exact_slope import forward_mode, slope_of_noise, to_noise_prediction
from ode_paths import Noises, in_batches, null_labels, solve
from training_utils import (
    RunLog,
    TrainingStream,
    adamw,
    add_data_arguments,
    add_training_arguments,
    check_labels,
    hub_id,
    launch_command,
    load_checkpoint,
    load_pictures,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
    training_batches,
)

logger = get_logger(__name__)

#: noise levels at which the held-out error is reported: equal parts of the training timesteps
ERROR_BINS = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil a derivative head for a diffusion model.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="The denoiser: Hub id or folder of a pipeline with a `UNet2DModel` or `UNet2DConditionModel` and a "
        "scheduler.",
    )
    parser.add_argument(
        "--target",
        choices=["jvp", "secant"],
        default="secant",
        help="The slope to learn: `jvp`, the derivative at the point (the paper); `secant`, over `--secant_width`.",
    )
    parser.add_argument("--secant_width", type=float, default=0.3, help="Width of the secant in λ = log(α/σ).")
    parser.add_argument("--derivative_head", help="Start from this head: Hub id or folder. Default: a new one.")
    parser.add_argument("--head_width", type=int, help="Channels inside a new head. Default: half the UNet's.")
    parser.add_argument(
        "--max_guidance_scale",
        type=float,
        default=1.0,
        help="Distil along guided paths too, with scales drawn from 1 up to this one. For models with classes or "
        "captions.",
    )
    parser.add_argument("--validation_samples", type=int, default=512, help="Pictures held out of the data.")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="Model calls of the sample grid.")
    add_data_arguments(parser)
    add_condition_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(label_dropout=0.25, max_captions=10_000)
    return parser.parse_args(argv)


class SlopeDistillation:
    """
    Draws points on the paths of the probability-flow ODE and labels them with the slope there.

    Args:
        unet ([`GenieUNet2DModel`] or `Conditioned`): The frozen denoiser.
        process ([`VariancePreserving`]): Its diffusion.
        prediction_type (`str`): What it predicts.
        secant_width (`float`, *optional*): Width of the secant in λ; `None` for the derivative at the point.
        max_guidance_scale (`float`): Largest weight of classifier-free guidance.
        branch_dropout (`float`): Share of points labelled for the unconditional branch.
    """

    def __init__(
        self,
        unet: GenieUNet2DModel,
        process: VariancePreserving,
        prediction_type: str,
        secant_width: float | None = None,
        max_guidance_scale: float = 1.0,
        branch_dropout: float = 0.0,
    ):
        self.unet, self.process, self.prediction_type = unet, process, prediction_type
        self.secant_width, self.max_guidance_scale = secant_width, max_guidance_scale
        self.branch_dropout = branch_dropout

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        """Timesteps from `times` uniform on [0, 1): those the denoiser was trained at."""
        if self.process.is_discrete:
            return (times * self.process.num_train_timesteps).long()
        return self.process.timestep_min + times * (self.process.timestep_max - self.process.timestep_min)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor], device: torch.device) -> tuple[dict, torch.Tensor]:
        """
        The inputs of the head and the slope it is to predict.

        Args:
            batch: From the training stream: `"images"`, `"noise"`, `"times"`, `"choices"` (two uniform numbers a
                sample) and, for class-conditional models, `"labels"`.
            device: Where the denoiser is.
        """
        timesteps = self.timesteps(batch["times"])
        images, noise = (batch[name].to(device, non_blocking=True) for name in ("images", "noise"))
        alpha, sigma = self.process.coefficients(timesteps, images)
        sample = alpha * images + sigma * noise
        host_timesteps, timesteps = timesteps, timesteps.to(device)

        labels, other = self._branches(batch, device)
        with self.unet.recording():
            noise_prediction = self._predict(sample, timesteps, labels, alpha, sigma)
            features, time_embedding = self.unet.last_call["features"], self.unet.last_call["time_embedding"]
        if other is not None:
            # The point moves along the guided path, whichever of its two branches is differentiated.
            class_branch, scale = other["labelled"], other["scale"]
            other_prediction = self._predict(sample, timesteps, other["labels"], alpha, sigma)
            null = torch.where(class_branch, other_prediction, noise_prediction)
            conditional = torch.where(class_branch, noise_prediction, other_prediction)
            unguided = noise_prediction
            noise_prediction = torch.where(scale == 1.0, unguided, null + scale * (conditional - null))
        point = (sample, noise_prediction, host_timesteps, labels, alpha, sigma)
        slope = self._derivative(*point) if self.secant_width is None else self._secant(*point)
        inputs = {
            "sample": sample,
            "noise_prediction": noise_prediction,
            "features": features.to(sample),
            "time_embedding": time_embedding.to(sample),
            "alpha": alpha,
            "sigma": sigma,
        }
        return inputs, slope

    def _derivative(self, sample, noise_prediction, timesteps, labels, alpha, sigma) -> torch.Tensor:
        """dε/dλ at the point, Eq. (3) of docs/genie.md: one forward-mode pass over (x, t)."""
        velocity = sigma**2 * sample - sigma * noise_prediction
        t_dot = torch.from_numpy(1.0 / self.process.log_snr_derivative(timesteps.numpy()))

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t, class_labels=labels).sample[:, : x.shape[1]]  # without learned variances

        times, t_dot = (values.to(sample.device, torch.float32) for values in (timesteps, t_dot))
        with forward_mode(self.unet):
            output, output_dot = torch.func.jvp(denoise, (sample, times), (velocity, t_dot))
        return slope_of_noise(output, output_dot, sample, velocity, alpha, sigma, self.prediction_type)

    def _secant(self, sample, noise_prediction, timesteps, labels, alpha, sigma) -> torch.Tensor:
        """Δε/Δλ between two points of the path, half of `secant_width` to each side (less at the ends)."""
        process, middle = self.process, timesteps.numpy().astype(np.float64)
        lowest, highest = process.log_snr(np.array([process.timestep_max, process.timestep_min]))
        ends, predictions = [], []
        for side, rounded in ((0.5, np.floor), (-0.5, np.ceil)):
            log_snr = np.clip(process.log_snr(middle) + side * self.secant_width, lowest, highest)
            end = process.timestep(log_snr)
            if process.is_discrete:  # outwards, so that the two ends differ
                end = np.clip(rounded(end), process.timestep_min, process.timestep_max)
            end = torch.from_numpy(end)
            alpha_end, sigma_end = process.coefficients(end, sample)
            # A DDIM step along the (guided) path. Its second-order error is the same on both sides and cancels.
            at_end = alpha_end * (sample / alpha + (sigma_end / alpha_end - sigma / alpha) * noise_prediction)
            times = (end.long() if process.is_discrete else end.float()).to(sample.device)
            predictions.append(self._predict(at_end, times, labels, alpha_end, sigma_end))
            ends.append(process.log_snr(end.numpy()))
        width = torch.from_numpy(ends[0] - ends[1]).to(sample).reshape(alpha.shape)
        return (predictions[0] - predictions[1]) / width

    def _predict(self, sample, timesteps, labels, alpha, sigma) -> torch.Tensor:
        output = self.unet(sample, timesteps, class_labels=labels).sample[:, : sample.shape[1]]
        return to_noise_prediction(output, sample, alpha, sigma, self.prediction_type)

    def _branches(
        self, batch: dict[str, torch.Tensor], device: torch.device
    ) -> tuple[torch.Tensor | None, dict | None]:
        """The labels of the branches to differentiate, and what their guided path is made of, if any is guided."""
        if "labels" not in batch:
            return None, None
        branch, guidance = batch["choices"].T.to(device)
        true_labels = batch["labels"].to(device)
        null = null_labels(self.unet, true_labels)
        labelled = branch >= self.branch_dropout
        labels = torch.where(labelled, true_labels, null)
        if self.max_guidance_scale == 1.0:
            return labels, None
        # Half of the points follow their own path, the rest guided ones with a scale uniform up to the largest.
        scale = 1.0 + (self.max_guidance_scale - 1.0) * (2.0 * guidance - 1.0).clamp_min(0.0)
        shape = (-1, 1, 1, 1)
        return labels, {
            "labels": torch.where(labelled, null, true_labels),
            "labelled": labelled.reshape(shape),
            "scale": scale.reshape(shape).float(),
        }


@torch.no_grad()
def held_out_error(
    distillation: SlopeDistillation, head: DerivativeHead, stream: TrainingStream, count: int, batch_size: int, device
) -> np.ndarray:
    """Relative error ‖k − dε/dλ‖/‖dε/dλ‖ in each of `ERROR_BINS` equal parts of the training timesteps."""
    squares = np.zeros((2, ERROR_BINS))
    for start in range(0, count, batch_size):
        batch = stream.__getitems__(list(range(start, min(start + batch_size, count))))
        inputs, slope = distillation(batch, device)
        error = (head(**inputs) - slope).double().square().flatten(1).sum(1).cpu().numpy()
        energy = slope.double().square().flatten(1).sum(1).cpu().numpy()
        bins = (batch["times"].numpy() * ERROR_BINS).astype(int)
        for row, values in zip(squares, (error, energy), strict=True):
            np.add.at(row, bins, values)
    return np.sqrt(squares[0] / np.maximum(squares[1], np.finfo(float).tiny))


def plot_error(error: np.ndarray, process: VariancePreserving, path) -> None:
    """The held-out error against the noise level of the middle of each bin."""
    import matplotlib.figure

    span = process.timestep_max - process.timestep_min
    middles = process.timestep_min + (np.arange(ERROR_BINS) + 0.5) / ERROR_BINS * span
    figure = matplotlib.figure.Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(process.log_snr(middles), error, marker="o")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate("no slope at all", (0.02, 1.0), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.set(xlabel="λ = log(α/σ)", ylabel="relative error of dε/dλ", ylim=(0, 1.15))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def sample_grid(unet, scheduler_config: dict, args: argparse.Namespace, device: torch.device) -> Image.Image:
    """Two rows of pictures from the same noise: with the head, and head-free."""
    config, generator = unet.config, torch.Generator().manual_seed(args.seed)
    noise = torch.randn((8, config.in_channels, config.sample_size, config.sample_size), generator=generator)
    classes, scales = config.num_class_embeds, None
    if args.max_guidance_scale > 1:
        scales = torch.full((8,), _shown_scale(args))
    noises = Noises(noise, None if classes is None else torch.arange(8) % max(1, classes - 1), scales)
    samples = []
    for source in (unet, None):
        scheduler = GenieScheduler.from_config(
            scheduler_config, time_grid="linear", analytical_first_step=True, clip_sample=False
        )
        scheduler.attach(source)
        samples.append(
            in_batches(
                lambda batch, scheduler=scheduler: solve(unet, scheduler, args.num_inference_steps, batch),
                noises,
                args.train_batch_size,
                device,
            )
        )
    images = decoded(unet, torch.cat(samples), args.pretrained_model_name_or_path, device)
    return make_image_grid(VaeImageProcessor().postprocess(images), 2, 8)


def _shown_scale(args: argparse.Namespace) -> float:
    return (1 + args.max_guidance_scale) / 2


def write_card(args: argparse.Namespace, unet, facts: dict) -> None:
    repository = args.hub_model_id or args.output_dir.name
    base = hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"
    card = create_model_card(
        repository,
        "A derivative head for GENIE (https://huggingface.co/papers/2210.05475), distilled with genie_diffusers: it "
        f"predicts how the noise prediction of the denoiser of {base} changes along the sampling path, so that "
        "`GenieScheduler` takes second-order steps at one model call each.",
        usage=sampling_code(
            args, unet, args.num_inference_steps, time_grid="linear", analytical_first_step=True, clip_sample=False
        ),
        facts=facts,
        command=launch_command(),
        pictures={
            "samples.png": f"{args.num_inference_steps} model calls at guidance scale {_shown_scale(args):g}: with "
            "the head (top), without (bottom).",
            "error.png": "Error of the predicted slope on held-out pictures, by noise level.",
            "loss.png": "Training loss and its running mean.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
        dataset=hub_id(args.dataset_name),
    )
    card.save(args.output_dir / "README.md")


def check(args: argparse.Namespace, unet: UNet2DModel) -> None:
    check_guidance(args, unet)
    if args.target == "secant" and not args.secant_width > 0:
        raise ValueError(f"`--secant_width` must be positive, got {args.secant_width}.")
    size = unet.config.sample_size
    if not takes_text(unet) and args.resolution not in (None, size):
        raise ValueError(f"`--resolution` must be {size}, the model's `sample_size`, got {args.resolution}.")
    if args.random_flip and (takes_text(unet) or further_channels(unet)):
        raise ValueError("`--random_flip` must be left out where pictures have captions or pictures beside them.")


def streams(args: argparse.Namespace, unet, latents: torch.Tensor | None) -> tuple[TrainingStream, TrainingStream]:
    """The training pictures, and those held out of them."""
    classes, size = unet.config.num_class_embeds, unet.config.sample_size
    pictures = latents
    if pictures is None:
        pictures = load_pictures(
            args.dataset_name,
            size,
            unet.config.in_channels,
            dataset_config_name=args.dataset_config_name,
            dataset_split=args.dataset_split,
            image_column=args.image_column,
            label_column=None if classes is None else args.label_column,
            cache_dir=args.cache_dir,
        )
        if classes is not None:
            has_null_class = args.label_dropout > 0 or args.max_guidance_scale > 1
            check_labels(pictures.unique("label"), classes - has_null_class)
    total = len(pictures)
    if not 0 < args.validation_samples < total:
        raise ValueError(f"`--validation_samples` must be between 1 and {total - 1}, got {args.validation_samples}.")
    count = total - args.validation_samples
    if latents is not None:
        train, held_out = (range(count), args.seed), (range(count, total), args.seed + 1)
        return LatentStream(latents, *train), LatentStream(latents, *held_out)
    shape = (unet.config.in_channels, size, size)
    return (
        TrainingStream(pictures.select(range(count)), shape, shape, args.seed, args.random_flip),
        TrainingStream(pictures.select(range(count, total)), shape, shape, args.seed + 1),
    )


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed, device_specific=True)
    unet = load_unet(args.pretrained_model_name_or_path)
    check(args, unet)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler = GenieScheduler.from_config(scheduler_config)
    if args.derivative_head is None:
        head = DerivativeHead.for_unet(unet, scheduler.config, width=args.head_width)
    elif args.head_width is None:
        head = DerivativeHead.from_pretrained(args.derivative_head)
        head.check_process(scheduler.process, scheduler.config.prediction_type)
        head.register_to_config(fingerprint=fingerprint(unet))
    else:
        raise ValueError("`--head_width` is that of `--derivative_head`, leave it out.")
    unet = with_head(unet, head).requires_grad_(False).to(accelerator.device)
    head.requires_grad_(True)
    with accelerator.main_process_first():
        unet, latents = conditioned(unet, args, accelerator.mixed_precision, accelerator.device, latents=True)
        stream, validation = streams(args, unet, latents)
    distillation = SlopeDistillation(
        unet,
        scheduler.process,
        scheduler.config.prediction_type,
        args.secant_width if args.target == "secant" else None,
        args.max_guidance_scale,
        args.label_dropout,
    )

    optimizer = adamw(args, head.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(head, optimizer)
    ema = EMAModel(head.parameters(), decay=args.ema_max_decay, foreach=True)
    # The schedule is not prepared: prepared, it would step once for every process.
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(accelerator.device)
    log = RunLog(accelerator, args, first_step)
    count = len(stream.pictures)
    logger.info(
        f"{count} pictures, a head of {head.num_parameters():,} parameters on a UNet of "
        f"{unet.num_parameters() - head.num_parameters():,}, {total_batch_size(args, accelerator)} points a step, "
        f"steps {first_step + 1} to {args.max_train_steps}"
    )
    batches = training_batches(stream, args, accelerator, first_step)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            inputs, slope = distillation(next(batches), accelerator.device)
            with accelerator.accumulate(model):
                # Mean squared error in dε/dλ is the paper's, γ²-weighted in dε/dγ = −(1/γ) dε/dλ.
                loss = F.mse_loss(model(**inputs).float(), slope)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / args.gradient_accumulation_steps
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
        finish(args, accelerator, unet, head, ema, distillation, validation, scheduler, log, count)
    accelerator.end_training()


def finish(
    args: argparse.Namespace,
    accelerator: Accelerator,
    unet: GenieUNet2DModel,
    head: DerivativeHead,
    ema: EMAModel,
    distillation: SlopeDistillation,
    validation: TrainingStream,
    scheduler: GenieScheduler,
    log: RunLog,
    count: int,
) -> None:
    """Save the averaged weights with their held-out error, a sample grid and a card, and publish them if asked."""
    ema.copy_to(head.parameters())
    head.eval()
    head.save_pretrained(args.output_dir)
    error = held_out_error(
        distillation, head, validation, args.validation_samples, args.train_batch_size, accelerator.device
    )
    plot_error(error, scheduler.process, args.output_dir / "error.png")
    grid = sample_grid(unet, scheduler.config, args, accelerator.device)
    grid.save(args.output_dir / "samples.png")
    log.image("samples", grid, args.max_train_steps)
    facts = {
        "Base model": hub_id(args.pretrained_model_name_or_path) or "a local folder",
        "Data": f"{hub_id(args.dataset_name) or 'a local folder'}, {count:,} pictures",
        "Parameters": f"{head.num_parameters():,} on {unet.num_parameters() - head.num_parameters():,} of the UNet",
        "Steps": f"{args.max_train_steps:,} of {total_batch_size(args, accelerator)} points",
        "Target": "derivative at the point" if args.target == "jvp" else f"secant over Δλ = {args.secant_width:g}",
        "Largest guidance scale": f"{args.max_guidance_scale:g}",
        "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run)",
        "Held-out relative error of dε/dλ": ", ".join(f"{value:.2f}" for value in error)
        + f" (tenths of the timesteps, from clean to noisy; {args.validation_samples} pictures)",
    }
    write_card(args, unet, facts)
    if args.push_to_hub:
        push_to_hub(args)


if __name__ == "__main__":
    main(parse_args())
