"""
Tiny random pipelines of diffusers that ask of their schedulers more than most: `pipe, inputs = FAMILIES["ltx-2"]()`.

Those of `tiny_diffusion` are among `FAMILIES`. `inputs` are those of a call that draws two pictures, or two videos.
Nothing is downloaded. Schedulers have the configuration that the published checkpoints have. One small language model
stands in for Gemma.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.pipelines import tiny_diffusion
from tests.pipelines.tiny_diffusion import (
    PROMPTS,
    clip_text_encoder,
    clip_tokenizer,
    cogvideox,
    picture,
    t5_encoder,
    word_tokenizer,
)

# --- weights ---------------------------------------------------------------------------------------------------------


def awaken(model: torch.nn.Module) -> torch.nn.Module:
    """
    Give a new model what solvers rely on in trained ones.

    Its output is of order one and depends on the sample, since layers that begin at zero are drawn, and changes slowly
    with the timestep, since only the slow quarter of the sinusoids remains.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table") or (parameter.ndim > 1 and not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            halves = module.linear_1.weight.data.unflatten(1, (2, -1))  # cosines and sines, each from fast to slow
            halves[:, :, : 3 * halves.shape[2] // 4] = 0
    for name in ("proj_out", "audio_proj_out"):
        if isinstance(last := getattr(model, name, None), torch.nn.Linear):
            torch.nn.init.normal_(last.weight, std=last.in_features**-0.5)
    return model.eval()


def tiny(cls: Callable[..., torch.nn.Module], **config) -> torch.nn.Module:
    """A model of this configuration with random weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return awaken(cls(**config))


@functools.cache
def language_model():
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2Model(config).eval()


# --- families --------------------------------------------------------------------------------------------------------


def flux():
    """With negative prompts, for which the model is called a second time."""
    transformer = tiny(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny(AutoencoderKL, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=word_tokenizer(),
    )
    options = {"negative_prompt": ["a bird", "a bird"], "true_cfg_scale": 3.0, "max_sequence_length": 8}
    return pipe, {"prompt": list(PROMPTS), "guidance_scale": 3.5, "height": 8, "width": 8, **options}


def wan_image_to_video():
    """
    That of Wan 2.2: two models, which read a picture by the VAE alone, as 20 channels beside the sample's 16.

    Given a list of generators it takes one picture for all. Without the library ftfy it cannot clean texts, so these
    are given as their embeddings.
    """
    transformer, transformer_2 = (
        tiny(
            WanTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36,
            text_dim=32,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=32,
        )
        for layers in (2, 1)
    )
    pipe = WanImageToVideoPipeline(
        transformer=transformer,
        transformer_2=transformer_2,
        boundary_ratio=0.9,
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, beta_schedule="linear"
        ),
        vae=tiny(AutoencoderKLWan, base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=t5_encoder(),
        tokenizer=word_tokenizer(),
        image_encoder=None,
        image_processor=None,
    )
    texts = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"prompt_embeds": texts[:2], "negative_prompt_embeds": texts[2:].repeat(2, 1, 1), "image": picture(1)}
    return pipe, {**inputs, "guidance_scale": 5.0, "num_frames": 5, "height": 32, "width": 32}


def ltx_2():
    """Videos with sound, which a copy of the scheduler samples beside them. They are not decoded."""
    pipe = LTX2Pipeline(
        transformer=tiny(
            LTX2VideoTransformer3DModel,
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=128,
            audio_out_channels=128,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=tiny(
            AutoencoderKLLTX2Video,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        ),
        audio_vae=tiny(AutoencoderKLLTX2Audio, ch_mult=(1, 1, 1), num_res_blocks=1),
        text_encoder=language_model(),
        tokenizer=word_tokenizer(),
        connectors=tiny(
            LTX2TextConnectors,
            caption_channels=32,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=16,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=16,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
        ),
        vocoder=None,
    )
    options = {"num_frames": 17, "max_sequence_length": 8, "height": 128, "width": 128}
    options |= {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    return pipe, {"prompt": list(PROMPTS), "guidance_scale": 4.0, **options}


def cogvideox_2b():
    """With the noise schedule of the small one."""
    pipe, inputs = cogvideox()
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config, snr_shift_scale=3.0)
    return pipe, inputs


#: name → what makes its pipeline and the inputs of a call
FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **tiny_diffusion.FAMILIES,
    "cogvideox-2b": cogvideox_2b,
    "flux, negative prompts": flux,
    "wan-image-to-video": wan_image_to_video,
    "ltx-2": ltx_2,
}
