"""Denoisers of captions or low-resolution pictures, as the training scripts see them: a class is a row of a table."""

import argparse
import functools
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from genie_diffusers import GenieUNet2DConditionModel, GenieUNet2DModel
from training_utils import load_pictures

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of [`conditioned`] and of the memory that a denoiser takes."""
    add = parser.add_argument
    add(
        "--captions",
        help="For text-to-image models: a text file with a caption a line, or a data set (Hub id or folder).",
    )
    add("--caption_column", default="text", help="Column of a data set of captions.")
    add("--max_captions", type=int, default=1000, help="Use the first of them; their embeddings stay in memory.")
    add(
        "--resolution",
        type=int,
        help="For text-to-image models: side of a picture in pixels. Default: that of the model's `sample_size`.",
    )
    add(
        "--low_resolution_dataset_name",
        help="For models with a low-resolution picture on further channels: Hub id or folder of a data set.",
    )
    add("--low_resolution", type=int, help="Side of these pictures before they are enlarged to `sample_size`.")
    add("--image_column", default="image", help="Their column.")
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="Compute every call of the denoiser again in the backward pass: the memory of one call, whatever their "
        "number, for a third more time.",
    )


def load_unet(name_or_path: str) -> UNet2DModel | UNet2DConditionModel:
    """The denoiser of a pipeline, in float32."""
    config = UNet2DModel.load_config(name_or_path, subfolder="unet")
    cls = UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel
    return cls.from_pretrained(name_or_path, subfolder="unet").float().eval()


def with_head(unet: UNet2DModel | UNet2DConditionModel, head) -> GenieUNet2DModel | GenieUNet2DConditionModel:
    """The same denoiser with a head, of the class that fits."""
    text = isinstance(unet, UNet2DConditionModel)
    return (GenieUNet2DConditionModel if text else GenieUNet2DModel).from_unet(unet, head)


class Conditioned(torch.nn.Module):
    """
    A denoiser of captions or pictures as one of classes, so that scripts need to know of classes alone.

    Args:
        unet ([`GenieUNet2DModel`] or [`GenieUNet2DConditionModel`]): The denoiser, in whatever precision.
        rows (`dict[str, torch.Tensor]`):
            What the denoiser is given for each class: `"encoder_hidden_states"`, whatever SDXL adds to it, or
            `"channels"`, which follow those of the sample. The last row is the null class of guidance.
        sample_size (`int`): Side of a sample.
    """

    def __init__(self, unet, rows: dict[str, torch.Tensor], sample_size: int):
        super().__init__()
        self.unet, self.names, self.num_parameters = unet, list(rows), unet.num_parameters
        for name, values in rows.items():
            self.register_buffer(name, values.to(unet.dtype), persistent=False)
        further = rows["channels"].shape[1] if "channels" in rows else 0
        self.config = SimpleNamespace(
            in_channels=unet.config.in_channels - further,
            sample_size=sample_size,
            num_class_embeds=len(next(iter(rows.values()))),
        )

    @property
    def slope_source(self):
        return self.unet.slope_source

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor):
        given = {name: getattr(self, name)[class_labels] for name in self.names}
        channels = [sample.to(self.unet.dtype), *([given.pop("channels")] if "channels" in given else [])]
        if "text_embeds" in given:
            given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
        output = self.unet(torch.cat(channels, dim=1), timestep, **given).sample
        return SimpleNamespace(sample=output.to(sample.dtype))


def conditioned(unet, args: argparse.Namespace, mixed_precision: str, device: torch.device):
    """
    `unet` itself, or [`Conditioned`] on what the arguments name. Embeddings and pictures are computed once and kept
    in `--output_dir`. In mixed precision such a denoiser is in half precision, all but its head.

    Raises:
        ValueError: If the model needs a condition that is not given, or has no use for it.
    """
    text = isinstance(unet, UNet2DConditionModel)
    further = max(0, unet.config.in_channels - unet.config.out_channels)
    given = {"--captions": args.captions, "--low_resolution_dataset_name": args.low_resolution_dataset_name}
    for (name, value), needed in zip(given.items(), (text, further > 0), strict=True):
        if (value is not None) != needed:
            raise ValueError(
                f"`{name}` must {'' if needed else 'not '}be given for a `{type(unet).__name__}` of "
                f"{unet.config.in_channels} input and {unet.config.out_channels} output channels, got {value!r}."
            )
    if not text and not further:
        return unet
    if text and further:
        raise ValueError(
            "A text-to-image model with a picture on further channels cannot be distilled; a head of the model that "
            "it was made from may fit."
        )
    if further and args.low_resolution is None:
        raise ValueError("`--low_resolution` must be given with `--low_resolution_dataset_name`.")
    file, size = args.output_dir / "conditions.safetensors", unet.config.sample_size
    if text:
        scale = _vae_scale_factor(args.pretrained_model_name_or_path)
        size = size if args.resolution is None else args.resolution // scale
    if not file.exists():
        rows = _captions(args, size * scale, device) if text else _pictures(args, further, size)
        save_file(rows, file)
    if mixed_precision in PRECISIONS:
        unet.to(PRECISIONS[mixed_precision])
        unet.derivative_head.float()
    return Conditioned(unet, load_file(file), size).to(device)


def _vae_scale_factor(name_or_path: str) -> int:
    from diffusers import AutoencoderKL

    return 2 ** (len(AutoencoderKL.load_config(name_or_path, subfolder="vae")["block_out_channels"]) - 1)


@torch.no_grad()
def _captions(args: argparse.Namespace, resolution: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The embeddings of all captions, then those of the empty prompt, by the pipeline's own encoders."""
    if Path(args.captions).is_file():
        dataset = datasets.load_dataset("text", data_files=args.captions, split="train")
    else:
        dataset = datasets.load_dataset(args.captions, split="train")
    column = "text" if Path(args.captions).is_file() else args.caption_column
    if column not in dataset.column_names:
        raise ValueError(
            f"`--caption_column` must be one of the columns {', '.join(dataset.column_names)}, got {column!r}."
        )
    captions = [text for text in dataset[column][: args.max_captions] if text]
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, unet=None, vae=None).to(device)
    # (text, null) or, of SDXL, (text, null, pooled text, pooled null)
    encoded = [
        pipeline.encode_prompt(caption, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True)
        for caption in captions
    ]
    rows = {}
    for name, i in (("encoder_hidden_states", 0), ("text_embeds", 2))[: len(encoded[0]) // 2]:
        rows[name] = torch.cat([*(values[i] for values in encoded), encoded[0][i + 1]]).cpu()
    if "text_embeds" in rows:  # original size, crop, target size
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        rows["time_ids"] = sizes.repeat(len(captions) + 1, 1)
    return rows


def _pictures(args: argparse.Namespace, channels: int, size: int) -> dict[str, torch.Tensor]:
    """Pictures in [−1, 1], averaged to `--low_resolution` and enlarged bilinearly, as the models are conditioned."""
    side = args.low_resolution
    dataset = load_pictures(args.low_resolution_dataset_name, side, channels, image_column=args.image_column)
    pixels = np.frombuffer(b"".join(dataset["pixels"]), dtype=np.uint8).reshape(-1, side, side, channels)
    pictures = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1.0
    enlarged = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bilinear")
    return {"channels": enlarged.contiguous()}


def rematerialised(unet):
    """`unet` itself, each of whose calls is computed again in the backward pass, block by block."""
    unet.enable_gradient_checkpointing()
    unet.forward = functools.partial(checkpoint, unet.forward, use_reentrant=False)
    return unet
