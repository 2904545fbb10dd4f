"""Networks whose features tell how far pictures are from real ones, differentiable in the pictures."""

import importlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from genie_diffusers import ImageClassifier
from genie_diffusers.learning.data import from_pixels

Features = Callable[[torch.Tensor], torch.Tensor]


def feature_network(name: str, device: torch.device) -> Features:
    """
    Pictures in [−1, 1] of shape `(batch, channels, height, width)` → features of shape `(batch, features)`.

    Args:
        name (`str`):
            A folder or Hub id of an [`ImageClassifier`]; `"package.module:Class"`, a `torch.nn.Module` that is built
            without arguments and maps such pictures to features; or `"inception"`, the network of FID and KID, from
            the package torch-fidelity, which downloads its weights.
        device (`torch.device`): Where it is to run.

    Raises:
        ValueError: If `name` is a path to what is no `torch.nn.Module`.
    """
    if name == "inception":
        return Inception().to(device).eval().requires_grad_(False)
    if ":" not in name:
        return ImageClassifier.from_pretrained(name).to(device).eval().requires_grad_(False).features
    module, _, attribute = name.partition(":")
    built = getattr(importlib.import_module(module), attribute)()
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"`--feature_network` must name a `torch.nn.Module`, got {name}, a {type(built).__name__}.")
    network = built.to(device).eval().requires_grad_(False)
    return lambda pictures: network(pictures).flatten(1)


class Inception(torch.nn.Module):
    """The 2048 features of FID. torch-fidelity's own forward method takes bytes, which have no gradient."""

    LAYERS = (
        *(
            "Conv2d_1a_3x3",
            "Conv2d_2a_3x3",
            "Conv2d_2b_3x3",
            "MaxPool_1",
            "Conv2d_3b_1x1",
            "Conv2d_4a_3x3",
            "MaxPool_2",
        ),
        *(f"Mixed_{block}" for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
        "AvgPool",
    )

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        self.resize = interpolate_bilinear_2d_like_tensorflow1x

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        hidden = self.resize((pictures + 1) * 127.5, size=(299, 299), align_corners=False)
        hidden = (hidden - 128) / 128
        for name in self.LAYERS:
            hidden = getattr(self.network, name)(hidden)
        return hidden.flatten(1)


def features_of(network: Features, pictures: torch.Tensor) -> torch.Tensor:
    """Features of generated pictures; overshoots are clipped, as everything that looks at pictures does."""
    return network(pictures.clamp(-1, 1)).float()


@torch.no_grad()
def features_of_data(
    network: Features, pictures: datasets.Dataset, size: int, channels: int, device: torch.device, batch_size: int
) -> torch.Tensor:
    """Features of the pictures of [`load_pictures`], on the host."""
    features = []
    for batch in pictures.iter(batch_size):
        images = torch.from_numpy(from_pixels(batch["pixels"], (channels, size, size)))
        features.append(network(images.to(device)).float().cpu())
    return torch.cat(features)


def has_reference(name: str) -> bool:
    """Whether `name` is a folder with the features of real pictures."""
    return (Path(name) / "reference.safetensors").is_file()
