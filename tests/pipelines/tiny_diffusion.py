"""
The variance-preserving pipelines of diffusers, tiny and random: `pipe, inputs = FAMILIES["sdxl"]()`.

`inputs` are those of a call that draws two pictures. Nothing is downloaded: tokenizers have a vocabulary of letters,
and weights are drawn from a seed. Components are made once; a pipeline is made anew by each call.
"""

import functools
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KolorsPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image

PROMPTS = ["a cat", "a dog"]
#: schedules of published checkpoints
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


# --- weights ---------------------------------------------------------------------------------------------------------


def random_weights(build: Callable[..., torch.nn.Module], seed: int = 0, output_scale: float = 3.0) -> torch.nn.Module:
    """
    A model with random weights that has what solvers rely on in trained ones.

    Its output changes slowly with the timestep (the fast half of the sinusoids is cut off), and visibly with the
    sample: layers that begin at zero are drawn, and the last one is enlarged.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
            if name.endswith("scale_shift_table"):
                torch.nn.init.normal_(parameter, std=0.1)
    for name, module in model.named_modules():
        if isinstance(module, TimestepEmbedding) and name.rsplit(".")[-1] in ("time_embedding", "timestep_embedder"):
            halves = module.linear_1.weight.data.unflatten(1, (2, -1))  # cosines and sines, each from fast to slow
            halves[:, :, : halves.shape[2] // 2] = 0
    for name in ("conv_out", "proj_out", "proj_out_2"):
        last = getattr(model, name, None)
        if isinstance(last, torch.nn.Module) and hasattr(last, "weight"):
            last.weight.data *= output_scale
    return model.eval()


def picture(seed: int) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize((16, 16), Image.Resampling.BILINEAR)


def half_mask() -> Image.Image:
    numbers = np.zeros((16, 16), dtype=np.uint8)
    numbers[:, :8] = 255
    return Image.fromarray(numbers)


# --- texts -----------------------------------------------------------------------------------------------------------


@functools.cache
def clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>"]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@functools.cache
def word_tokenizer():
    """Words as tokens, with an end: for T5, BERT and RoBERTa, whose own tokenizers are files of their checkpoints."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "bird"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def clip_config(hidden_size: int = 16):
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=32,
        projection_dim=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@functools.cache
def clip_text_encoder(projection: bool = False):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return random_weights(lambda: cls(clip_config()))


@functools.cache
def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=16, d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1)
    return random_weights(lambda: T5EncoderModel(config))


# --- the UNets of latents --------------------------------------------------------------------------------------------


@functools.cache
def vae(channels: int = 3, latent_channels: int = 4):
    return random_weights(
        lambda: AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
        ),
        output_scale=1.0,
    )


def text_unet(in_channels: int = 4, cross_attention_dim: int = 16, **options) -> UNet2DConditionModel:
    return random_weights(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=cross_attention_dim,
            **options,
        )
    )


def xl_unet(in_channels: int = 4, pooled: int = 16, times: int = 6, cross_attention_dim: int = 32):
    return text_unet(
        in_channels,
        cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + times * 8,
    )


def stable_diffusion(cls=StableDiffusionPipeline, in_channels: int = 4, scheduler=None, **components):
    """Any pipeline of Stable Diffusion 1.x."""
    # as published: PNDM, whose configuration says `skip_prk_steps` beside the schedule
    published = PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False)
    return cls(
        vae=vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(in_channels),
        scheduler=published if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def text_to_image():
    return stable_diffusion(), {"prompt": PROMPTS, "guidance_scale": 5.0}


def image_to_image():
    images = [picture(1), picture(2)]
    return stable_diffusion(StableDiffusionImg2ImgPipeline), {"prompt": PROMPTS, "image": images}


def inpainting(in_channels: int):
    pipe = stable_diffusion(StableDiffusionInpaintPipeline, in_channels)
    images, masks = [picture(1), picture(2)], [half_mask(), half_mask()]
    return pipe, {"prompt": PROMPTS, "image": images, "mask_image": masks, "height": 16, "width": 16}


def control_net():
    pipe = stable_diffusion(StableDiffusionControlNetPipeline, controlnet=tiny_control_net())
    return pipe, {"prompt": PROMPTS, "image": [picture(1), picture(2)], "guidance_scale": 5.0}


def two_control_nets():
    """Of which each takes one of the pictures, for all paths."""
    pipe = stable_diffusion(StableDiffusionControlNetPipeline, controlnet=[tiny_control_net(), tiny_control_net(1)])
    images, scales = [picture(1), picture(2)], [0.5, 0.3]
    return pipe, {"prompt": PROMPTS, "image": images, "controlnet_conditioning_scale": scales, "guidance_scale": 5.0}


@functools.cache
def tiny_control_net(seed: int = 0):
    return random_weights(
        lambda: ControlNetModel.from_unet(text_unet(), conditioning_embedding_out_channels=(8, 16)), seed
    )


def ip_adapter():
    pipe = stable_diffusion()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    projection = {"proj.weight": drawn(4 * 16, 8), "proj.bias": torch.zeros(4 * 16)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    attentions = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if "attn2" in name]
    weights = {}
    for number, name in enumerate(attentions):
        shape = pipe.unet.get_submodule(name).to_k.weight.shape
        weights |= {f"{2 * number + 1}.{part}.weight": drawn(*shape) for part in ("to_k_ip", "to_v_ip")}
    pipe.unet._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": weights})
    # one adapter, and its picture without and with guidance
    return pipe, {"prompt": PROMPTS, "ip_adapter_image_embeds": [10 * drawn(2, 1, 8)], "guidance_scale": 5.0}


def upscaling():
    pipe = StableDiffusionUpscalePipeline(
        vae=vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction", clip_sample=False),
    )
    images = [picture(seed).resize((8, 8)) for seed in (1, 2)]
    return pipe, {"prompt": PROMPTS, "image": images, "guidance_scale": 5.0}


def instruct_pix2pix():
    pipe = stable_diffusion(StableDiffusionInstructPix2PixPipeline, 8)
    return pipe, {"prompt": PROMPTS, "image": [picture(1), picture(2)], "guidance_scale": 5.0}


def stable_diffusion_xl(**schedule):
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=xl_unet(),
        scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION, **schedule),
    )
    return pipe, {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 16, "width": 16}


def stable_diffusion_xl_refiner(**schedule):
    """What goes on where the base has stopped: one text encoder, and an aesthetic score instead of a target size."""
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=clip_text_encoder(projection=True),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=xl_unet(times=5, cross_attention_dim=16),
        scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION, **schedule),
        requires_aesthetics_score=True,
    )
    return pipe, {"prompt": PROMPTS, "guidance_scale": 5.0}


def kolors():
    """Its text encoder is of a kind of its own, so texts are given as their embeddings."""
    pipe = KolorsPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=xl_unet(),
        scheduler=EulerDiscreteScheduler(**{**STABLE_DIFFUSION, "beta_end": 0.014, "num_train_timesteps": 1100}),
    )
    generator = torch.Generator().manual_seed(0)
    texts = {
        "prompt_embeds": torch.randn(2, 6, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=generator),
        "negative_prompt_embeds": torch.zeros(2, 6, 32),
        "negative_pooled_prompt_embeds": torch.zeros(2, 16),
    }
    return pipe, {**texts, "guidance_scale": 5.0, "height": 16, "width": 16}


def animate_diff():
    pipe = AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(),
        motion_adapter=motion_adapter(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
        ),
    )
    return pipe, {"prompt": PROMPTS, "guidance_scale": 5.0, "num_frames": 2, "height": 16, "width": 16}


@functools.cache
def motion_adapter():
    return random_weights(
        lambda: MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
        )
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def pixart_sigma():
    pipe = PixArtSigmaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae(),
        transformer=pixart_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}
    return pipe, {"prompt": PROMPTS, "guidance_scale": 4.5, "height": 16, "width": 16, **options}


def pixart_transformer(**options) -> PixArtTransformer2DModel:
    return random_weights(
        lambda: PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            use_additional_conditions=False,
            **options,
        ),
        output_scale=1.0,
    )


def cogvideox():
    pipe = CogVideoXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_encoder(),
        vae=video_vae(),
        transformer=cogvideox_transformer(),
        scheduler=CogVideoXDDIMScheduler(
            snr_shift_scale=1.0,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    )
    options = {"num_frames": 5, "max_sequence_length": 8}
    return pipe, {"prompt": PROMPTS, "guidance_scale": 6.0, "height": 16, "width": 16, **options}


def cogvideox_2b():
    """With the noise schedule of the small one."""
    pipe, inputs = cogvideox()
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config, snr_shift_scale=3.0)
    return pipe, inputs


@functools.cache
def video_vae():
    return random_weights(
        lambda: AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
    )


def cogvideox_transformer() -> CogVideoXTransformer3DModel:
    return random_weights(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=8,
        )
    )


def latte():
    transformer = random_weights(
        lambda: LatteTransformer3DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        ),
        output_scale=1.0,
    )
    pipe = LattePipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    options = {"video_length": 2, "clean_caption": False}
    return pipe, {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 16, "width": 16, **options}


def hunyuan_dit():
    from transformers import BertConfig, BertModel

    bert = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    transformer = random_weights(
        lambda: HunyuanDiT2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            hidden_size=24,
            activation_fn="gelu-approximate",
        )
    )
    pipe = HunyuanDiTPipeline(
        vae=vae(),
        text_encoder=random_weights(lambda: BertModel(bert)),
        tokenizer=word_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=word_tokenizer(),
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, inputs


def dit():
    transformer = random_weights(
        lambda: DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        output_scale=1.0,
    )
    pipe = DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [1, 2], "guidance_scale": 4.0}


# --- sounds ----------------------------------------------------------------------------------------------------------


@functools.cache
def clap():
    from transformers import ClapConfig, ClapModel

    text = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1}
    text |= {"num_hidden_layers": 1, "projection_dim": 8, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    audio = {"spec_size": 8, "window_size": 4, "num_mel_bins": 8, "intermediate_size": 16, "depths": [1, 1]}
    audio |= {"num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 192, "projection_dim": 8}
    audio |= {"patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4}
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    return random_weights(lambda: ClapModel(config))


@functools.cache
def vocoder():
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return random_weights(lambda: SpeechT5HifiGan(config))


SOUND = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def audioldm2():
    from transformers import ClapFeatureExtractor, GPT2Config, GPT2LMHeadModel, RobertaTokenizer, T5Tokenizer

    # the pipeline asks which is which by their classes
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = {token: i for i, token in enumerate([*marks, *string.ascii_lowercase, "Ġ"])}
    pieces = [(piece, -2.0) for piece in ("<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "▁dog")]
    gpt2 = GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=16, n_positions=32, bos_token_id=1, eos_token_id=1)
    unet = random_weights(
        lambda: AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=([None, 16, 32], [None, 16, 32]),
            attention_head_dim=2,
        )
    )
    pipe = AudioLDM2Pipeline(
        vae=vae(1),
        text_encoder=clap(),
        text_encoder_2=t5_encoder(),
        projection_model=random_weights(lambda: AudioLDM2ProjectionModel(16, 32, 16)),
        language_model=random_weights(lambda: GPT2LMHeadModel(gpt2)),
        tokenizer=RobertaTokenizer(vocab=letters, merges=[], model_max_length=16),
        tokenizer_2=T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=8),
        feature_extractor=ClapFeatureExtractor(feature_size=8),
        unet=unet,
        scheduler=DDIMScheduler(**SOUND, steps_offset=1),
        vocoder=vocoder(),
    )
    return pipe, {"prompt": PROMPTS, "guidance_scale": 3.5, "audio_length_in_s": 0.0016, "max_new_tokens": 4}


# --- pixels ----------------------------------------------------------------------------------------------------------


def pixel_unet() -> UNet2DModel:
    return random_weights(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
        )
    )


def ddpm():
    return DDPMPipeline(pixel_unet(), DDPMScheduler(clip_sample=False)), {"batch_size": 2}


def ddim():
    return DDIMPipeline(pixel_unet(), DDIMScheduler(clip_sample=False)), {"batch_size": 2}


#: name → what makes its pipeline and the inputs of a call
FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd": text_to_image,
    "sd-inpainting-4": functools.partial(inpainting, 4),
    "sd-inpainting-9": functools.partial(inpainting, 9),
    "sd-controlnet": control_net,
    "sd-two-controlnets": two_control_nets,
    "sd-ip-adapter": ip_adapter,
    "sd-upscale": upscaling,
    "sd-instruct-pix2pix": instruct_pix2pix,
    "sdxl": stable_diffusion_xl,
    "kolors": kolors,
    "animatediff": animate_diff,
    "pixart-sigma": pixart_sigma,
    "cogvideox": cogvideox,
    "cogvideox-2b": cogvideox_2b,
    "latte": latte,
    "hunyuan-dit": hunyuan_dit,
    "dit": dit,
    "audioldm2": audioldm2,
    "ddpm": ddpm,
    "ddim": ddim,
}
