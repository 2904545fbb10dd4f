"""Classifiers on whose features the quality of samples is measured."""

import argparse

import datasets
import torch
import torch.nn.functional as F

from genie_diffusers import ImageClassifier
from genie_diffusers.learning.arguments import add_data_arguments, add_training_arguments
from genie_diffusers.learning.data import from_pixels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a classifier of pictures.")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 128], help="As in the model.")
    parser.add_argument("--layers_per_block", type=int, default=2, help="As in the model.")
    parser.add_argument("--label_smoothing", type=float, default=0.1, help="Share of the target spread over classes.")
    parser.add_argument(
        "--crop_padding", type=int, default=2, help="Shift pictures at random by up to so many pixels."
    )
    parser.add_argument("--test_split", default="test", help="Split that the accuracy is measured on.")
    add_data_arguments(parser, label_dropout=False)
    add_training_arguments(parser)
    parser.set_defaults(resolution=32)
    return parser.parse_args(argv)


def random_crop(images: torch.Tensor, padding: int, choices: torch.Tensor) -> torch.Tensor:
    """
    Pictures shifted by up to `padding` pixels, with what comes in from outside mirrored at the edge.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): Pictures.
        padding (`int`): Largest shift.
        choices (`torch.Tensor` of shape `(batch, 2)`): Uniform on [0, 1): where in the range of shifts.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4, mode="reflect")
    corners = (choices * (2 * padding + 1)).long().tolist()
    return torch.stack(
        [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, corners, strict=True)]
    )


@torch.no_grad()
def picture_features(model: ImageClassifier, pictures: datasets.Dataset, batch_size: int = 500) -> torch.Tensor:
    """Features of all `pictures`."""
    size, channels = model.config.sample_size, model.config.in_channels
    features = []
    for batch in pictures.iter(batch_size):
        images = torch.from_numpy(from_pixels(batch["pixels"], (channels, size, size)))
        features.append(model.features(images.to(model.device)).cpu())
    return torch.cat(features)
