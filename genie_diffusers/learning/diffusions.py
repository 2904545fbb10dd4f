"""Pixel-space diffusion models of several processes: what is diffused, what is predicted, what is drawn from it."""

import argparse
from typing import Any, TypeAlias

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import make_image_grid

from genie_diffusers import (
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMPipeline,
    GenieDiTPipeline,
    GeniePipeline,
    GenieScheduler,
    RectifiedFlow,
    VariancePreserving,
)
from genie_diffusers.learning.arguments import add_data_arguments, add_training_arguments
from genie_diffusers.processes.linear_diffusion import inverse

Denoiser: TypeAlias = UNet2DModel | DiTTransformer2DModel

#: the class to train, by the one that a configuration names
DENOISERS: dict[str, type[Denoiser]] = {
    "UNet2DModel": UNet2DModel,
    "GenieUNet2DModel": UNet2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
}


class VariancePreservingTraining:
    """
    `--process vp`: x_t = α_t x_0 + σ_t z on diffusers' timesteps, the diffusion of nearly all models on the Hub.

    Args:
        scheduler_config (`dict`): Configuration of a diffusers scheduler: its betas and `prediction_type`.
    """

    pipeline_class: type[GeniePipeline] = GeniePipeline
    process: Any  # the diffusion, of whichever class
    #: what the card says of the model
    summary = "Any scheduler of diffusers can sample from it."

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

    def pipeline(self, model: Denoiser) -> DiffusionPipeline:
        """The pipeline that is saved."""
        pipeline_class = GenieDiTPipeline if isinstance(model, DiTTransformer2DModel) else self.pipeline_class
        return pipeline_class(model, self.scheduler)

    def sampler(self, model: Denoiser) -> DiffusionPipeline:
        """The pipeline that draws the sample grids, with a solver that needs no head."""
        pipeline = self.pipeline(model)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        return pipeline


class FlowMatchingTraining(VariancePreservingTraining):
    """
    `--process flow`: x_t = (1 − σ) x_0 + σ z with σ = t/N, and the model predicts the velocity z − x_0 = dx_t/dσ.

    Velocities are easy at both ends of the path: near the data the model has only to see the noise, near pure noise
    only to know the mean picture. Training times are therefore logit-normal, σ = 1/(1 + e^−s) with s ~ N(0, 1), most
    of them in between: the best of the distributions that Esser et al. compare (2024,
    https://huggingface.co/papers/2403.03206).

    Args:
        scheduler_config (`dict`):
            Configuration of a [`FlowMatchEulerDiscreteScheduler`], or of a scheduler of another diffusion, of which
            `num_train_timesteps` alone means something.
    """

    summary = (
        "It is a flow-matching model: it predicts the velocity z − x_0 along the straight path from a picture x_0 to "
        "noise z, for the flow-matching schedulers of diffusers and any other with `use_flow_sigmas`."
    )

    def __init__(self, scheduler_config: dict):
        if "shift" in scheduler_config:
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        else:
            steps = scheduler_config.get("num_train_timesteps", 1000)
            self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
        self.process = RectifiedFlow(self.scheduler.config.num_train_timesteps)
        self.prediction_type = "flow_prediction"

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        # 1 − u is inside (0, 1], so that σ is, and data without noise is never asked for.
        return self.process.num_train_timesteps * torch.special.ndtri(1 - times).sigmoid()

    def target(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - images

    def sampler(self, model: Denoiser) -> DiffusionPipeline:
        pipeline = self.pipeline(model)
        pipeline.scheduler = GenieScheduler.from_config(self.scheduler.config)
        return pipeline


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

    def sampler(self, model: Denoiser) -> DiffusionPipeline:
        return self.pipeline(model)


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
PROCESSES = {
    "vp": VariancePreservingTraining,
    "flow": FlowMatchingTraining,
    "cld": LangevinTraining,
    "blurring": BlurringTraining,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a pixel-space diffusion model.")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--pretrained_model_name_or_path", help="Start from these weights: Hub id or folder, a pipeline or a model."
    )
    weights.add_argument(
        "--model_config_name_or_path", help="Start from random weights with the configuration of this model."
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


def load_model(args: argparse.Namespace) -> tuple[Denoiser, dict]:
    """The model to train and the configuration of its noise schedule.

    Raises:
        ValueError: If the model and the arguments do not fit each other.
    """
    name = args.pretrained_model_name_or_path or args.model_config_name_or_path
    try:
        schedule = GenieScheduler.load_config(name, subfolder="scheduler")
        subfolder = "transformer" if "transformer" in DiffusionPipeline.load_config(name) else "unet"
    except OSError:  # a bare model
        schedule, subfolder = {}, None
    config = UNet2DModel.load_config(name, subfolder=subfolder)
    if config["_class_name"] not in DENOISERS:
        raise ValueError(f"The model must be one of {', '.join(DENOISERS)}, got {config['_class_name']} in {name}.")
    denoiser = DENOISERS[config["_class_name"]]
    size = {} if args.resolution is None else {"sample_size": args.resolution}
    if args.pretrained_model_name_or_path is not None:
        model = denoiser.from_pretrained(name, subfolder=subfolder, **size)
    else:
        model = denoiser.from_config({**config, **size})
        if isinstance(model, DiTTransformer2DModel):
            initialize(model)
    for module in model.modules():
        # The stream drops labels, for all blocks alike. A DiT in training would drop more, in every block by itself.
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    _check_process(args, name, model, schedule)
    asked = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    schedule.update({key: value for key, value in asked.items() if value is not None})
    _check_model(args, model)
    if args.process in ("cld", "blurring"):
        if schedule.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"`--prediction_type` must be epsilon for `--process {args.process}`, got "
                f"{schedule['prediction_type']}."
            )
        schedule["sample_size"] = model.config.sample_size
    if args.process == "cld" and model.config.in_channels % 2 == 1:  # for pictures, which have 1 or 3 channels
        model = with_velocities(model)
    return model, schedule


def _check_process(args: argparse.Namespace, name: str, model: Denoiser, schedule: dict) -> None:
    """Raise a `ValueError` if `--process` is not one for this model."""
    if args.process == "flow":
        for option in ("prediction_type", "ddpm_beta_schedule"):
            if getattr(args, option) is not None:
                raise ValueError(f"`--{option}` must be left out for `--process flow`, got {getattr(args, option)}.")
    elif "shift" in schedule or schedule.get("prediction_type") == "flow_prediction":
        raise ValueError(f"`--process` must be flow for {name}, which predicts flows, got {args.process}.")
    if args.process in ("cld", "blurring") and not isinstance(model, UNet2DModel):
        raise ValueError(f"`--process` must be vp or flow for a {type(model).__name__}, got {args.process}.")


def _check_model(args: argparse.Namespace, model: Denoiser) -> None:
    """Raise a `ValueError` if the model cannot be trained on such pictures and labels."""
    config = model.config
    is_unet = isinstance(model, UNet2DModel)
    factor = 2 ** (len(config.down_block_types) - 1) if is_unet else config.patch_size
    if not isinstance(config.sample_size, int) or config.sample_size % factor != 0:
        raise ValueError(f"`--resolution` must be a multiple of {factor} for this model, got {config.sample_size}.")
    if config.out_channels not in (None, config.in_channels):
        raise ValueError(
            f"The model must have as many output channels as input channels, {config.in_channels}, got "
            f"{config.out_channels}: learned variances are not trained here."
        )
    if args.label_dropout > 0 and is_unet and config.num_class_embeds is None:
        raise ValueError(
            f"`--label_dropout` must be 0 for a UNet without `num_class_embeds`, got {args.label_dropout}."
        )


def initialize(transformer: DiTTransformer2DModel) -> None:
    """
    The weights that a DiT starts from (adaLN-Zero, Peebles & Xie, 2023, https://huggingface.co/papers/2212.09748).

    Every block is the identity and the output is zero. diffusers leaves the weights as PyTorch draws them, since it
    expects them to be loaded.
    """
    init = torch.nn.init
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    init.zeros_(patches.bias)
    zero = [transformer.proj_out_1, transformer.proj_out_2]
    for block in transformer.transformer_blocks:
        embedding = block.norm1.emb
        for table in (
            embedding.class_embedder.embedding_table,
            embedding.timestep_embedder.linear_1,
            embedding.timestep_embedder.linear_2,
        ):
            init.normal_(table.weight, std=0.02)
        zero.append(block.norm1.linear)
    for layer in zero:
        init.zeros_(layer.weight)
        init.zeros_(layer.bias)


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


def num_classes(model: Denoiser, label_dropout: float) -> int | None:
    """Classes that data may have: all class embeddings, without the null class if there is one."""
    if isinstance(model, DiTTransformer2DModel):
        return model.config.num_embeds_ada_norm  # its null class is one more
    if model.config.num_class_embeds is None:
        return None
    return model.config.num_class_embeds - (1 if label_dropout > 0 else 0)


def sample_grid(diffusion: VariancePreservingTraining, model: Denoiser, classes: int | None, args: argparse.Namespace):
    """Pictures from the same noise at every call, one class a column if the model has classes."""
    columns = min(classes or 8, 10, args.eval_batch_size)
    rows = args.eval_batch_size // columns
    pipeline = diffusion.sampler(model)
    pipeline.set_progress_bar_config(disable=True)
    condition = {}
    if classes is not None:
        condition = {"class_labels": list(range(columns)) * rows, "guidance_scale": args.guidance_scale}
    model.eval()
    (images, *_) = pipeline(
        batch_size=rows * columns,
        num_inference_steps=args.ddpm_num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        **condition,
        return_dict=False,
    )
    model.train()
    return make_image_grid(images, rows, columns)
