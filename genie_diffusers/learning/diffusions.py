"""Pixel-space diffusion models of several processes: what is diffused, what is predicted, what is drawn from it."""

import argparse
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import make_image_grid

from genie_diffusers import (
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMPipeline,
    GeniePipeline,
    GenieScheduler,
    VariancePreserving,
)
from genie_diffusers.learning.arguments import add_data_arguments, add_training_arguments
from genie_diffusers.processes.linear_diffusion import inverse


class VariancePreservingTraining:
    """
    `--process vp`: x_t = α_t x_0 + σ_t z on diffusers' timesteps, the diffusion of nearly all models on the Hub.

    Args:
        scheduler_config (`dict`): Configuration of a diffusers scheduler: its betas and `prediction_type`.
    """

    pipeline_class: type[GeniePipeline] = GeniePipeline
    process: Any  # the diffusion, of whichever class
    #: what the card says of the model
    summary = "It is a `UNet2DModel` that any scheduler of diffusers can sample from."

    def __init__(self, scheduler_config: dict):
        self.scheduler = GenieScheduler.from_config(scheduler_config)
        self.process = VariancePreserving.from_config(self.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type

    @staticmethod
    def image_channels(in_channels: int) -> int:
        """Channels of a picture whose diffused state has `in_channels` channels."""
        return in_channels

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        """Training timesteps from `times` uniform on [0, 1): integers, or reals for a continuous schedule."""
        if self.process.is_discrete:
            return (times * self.process.num_train_timesteps).long()
        return self.process.timestep_min + times * (self.process.timestep_max - self.process.timestep_min)

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The diffused state that the model sees."""
        return self.process.add_noise(images, noise, timesteps)

    def target(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model is to predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return images
        alpha, sigma = self.process.coefficients(timesteps, images)
        return alpha * noise - sigma * images

    def pipeline(self, unet: UNet2DModel) -> GeniePipeline:
        """The pipeline that is saved."""
        return self.pipeline_class(unet, self.scheduler)

    def sampler(self, unet: UNet2DModel) -> GeniePipeline:
        """The pipeline that draws the sample grids, with a solver that needs no head."""
        return GeniePipeline(unet, DPMSolverMultistepScheduler.from_config(self.scheduler.config))


class LinearDiffusionTraining(VariancePreservingTraining):
    """
    u_t = Ψ(t, 0) u_0 + R_t z, and the model predicts z, preconditioned: the score is −R^{−T} ε (gDDIM's K = R).

    Args:
        scheduler_config (`dict`):
            Configuration of a `scheduler_class`, or of another process, of which `sample_size` alone means something.
    """

    pipeline_class = GDDIMPipeline
    scheduler_class: type[GDDIMBlurringScheduler] | type[GDDIMCLDScheduler]

    def __init__(self, scheduler_config: dict):
        if scheduler_config.get("_class_name") == self.scheduler_class.__name__:
            self.scheduler = self.scheduler_class.from_config(scheduler_config, preconditioned=True)
        else:
            keys = self.scheduler_class.process_class.CONFIG_KEYS
            given = {key: scheduler_config[key] for key in keys if key in scheduler_config}
            self.scheduler = self.scheduler_class(**given, preconditioned=True)
        self.process = self.scheduler.process
        self.prediction_type = "epsilon of K = R, preconditioned"

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        scaling, _, _ = self.process.preconditioning(timesteps.numpy())
        state = self.process.add_noise(images, noise, timesteps)
        return self.process.combine([torch.from_numpy(scaling).to(noise)], [state])

    def target(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The output y with ε = A u + B y, where ε is the noise; in double, since the two nearly cancel."""
        _, of_state, of_output = self.process.preconditioning(timesteps.numpy())
        to_output = inverse(of_output)
        weights = [torch.from_numpy(weight).to(noise.device) for weight in (to_output, -to_output @ of_state)]
        state = self.process.add_noise(images.double(), noise.double(), timesteps)
        return self.process.combine(weights, [noise.double(), state]).to(noise.dtype)

    def sampler(self, unet: UNet2DModel) -> GeniePipeline:
        return self.pipeline(unet)


class BlurringTraining(LinearDiffusionTraining):
    """`--process blurring`: pictures are blurred while they are noised."""

    scheduler_class = GDDIMBlurringScheduler
    summary = "Its diffusion blurs pictures while it adds noise (https://huggingface.co/papers/2209.05557)."


class LangevinTraining(LinearDiffusionTraining):
    """`--process cld`: pictures coupled to velocities, twice the channels."""

    scheduler_class = GDDIMCLDScheduler
    summary = "Its diffusion couples pictures to velocities (https://huggingface.co/papers/2112.07068)."

    @staticmethod
    def image_channels(in_channels: int) -> int:
        return in_channels // 2


#: Another diffusion is a class with the members of the first one.
PROCESSES = {"vp": VariancePreservingTraining, "cld": LangevinTraining, "blurring": BlurringTraining}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a pixel-space diffusion model.")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--pretrained_model_name_or_path", help="Start from these weights: Hub id or folder, a pipeline or a UNet."
    )
    weights.add_argument(
        "--model_config_name_or_path", help="Start from random weights with the configuration of this UNet."
    )
    parser.add_argument("--process", choices=sorted(PROCESSES), default="vp", help="The diffusion process.")
    parser.add_argument(
        "--prediction_type",
        choices=["epsilon", "sample", "v_prediction"],
        help="What the model predicts. Default: as the pretrained pipeline, or epsilon.",
    )
    parser.add_argument("--ddpm_num_steps", type=int, help="Default: as the pretrained pipeline, or 1000.")
    parser.add_argument("--ddpm_beta_schedule", help="Default: as the pretrained pipeline, or linear.")
    parser.add_argument("--sample_steps", type=int, help="Log a sample grid every so many steps. Default: at the end.")
    parser.add_argument("--eval_batch_size", type=int, default=40, help="Pictures in a sample grid.")
    parser.add_argument("--ddpm_num_inference_steps", type=int, default=25, help="Solver steps of a sample grid.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Guidance of a sample grid; 1 is none.")
    add_data_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_args(argv)


def load_model(args: argparse.Namespace) -> tuple[UNet2DModel, dict]:
    """The UNet to train and the configuration of its noise schedule.

    Raises:
        ValueError: If the UNet and the arguments do not fit each other.
    """
    name = args.pretrained_model_name_or_path or args.model_config_name_or_path
    try:
        schedule, subfolder = GenieScheduler.load_config(name, subfolder="scheduler"), "unet"
    except OSError:  # a bare UNet
        schedule, subfolder = {}, None
    if args.pretrained_model_name_or_path is not None:
        unet = UNet2DModel.from_pretrained(name, subfolder=subfolder)
    else:
        unet = UNet2DModel.from_config(UNet2DModel.load_config(name, subfolder=subfolder))
    asked = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    schedule.update({key: value for key, value in asked.items() if value is not None})

    resolution = unet.config.sample_size if args.resolution is None else args.resolution
    factor = 2 ** (len(unet.config.down_block_types) - 1)
    if not isinstance(resolution, int) or resolution % factor != 0:
        raise ValueError(f"`--resolution` must be a multiple of {factor} for this UNet, got {resolution}.")
    unet.register_to_config(sample_size=resolution)
    if args.process != "vp":
        if schedule.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"`--prediction_type` must be epsilon for `--process {args.process}`, got "
                f"{schedule['prediction_type']}."
            )
        schedule["sample_size"] = resolution
    if args.process == "cld" and unet.config.in_channels % 2 == 1:  # a UNet for pictures, which have 1 or 3 channels
        unet = with_velocities(unet)
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"The UNet must have as many output channels as input channels, {unet.config.in_channels}, got "
            f"{unet.config.out_channels}: learned variances are not trained here."
        )
    if args.label_dropout > 0 and unet.config.num_class_embeds is None:
        raise ValueError(
            f"`--label_dropout` must be 0 for a UNet without `num_class_embeds`, got {args.label_dropout}."
        )
    return unet, schedule


def with_velocities(unet: UNet2DModel) -> UNet2DModel:
    """The UNet with twice the channels, stacked `[x, v]`, that computes for x what `unet` does and 0 for v."""
    channels = {name: 2 * unet.config[name] for name in ("in_channels", "out_channels")}
    wide = UNet2DModel.from_config({**unet.config, **channels})
    weights = unet.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], 0 * weights["conv_in.weight"]], dim=1)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([weights[name], 0 * weights[name]])
    wide.load_state_dict(weights)
    return wide


def num_classes(unet: UNet2DModel, label_dropout: float) -> int | None:
    """Classes that data may have: all class embeddings, without the null class if labels are dropped."""
    if unet.config.num_class_embeds is None:
        return None
    return unet.config.num_class_embeds - (1 if label_dropout > 0 else 0)


def sample_grid(
    diffusion: VariancePreservingTraining, unet: UNet2DModel, classes: int | None, args: argparse.Namespace
):
    """Pictures from the same noise at every call, one class a column if the model has classes."""
    columns = min(classes or 8, 10, args.eval_batch_size)
    rows = args.eval_batch_size // columns
    pipeline = diffusion.sampler(unet)
    pipeline.set_progress_bar_config(disable=True)
    condition = {}
    if classes is not None:
        condition = {"class_labels": list(range(columns)) * rows, "guidance_scale": args.guidance_scale}
    unet.eval()
    (images, *_) = pipeline(
        batch_size=rows * columns,
        num_inference_steps=args.ddpm_num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        **condition,
        return_dict=False,
    )
    unet.train()
    return make_image_grid(images, rows, columns)
