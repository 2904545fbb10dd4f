"""Denoisers of captions or further pictures, as the training scripts see them: a class is a row of a table."""

import argparse
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from genie_diffusers import GenieUNet2DConditionModel, GenieUNet2DModel
from genie_diffusers.learning.arguments import base_of, repository_of
from genie_diffusers.learning.data import TrainingStream, from_pixels, open_dataset, square
from genie_diffusers.learning.run import computed_once

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: what [`Conditioned`] is given follows from these arguments, as far as a script has them
CONDITION_ARGUMENTS = (
    "pretrained_model_name_or_path",
    "captions",
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "image_column",
    "caption_column",
    "max_captions",
    "resolution",
    "low_resolution",
    "max_noise_level",
    "seed",
)
#: share of pictures that are painted as a whole, in the training of Stable Diffusion's inpainting model
WHOLE_MASKS = 0.25


def load_unet(name_or_path: str) -> UNet2DModel | UNet2DConditionModel:
    """The denoiser of a pipeline, in float32."""
    config = UNet2DModel.load_config(name_or_path, subfolder="unet")
    cls = UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel
    return cls.from_pretrained(name_or_path, subfolder="unet").float().eval()


def with_head(unet: UNet2DModel | UNet2DConditionModel, head) -> GenieUNet2DModel | GenieUNet2DConditionModel:
    """The same denoiser with a head, of the class that fits."""
    return (GenieUNet2DConditionModel if takes_text(unet) else GenieUNet2DModel).from_unet(unet, head)


def takes_text(denoiser) -> bool:
    return isinstance(_unet_of(denoiser), UNet2DConditionModel)


def further_channels(unet) -> str | None:
    """
    What the input channels after those of the sample are for: `"inpainting"`, `"upscaling"` or nothing.

    Raises:
        ValueError: If they are for something else.
    """
    config = unet.config
    further = max(0, config.in_channels - config.out_channels)
    if further == 0:
        return None
    if takes_text(unet):
        if further == 1 + config.out_channels:  # a mask and the latents of the picture behind it
            return "inpainting"
        if further == 3 and config.num_class_embeds is not None:  # a picture in colour and the level of its noise
            return "upscaling"
    elif further == config.out_channels and config.num_class_embeds is None:
        return "upscaling"
    raise ValueError(
        f"A `{type(unet).__name__}` of {config.in_channels} input and {config.out_channels} output channels cannot be "
        "distilled: it is neither for inpainting nor for upscaling. A head of the model that it was made from may fit."
    )


def check_guidance(args: argparse.Namespace, unet) -> None:
    has_null_class = takes_text(unet) or unet.config.num_class_embeds is not None
    if args.max_guidance_scale < 1.0 or (args.max_guidance_scale > 1.0 and not has_null_class):
        raise ValueError(
            "`--max_guidance_scale` must be at least 1, and 1 for a model without classes or captions, got "
            f"{args.max_guidance_scale}."
        )


class Conditioned(torch.nn.Module):
    """
    A denoiser of captions or further pictures as one of classes, so that scripts need to know of classes alone.

    Args:
        unet ([`GenieUNet2DModel`] or [`GenieUNet2DConditionModel`]): The denoiser, in whatever precision.
        rows (`dict[str, torch.Tensor]`):
            What the denoiser is given for each class. They stay on the host, in the file they were read from.
            `"encoder_hidden_states"` and whatever SDXL adds to it have one row more than there are captions, the last,
            of the empty prompt; `"channels"`, which follow those of the sample, and `"noise_level"` do not.
        sample_size (`int`): Side of a sample.
    """

    def __init__(self, unet, rows: dict[str, torch.Tensor], sample_size: int):
        super().__init__()
        self.unet, self.rows, self.num_parameters = unet, rows, unet.num_parameters
        channels = rows.get("channels")
        self.count = len(rows["encoder_hidden_states"]) - 1 if channels is None else len(channels)
        self.config = SimpleNamespace(
            in_channels=unet.config.in_channels - (0 if channels is None else channels.shape[1]),
            sample_size=sample_size,
            num_class_embeds=self.count + 1,
        )

    @property
    def slope_source(self):
        return self.unet.slope_source

    @property
    def last_call(self):
        return self.unet.last_call

    def recording(self):
        return self.unet.recording()

    def null_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Those of the empty prompt beside the picture of each label."""
        return labels % self.count + self.count

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor):
        given: dict[str, Any] = {}
        for name, values in self.rows.items():
            labels = class_labels.to(values.device)
            rows = labels % self.count if len(values) == self.count else labels.clamp(max=self.count)
            dtype = self.unet.dtype if values.is_floating_point() else values.dtype
            given[name] = values[rows].to(sample.device, dtype)
        channels = [sample.to(self.unet.dtype), *([given.pop("channels")] if "channels" in given else [])]
        if "noise_level" in given:
            given["class_labels"] = given.pop("noise_level")
        if "text_embeds" in given:
            given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
        output = self.unet(torch.cat(channels, dim=1), timestep, **given).sample
        return SimpleNamespace(sample=output.to(sample.dtype))


def _unet_of(denoiser):
    return denoiser.unet if isinstance(denoiser, Conditioned) else denoiser


def conditioned(unet, args: argparse.Namespace, mixed_precision: str, device: torch.device, latents: bool = False):
    """
    `unet` itself, or [`Conditioned`] on what the arguments name, and what pictures are to it.

    Embeddings and latents are computed once and kept in `--output_dir`, in half precision: head and target are given
    the same. In mixed precision such a denoiser is in half precision too, all but its head.

    Args:
        unet ([`GenieUNet2DModel`] or [`GenieUNet2DConditionModel`]): The denoiser.
        args (`argparse.Namespace`): The arguments of the recipe.
        mixed_precision (`str`): That of the accelerator.
        device (`torch.device`): Where the denoiser is.
        latents (`bool`, defaults to `False`): Whether pictures are needed, each for the class of its number.

    Returns:
        `tuple`: The denoiser, and the pictures as it samples them, of shape `(count, channels, height, width)`.

    Raises:
        ValueError: If the model cannot be distilled, or an argument does not fit it.
    """
    text, purpose = takes_text(unet), further_channels(unet)
    enlarged = purpose == "upscaling" and not text
    if (args.low_resolution is not None) != enlarged:
        raise ValueError(
            f"`--low_resolution` must {'' if enlarged else 'not '}be given for this model, got {args.low_resolution}."
        )
    if not text and purpose is None:
        return unet, None
    scale = _vae_scale_factor(args.pretrained_model_name_or_path) if text else 1
    size = unet.config.sample_size if args.resolution is None else args.resolution // scale

    def compute(path: Path) -> None:
        rows = {}
        if text:
            pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, unet=None).to(device)
        if purpose is not None or latents:
            columns = {"image": args.image_column} | ({"caption": args.caption_column} if text else {})
            data = _dataset(args, args.dataset_name, columns)
            rows = _of_pictures(args, data, unet, size, size * scale, pipeline.vae if text else None, latents)
        if text:
            captions = data["caption"] if rows else _captions(args)
            rows |= _of_captions(pipeline, captions, size * scale, device)
        save_file(rows, path)

    name, depends_on = "pictures" if latents else "conditions", [name for name in CONDITION_ARGUMENTS if name in args]
    rows = load_file(computed_once(args, f"{name}.safetensors", depends_on, compute))
    if mixed_precision in PRECISIONS:
        unet.to(PRECISIONS[mixed_precision])
        unet.derivative_head.float()
    pictures = rows.pop("latents", None)
    return Conditioned(unet, rows, size), pictures


class LatentStream(TrainingStream):
    """
    The stream of training samples over pictures as [`conditioned`] returns them, labelled by their numbers.

    Args:
        latents (`torch.Tensor` of shape `(count, channels, height, width)`): All pictures.
        numbers (`range`): Those of the stream.
        seed (`int`): Any non-negative number.
    """

    def __init__(self, latents: torch.Tensor, numbers: range, seed: int):
        shape = latents.shape[1], latents.shape[2], latents.shape[3]
        super().__init__(numbers, shape, shape, seed)
        self.latents = latents

    def _rows(self, numbers: list[int]) -> tuple[np.ndarray, list[int]]:
        labels = [self.pictures[number] for number in numbers]
        return self.latents[labels].float().numpy(), labels


def _vae_scale_factor(name_or_path: str) -> int:
    return 2 ** (len(AutoencoderKL.load_config(name_or_path, subfolder="vae")["block_out_channels"]) - 1)


def _dataset(args: argparse.Namespace, name: str, columns: dict[str, str]):
    dataset = open_dataset(name, columns, args.dataset_config_name, args.dataset_split, args.cache_dir)
    return dataset.select(range(min(args.max_captions, len(dataset)))) if "caption" in columns else dataset


def _captions(args: argparse.Namespace) -> list[str]:
    """Those of a text file or a data set."""
    if Path(args.captions).is_file():
        return [line for line in Path(args.captions).read_text().splitlines() if line][: args.max_captions]
    return _dataset(args, args.captions, {"caption": args.caption_column})["caption"]


@torch.no_grad()
def _of_captions(pipeline, captions: list[str], resolution: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The embeddings of all captions, then those of the empty prompt, by the pipeline's own encoders."""
    names = ("encoder_hidden_states", "text_embeds")
    kept: dict[str, list[torch.Tensor]] = {}
    for caption in tqdm(captions, desc="Captions"):
        # (text, null) or, of SDXL, (text, null, pooled text, pooled null)
        encoded = pipeline.encode_prompt(
            caption, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        for name, values in zip(names, encoded[::2], strict=False):
            kept.setdefault(name, []).append(values.half().cpu())
    for name, null in zip(names, encoded[1::2], strict=False):
        kept[name].append(null.half().cpu())
    rows = {name: torch.cat(values) for name, values in kept.items()}
    if "text_embeds" in rows:  # original size, crop, target size
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        rows["time_ids"] = sizes.repeat(len(rows["text_embeds"]), 1)
    return rows


@torch.no_grad()
def _of_pictures(
    args: argparse.Namespace, data, unet, size: int, resolution: int, vae: AutoencoderKL | None, latents: bool
) -> dict[str, torch.Tensor]:
    """What the further channels hold for each picture of `data`, and, with `latents`, the picture as it is sampled."""
    text, purpose = takes_text(unet), further_channels(unet)
    shape = (unet.config.out_channels if vae is None else vae.config.in_channels, resolution, resolution)
    if purpose == "upscaling" and text:
        augmentation = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="low_res_scheduler")

    def encode(picture: torch.Tensor) -> torch.Tensor:
        if vae is None:
            return picture
        # The mean, not a draw: every picture is one point of the data.
        return (vae.encode(picture.to(vae.device)).latent_dist.mode() * vae.config.scaling_factor).cpu()

    rows: dict[str, list[torch.Tensor]] = {}
    for number, example in enumerate(tqdm(data, desc="Pictures")):
        generator = np.random.default_rng([args.seed, number])
        pixels = square(example["image"], resolution, "RGB" if shape[0] == 3 else "L").tobytes()
        picture, row = torch.from_numpy(from_pixels([pixels], shape)), {}
        if latents:
            row["latents"] = encode(picture)
        if purpose == "inpainting":
            mask = torch.from_numpy(random_mask(resolution, generator))[None, None]
            small = torch.nn.functional.interpolate(mask, size=(size, size))
            row["channels"] = torch.cat([small, encode(picture * (1 - mask))], dim=1)
        elif purpose == "upscaling" and text:
            low = torch.nn.functional.interpolate(picture, size=(size, size), mode="area")
            noise = torch.from_numpy(generator.standard_normal(low.shape, dtype=np.float32))
            row["noise_level"] = torch.from_numpy(generator.integers(args.max_noise_level + 1, size=1))
            row["channels"] = augmentation.add_noise(low, noise, row["noise_level"])
        elif purpose == "upscaling":  # averaged, and enlarged bilinearly, as these models are conditioned
            low = torch.nn.functional.interpolate(picture, size=(args.low_resolution,) * 2, mode="area")
            row["channels"] = torch.nn.functional.interpolate(low, size=(size, size), mode="bilinear")
        for name, values in row.items():
            rows.setdefault(name, []).append(values.half() if values.is_floating_point() else values)
    return {name: torch.cat(values) for name, values in rows.items()}


@torch.no_grad()
def decoded(denoiser, samples: torch.Tensor, name_or_path: str, device: torch.device) -> torch.Tensor:
    """The pictures in [−1, 1] that samples of the denoiser stand for, on the host."""
    if not takes_text(denoiser):
        return samples
    vae = AutoencoderKL.from_pretrained(name_or_path, subfolder="vae").to(device)
    latents = samples.to(device) / vae.config.scaling_factor
    return torch.cat([vae.decode(latent[None]).sample.cpu() for latent in latents])


def random_mask(side: int, generator: np.random.Generator) -> np.ndarray:
    """1 where a picture is to be painted: in a rectangle, in an ellipse or everywhere, shape `(side, side)`."""
    kind, (center, radius) = generator.random(), generator.random((2, 2))
    if kind < WHOLE_MASKS:
        return np.ones((side, side), dtype=np.float32)
    places = (np.arange(side) + 0.5) / side
    down, right = np.abs(places - center[:, None]) / (0.1 + 0.4 * radius[:, None])
    is_ellipse = kind < WHOLE_MASKS + (1 - WHOLE_MASKS) / 2
    distance = (np.hypot if is_ellipse else np.maximum)(down[:, None], right)
    return (distance < 1).astype(np.float32)


def rematerialised(unet):
    """`unet` itself, each of whose calls is computed again in the backward pass, block by block."""
    unet.enable_gradient_checkpointing()
    unet.forward = functools.partial(checkpoint, unet.forward, use_reentrant=False)
    return unet


def sampling_code(args: argparse.Namespace, denoiser, steps: int, **options) -> str:
    """
    Python that draws with the head of a run, for its card.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        denoiser: The denoiser, [`Conditioned`] or not.
        steps (`int`): Model calls.
        options: Of the scheduler.
    """
    unet = _unet_of(denoiser)
    text, purpose = takes_text(unet), further_channels(unet)
    pipeline = DiffusionPipeline.load_config(args.pretrained_model_name_or_path)["_class_name"] if text else "Pipeline"
    pipeline = pipeline.removeprefix("Genie")
    ours = pipeline in ("Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
    lines = [] if ours else [f"from diffusers import {pipeline}"]
    names = ["GenieScheduler", type(unet).__name__, *([f"Genie{pipeline}"] if ours else [])]
    lines += [f"from genie_diffusers import {', '.join(sorted(names))}", ""]
    stated = "".join(f", {name}={value!r}" for name, value in options.items())
    given = ['"a photo of a cat"'] if text else []
    given += {None: [], "upscaling": ["image=picture"], "inpainting": ["image=picture", "mask_image=mask"]}[purpose]
    lines += [
        f'pipe = {"Genie" if ours else ""}{pipeline}.from_pretrained("{base_of(args)}")',
        f"pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config{stated})",
        f'pipe.unet = {type(unet).__name__}.from_unet(pipe.unet, derivative_head="{repository_of(args)}")',
        *([] if ours else ["pipe.scheduler.attach(pipe.unet)"]),
        f"images = pipe({', '.join([*given, f'num_inference_steps={steps}'])}).images",
    ]
    return "\n".join(lines)
