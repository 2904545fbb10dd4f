"""
Train a pixel-space diffusion model from a data set of pictures, class-conditional if its UNet is.

The result is a pipeline folder with a card; see README.md here for examples. A run that is killed at any moment goes
on from its last checkpoint with the loss curve it would have had, and the curve does not depend on the number of
processes that share a batch.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from genie_diffusers import (
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMPipeline,
    GeniePipeline,
    GenieScheduler,
    VariancePreserving,
)
from genie_diffusers.model_card import create_model_card
from genie_diffusers.processes.linear_diffusion import inverse
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


class VariancePreservingTraining:
    """
    `--process vp`: x_t = α_t x_0 + σ_t z on diffusers' timesteps, the diffusion of nearly all models on the Hub.

    Args:
        scheduler_config (`dict`): Configuration of a diffusers scheduler: its betas and `prediction_type`.
    """

    pipeline_class: type[GeniePipeline] = GeniePipeline
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
    scheduler_class: type

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
    images = pipeline(
        batch_size=rows * columns,
        num_inference_steps=args.ddpm_num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        **condition,
    ).images
    unet.train()
    return make_image_grid(images, rows, columns)


def write_card(
    args: argparse.Namespace, diffusion: VariancePreservingTraining, facts: dict, conditional: bool
) -> None:
    repository = args.hub_model_id or args.output_dir.name
    call = "pipeline(class_labels=[0, 1, 2, 3], " if conditional else "pipeline(batch_size=4, "
    card = create_model_card(
        repository,
        f"{'A class-conditional' if conditional else 'An unconditional'} pixel-space diffusion model trained with "
        f"genie_diffusers. {diffusion.summary}",
        usage=(
            f"from genie_diffusers import {diffusion.pipeline_class.__name__}\n\n"
            f'pipeline = {diffusion.pipeline_class.__name__}.from_pretrained("{repository}")\n'
            f'images = {call}num_inference_steps=20).images\nimages[0].save("sample.png")'
        ),
        facts=facts,
        command=launch_command(),
        pictures={
            "samples.png": "Samples of the averaged weights.",
            "loss.png": "Training loss and its running mean.",
        },
        base_model=hub_id(args.pretrained_model_name_or_path),
        dataset=hub_id(args.dataset_name),
    )
    card.save(args.output_dir / "README.md")


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed, device_specific=True)
    unet, schedule = load_model(args)
    diffusion = PROCESSES[args.process](schedule)
    classes = num_classes(unet, args.label_dropout)
    resolution, in_channels = unet.config.sample_size, unet.config.in_channels
    image_channels = diffusion.image_channels(in_channels)

    with accelerator.main_process_first():
        pictures = load_pictures(
            args.dataset_name,
            resolution,
            image_channels,
            dataset_config_name=args.dataset_config_name,
            dataset_split=args.dataset_split,
            image_column=args.image_column,
            label_column=None if classes is None else args.label_column,
            cache_dir=args.cache_dir,
        )
    if classes is not None:
        check_labels(pictures.unique("label"), classes)
    stream = TrainingStream(
        pictures,
        (image_channels, resolution, resolution),
        (in_channels, resolution, resolution),
        args.seed,
        args.random_flip,
        args.label_dropout,
        null_class=classes,
    )

    optimizer = adamw(args, unet.parameters())
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=args.ema_max_decay, foreach=True)
    # The schedule is not prepared: prepared, it would step once for every process.
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(accelerator.device)
    log = RunLog(accelerator, args, first_step)

    def averaged_samples():
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        grid = sample_grid(diffusion, unet, classes, args)
        ema.restore(unet.parameters())
        return grid

    logger.info(
        f"{len(pictures)} pictures of {resolution}x{resolution}, {unet.num_parameters():,} parameters, "
        f"{total_batch_size(args, accelerator)} pictures a step, steps {first_step + 1} to {args.max_train_steps}"
    )
    batches = training_batches(stream, args, accelerator, first_step)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    model.train()
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            # The timesteps stay on the host until the model needs them: their coefficients are computed there.
            timesteps = diffusion.timesteps(batch["times"])
            images, noise = (batch[name].to(accelerator.device, non_blocking=True) for name in ("images", "noise"))
            labels = None if classes is None else batch["labels"].to(accelerator.device, non_blocking=True)
            noisy = diffusion.add_noise(images, noise, timesteps)
            target = diffusion.target(images, noise, timesteps)
            with accelerator.accumulate(model):
                prediction = model(noisy, timesteps.to(accelerator.device), class_labels=labels).sample
                loss = F.mse_loss(prediction.float(), target)
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
            log.image("samples", averaged_samples(), step)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        diffusion.pipeline(unet).save_pretrained(args.output_dir)
        grid = sample_grid(diffusion, unet, classes, args)
        grid.save(args.output_dir / "samples.png")
        log.image("samples", grid, args.max_train_steps)
        facts = {
            "Data": f"{hub_id(args.dataset_name) or 'a local folder'}, {len(pictures):,} pictures",
            "Resolution": f"{resolution}x{resolution}, averaged over areas",
            "Parameters": f"{unet.num_parameters():,}",
            "Classes": "none" if classes is None else f"{classes}",
            "Null class": f"{classes}" if args.label_dropout > 0 else "none",
            "Prediction type": diffusion.prediction_type,
            "Steps": f"{args.max_train_steps:,} of {total_batch_size(args, accelerator)} pictures",
            "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.5f} (mean over the last fiftieth of the run)",
        }
        write_card(args, diffusion, facts, conditional=classes is not None)
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
