"""Tiny pipelines with random weights, built on the spot: nothing is downloaded."""

import json
import string

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genie_diffusers import DerivativeHead, GenieUNet2DConditionModel, GenieUNet2DModel


def like_trained(unet):
    """
    Give random weights two properties of trained ones: the output changes slowly with the timestep (the fast half of
    the sinusoids is cut off), and visibly with the sample.
    """
    weight = unet.time_embedding.linear_1.weight.data
    weight.unflatten(1, (2, 2, -1))[:, :, 0] = 0  # cosines and sines, each from fast to slow
    unet.conv_out.weight.data *= 3
    return unet.eval()


@pytest.fixture
def make_unet():
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = list(string.ascii_lowercase)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>"]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@pytest.fixture
def make_stable_diffusion(tokenizer):
    """
    Any pipeline of Stable Diffusion 1.x, 2.x or XL, ControlNet and upscaling included:
    `make_stable_diffusion(StableDiffusionImg2ImgPipeline)`.
    """

    def make(pipeline_class=StableDiffusionPipeline, unet_channels=4, scheduler=None):
        torch.manual_seed(0)
        name = pipeline_class.__name__
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        options = {"cross_attention_dim": 16}
        components = {"text_encoder": CLIPTextModel(text_config).eval(), "tokenizer": tokenizer}
        if "XL" in name:
            components |= {"text_encoder_2": CLIPTextModelWithProjection(text_config).eval()}
            components |= {"tokenizer_2": tokenizer}
            options = {"cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
            options |= {"projection_class_embeddings_input_dim": 16 + 6 * 8}
        else:
            components |= {"safety_checker": None, "feature_extractor": None}
        if "Upscale" in name:
            components |= {"low_res_scheduler": DDPMScheduler()}
            options |= {"num_class_embeds": 1000}
        elif "XL" not in name:
            components |= {"requires_safety_checker": False}
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=unet_channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=4,
            **options,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        if "ControlNet" in name:
            control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
            for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
                torch.nn.init.normal_(block.weight, std=0.1)  # zero in a new one
            components |= {"controlnet": control.eval()}
        if scheduler is None:  # as in the published checkpoints
            scheduler = DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            )
        pipe = pipeline_class(vae=vae.eval(), unet=like_trained(unet), scheduler=scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

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
