"""GENIE's distilled head: dε/dλ from what the denoiser has just computed (Dockhorn et al., 2022, Section 3.2)."""

import json
import math
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import logging

from ..processes import VariancePreserving

logger = logging.get_logger(__name__)

#: how far fingerprints may differ by the rounding of half precision
FINGERPRINT_TOLERANCE = 5e-3


class UNetHead(ModelMixin, ConfigMixin):
    """
    A small network that reads what a denoiser has just computed, and remembers which denoiser that is.

    A head is a file of its own, like a LoRA: it is saved, loaded and published without the denoiser it was distilled
    from. Its configuration holds at least what [`head_arguments`] returns.
    """

    def check_fits(self, unet: UNet2DModel):
        """
        Check that the head can read what `unet` computes; warn if the weights are not those it was distilled from.

        Raises:
            ValueError: If channels, feature width or embedding size differ.
        """
        found = {
            "in_channels": _sample_channels(unet),
            "feature_channels": unet.conv_norm_out.num_channels,
            "time_embedding_dim": unet.time_embedding.linear_2.out_features,
        }
        for name, value in found.items():
            if self.config[name] != value:
                raise ValueError(f"This head needs a UNet with {name} {self.config[name]}, this one has {value}.")
        if not self.matches(unet):
            logger.warning(
                "This head was distilled from other weights than this UNet's. That can be meant (a "
                "fine-tuned UNet, a fused LoRA), but what it predicts may be off."
            )

    def matches(self, unet: UNet2DModel) -> bool:
        """Whether the head was distilled from the weights of `unet`, or does not say."""
        noted, found = self.config.fingerprint, fingerprint(unet)
        return noted is None or max(abs(a - b) for a, b in zip(noted, found, strict=True)) <= FINGERPRINT_TOLERANCE

    def check_process(self, process: VariancePreserving, prediction_type: str):
        """
        Check that the head was distilled for this diffusion.

        Raises:
            ValueError: If noise schedule or prediction type differ.
        """
        if prediction_type != self.config.prediction_type:
            raise ValueError(
                f"This head is for a model with `prediction_type={self.config.prediction_type!r}`, the "
                f"scheduler has {prediction_type!r}."
            )
        own = VariancePreserving.from_config(self.config.process or {})
        same = own.is_discrete == process.is_discrete and own.num_train_timesteps == process.num_train_timesteps
        probe = np.linspace(own.timestep_min, own.timestep_max, 33, dtype=np.float32)
        if not same or abs(own.log_snr(probe) - process.log_snr(probe)).max() > 1e-3:
            raise ValueError(
                "This head was distilled for another noise schedule than the scheduler's: "
                + json.dumps(self.config.process or {})
            )


class DerivativeHead(UNetHead):
    """
    A small network that predicts dε/dλ, the slope of a denoiser's noise prediction along the probability-flow ODE.

    It reads the sample, the noise prediction that defines the direction of the path (the guided one, under guidance),
    the denoiser's last features and its time embedding, and mixes three outputs as

        dε/dλ = k₁ − σ² k₂ − α² k₃

    which is the mixture dε/dγ = −k₁/γ + γ/(1+γ²) k₂ + k₃/(γ(1+γ²)) of the paper. The last layer starts at zero.

    Args:
        in_channels (`int`): Channels of the sample.
        feature_channels (`int`): Channels of the denoiser's last features (the input of its `conv_norm_out`).
        time_embedding_dim (`int`): Size of the denoiser's time embedding.
        width (`int`, defaults to 64): Channels inside the head.
        norm_num_groups (`int`, defaults to 8): Groups of its normalisations.
        process (`dict`, *optional*): Noise schedule it was distilled for, as scheduler configuration keys.
        prediction_type (`str`, defaults to `"epsilon"`): What its denoiser predicts.
        fingerprint (`list[float]`, *optional*): [`fingerprint`] of the denoiser's weights.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        feature_channels: int,
        time_embedding_dim: int,
        width: int = 64,
        norm_num_groups: int = 8,
        process: dict | None = None,
        prediction_type: str = "epsilon",
        fingerprint: list[float] | None = None,
    ):
        super().__init__()
        self.feature_in = torch.nn.Conv2d(feature_channels, width, kernel_size=1)
        self.sample_in = torch.nn.Conv2d(2 * in_channels, width, kernel_size=3, padding=1)
        self.block = ResnetBlock2D(
            in_channels=width, temb_channels=time_embedding_dim, groups=norm_num_groups, eps=1e-5
        )
        self.norm_out = torch.nn.GroupNorm(norm_num_groups, width)
        self.conv_out = torch.nn.Conv2d(width, 3 * in_channels, kernel_size=3, padding=1)
        for parameter in self.conv_out.parameters():
            torch.nn.init.zeros_(parameter)

    @classmethod
    def for_unet(cls, unet: UNet2DModel, scheduler_config=None, width: int | None = None) -> "DerivativeHead":
        """
        A new head that fits `unet`, with its noise schedule and fingerprint noted.

        Args:
            unet ([`UNet2DModel`] or [`UNet2DConditionModel`]): The denoiser to distil.
            scheduler_config (mapping, *optional*): Configuration of the scheduler it was trained with.
            width (`int`, *optional*): Channels inside the head, a multiple of 8. By default half of the denoiser's
                feature channels, about 2% of a forward pass for the architecture of google/ddpm-cifar10-32.

        Raises:
            ValueError: If `width` is no positive multiple of 8.
        """
        if width is None:
            width = 8 * math.ceil(unet.conv_norm_out.num_channels / 16)
        elif width < 8 or width % 8:
            raise ValueError(f"`width` must be a positive multiple of 8, got {width}.")
        return cls(**head_arguments(unet, scheduler_config), width=width)

    def forward(
        self,
        sample: torch.Tensor,
        noise_prediction: torch.Tensor,
        features: torch.Tensor,
        time_embedding: torch.Tensor,
        alpha: torch.Tensor | float,
        sigma: torch.Tensor | float,
    ) -> torch.Tensor:
        """
        Predict dε/dλ, shape of `sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            noise_prediction (`torch.Tensor` of the same shape): ε that defines the direction of the path.
            features (`torch.Tensor` of shape `(batch, feature_channels, height, width)`): Last features.
            time_embedding (`torch.Tensor` of shape `(batch, time_embedding_dim)`): Time embedding.
            alpha, sigma (`float` or `torch.Tensor` of shape `(batch, 1, 1, 1)`): α_t and σ_t.
        """
        hidden = self.feature_in(features) + self.sample_in(torch.cat([sample, noise_prediction], dim=1))
        hidden = self.block(hidden, time_embedding)
        k_1, k_2, k_3 = self.conv_out(torch.nn.functional.silu(self.norm_out(hidden))).chunk(3, dim=1)
        return k_1 - sigma**2 * k_2 - alpha**2 * k_3


def head_arguments(unet: UNet2DModel, scheduler_config=None) -> dict:
    """The arguments of a head that say which denoiser it is for: sizes, noise schedule, prediction, fingerprint."""
    config = dict(scheduler_config or {})
    process = {key: config[key] for key in VariancePreserving.CONFIG_KEYS if config.get(key) is not None}
    return {
        "in_channels": _sample_channels(unet),
        "feature_channels": unet.conv_norm_out.num_channels,
        "time_embedding_dim": unet.time_embedding.linear_2.out_features,
        "process": process or None,
        "prediction_type": config.get("prediction_type", "epsilon"),
        "fingerprint": fingerprint(unet),
    }


def _sample_channels(unet: UNet2DModel) -> int:
    """A denoiser may read more (masks) or return more (variances) than the sample has."""
    return min(unet.config.in_channels, unet.config.out_channels)


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> list[float]:
    """
    Eight numbers that tell the weights of `model` apart from others, whatever precision they are loaded in.

    Each weight w of two or more dimensions adds ⟨w, c⟩/‖w‖ to one of them, over its first 4,096 elements, c_i = cos i.
    """
    weights = [parameter for _, parameter in sorted(_base_weights(model)) if parameter.ndim > 1]
    sums = [0.0] * 8
    for i, weight in enumerate(weights):
        start = weight.detach().flatten()[:4096].cpu().double()
        pattern = torch.cos(torch.arange(start.numel(), dtype=torch.float64, device="cpu"))
        sums[i % 8] += float(start @ pattern) / max(float(start.norm()), torch.finfo(torch.float64).tiny)
    return [round(value / math.sqrt(max(1, len(weights) / 8)), 6) for value in sums]


def _base_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights of `model` that are of no head and no adapter, by the names they have without them."""
    added = ["derivative_head."]
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # of PEFT: what it wraps, beside what it adds
            added += [f"{name}.{child}." for child, _ in module.named_children() if child != "base_layer"]
            added += [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]
        elif name.endswith(".processor") or isinstance(module, MultiIPAdapterImageProjection):
            added.append(f"{name}.")
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(added)):
            yield name.replace("base_layer.", ""), parameter
