"""Slopes of a frozen denoiser's noise prediction, and derivative heads that they are distilled into."""

import argparse

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image

from genie_diffusers import DerivativeHead, GenieScheduler, VariancePreserving
from genie_diffusers.learning.arguments import add_condition_arguments, add_data_arguments, add_training_arguments
from genie_diffusers.learning.conditions import LatentStream, check_guidance, decoded, further_channels, takes_text
from genie_diffusers.learning.data import TrainingStream, check_labels, pictures_of
from genie_diffusers.learning.paths import Noises, in_batches, null_labels, solve
from genie_diffusers.models.derivative_head import fingerprint
from genie_diffusers.models.exact_slope import forward_mode, slope_of_noise, to_noise_prediction, velocity_of

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
        unet,
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
        slope = self._derivative(*point) if self.secant_width is None else self._secant(*point, self.secant_width)
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
        velocity = velocity_of(sample, noise_prediction, sigma, self.prediction_type)
        t_dot = torch.from_numpy(1.0 / self.process.log_snr_derivative(timesteps.numpy()))

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t, class_labels=labels).sample[:, : x.shape[1]]  # without learned variances

        times, t_dot = (values.to(sample.device, torch.float32) for values in (timesteps, t_dot))
        with forward_mode(self.unet):
            (output, output_dot, *_) = torch.func.jvp(denoise, (sample, times), (velocity, t_dot))
        return slope_of_noise(output, output_dot, sample, velocity, alpha, sigma, self.prediction_type)

    def _secant(self, sample, noise_prediction, timesteps, labels, alpha, sigma, secant_width: float) -> torch.Tensor:
        """Δε/Δλ between two points of the path, half of `secant_width` to each side (less at the ends)."""
        process, middle = self.process, timesteps.numpy().astype(np.float64)
        lowest, highest = process.log_snr(np.array([process.timestep_max, process.timestep_min]))
        ends, predictions = [], []
        for side, rounded in ((0.5, np.floor), (-0.5, np.ceil)):
            log_snr = np.clip(process.log_snr(middle) + side * secant_width, lowest, highest)
            reached = process.timestep(log_snr)
            if process.is_discrete:  # outwards, so that the two ends differ
                reached = np.clip(rounded(reached), process.timestep_min, process.timestep_max)
            end = torch.from_numpy(reached)
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
        scales = torch.full((8,), shown_scale(args))
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


def shown_scale(args: argparse.Namespace) -> float:
    """The guidance scale of the sample grid."""
    return (1 + args.max_guidance_scale) / 2


def check(args: argparse.Namespace, unet: UNet2DModel) -> None:
    check_guidance(args, unet)
    if args.target == "secant" and not args.secant_width > 0:
        raise ValueError(f"`--secant_width` must be positive, got {args.secant_width}.")
    size = unet.config.sample_size
    if not takes_text(unet) and args.resolution not in (None, size):
        raise ValueError(f"`--resolution` must be {size}, the model's `sample_size`, got {args.resolution}.")
    if args.random_flip and (takes_text(unet) or further_channels(unet)):
        raise ValueError("`--random_flip` must be left out where pictures have captions or pictures beside them.")


def head_of(args: argparse.Namespace, unet, scheduler: GenieScheduler) -> DerivativeHead:
    """A new head of the denoiser, or the one that learning goes on from."""
    if args.derivative_head is None:
        return DerivativeHead.for_unet(unet, scheduler.config, width=args.head_width)
    if args.head_width is not None:
        raise ValueError("`--head_width` is that of `--derivative_head`, leave it out.")
    head = DerivativeHead.from_pretrained(args.derivative_head)
    head.check_process(scheduler.process, scheduler.config.prediction_type)
    head.register_to_config(fingerprint=fingerprint(unet))
    return head


def streams(args: argparse.Namespace, unet, latents: torch.Tensor | None) -> tuple[TrainingStream, TrainingStream]:
    """The training pictures, and those held out of them."""
    classes, size = unet.config.num_class_embeds, unet.config.sample_size

    def parts(total: int) -> tuple[range, range]:
        count = total - args.validation_samples
        if not 0 < count < total:
            raise ValueError(
                f"`--validation_samples` must be between 1 and {total - 1}, got {args.validation_samples}."
            )
        return range(count), range(count, total)

    if latents is not None:
        train, held_out = parts(len(latents))
        return LatentStream(latents, train, args.seed), LatentStream(latents, held_out, args.seed + 1)
    pictures = pictures_of(args, size, unet.config.in_channels, labelled=classes is not None)
    if classes is not None:
        has_null_class = args.label_dropout > 0 or args.max_guidance_scale > 1
        check_labels(pictures.unique("label"), classes - has_null_class)
    train, held_out = parts(len(pictures))
    shape = (unet.config.in_channels, size, size)
    return (
        TrainingStream(pictures.select(train), shape, shape, args.seed, args.random_flip),
        TrainingStream(pictures.select(held_out), shape, shape, args.seed + 1),
    )
