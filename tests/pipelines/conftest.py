"""Tiny pixel-space models with random weights, and heads for these and for text-to-image models."""

import pytest
import torch
from diffusers import UNet2DModel

from genie_diffusers import DerivativeHead, GenieUNet2DConditionModel, GenieUNet2DModel


@pytest.fixture
def make_unet(like_trained):
    """Pixel-space UNets: `make_unet(num_class_embeds=4)`."""

    def make(**config):
        torch.manual_seed(0)
        unet = UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 3,
                "out_channels": 3,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 8,
                "norm_num_groups": 4,
                **config,
            }
        )
        return like_trained(unet)

    return make


@pytest.fixture
def make_genie_unet(make_unet):
    """The same UNets with a derivative head whose last layer is random instead of zero."""

    def make(scheduler_config=None, **config):
        unet = make_unet(**config)
        torch.manual_seed(1)
        head = DerivativeHead.for_unet(unet, scheduler_config)
        torch.nn.init.normal_(head.conv_out.weight, std=0.05)
        return GenieUNet2DModel.from_unet(unet, head).eval()

    return make


@pytest.fixture
def with_head():
    """The UNet of a text-to-image pipeline with a head whose last layer is random instead of zero."""

    def add(pipe, head_class=DerivativeHead):
        torch.manual_seed(1)
        head = head_class.for_unet(pipe.unet, pipe.scheduler.config)
        torch.nn.init.normal_(head.conv_out.weight, std=0.05)
        return GenieUNet2DConditionModel.from_unet(pipe.unet, head).eval()

    return add
