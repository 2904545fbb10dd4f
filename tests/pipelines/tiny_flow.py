"""Stock flow-matching pipelines of diffusers with tiny random models and the schedulers of their checkpoints."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "blurry", "user", "assistant")
PROMPTS = ["a cat", "a dog"]
#: calls by the name of their family, `FAMILIES["sd3"]()` is a pipeline and the inputs of a call for two paths
FAMILIES: dict[str, Callable[[], tuple[DiffusionPipeline, dict[str, Any]]]] = {}


def family(build):
    FAMILIES[build.__name__] = build
    return build


# --- texts -----------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer(length: int = 8):
    """One token for each word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        chat_template="{% for message in messages %}user {{ message['content'] }} assistant {% endfor %}",
    )


@functools.cache
def text_encoder(name: str, size: int = 16, **options):
    """A text encoder of transformers, `text_encoder("T5")`."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    shared = {"vocab_size": len(WORDS), "hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2, **ids}
    grouped = {**shared, "num_key_value_heads": 1, "head_dim": size // 2}
    t5 = {"vocab_size": len(WORDS), "d_model": size, "d_kv": size // 2, "d_ff": 2 * size, "num_layers": 1}
    t5 |= {"num_heads": 2, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1}
    model_class, config = {
        "CLIP": (transformers.CLIPTextModel, shared),
        "CLIP with projection": (transformers.CLIPTextModelWithProjection, {**shared, "projection_dim": size}),
        "T5": (transformers.T5EncoderModel, t5),
        "UMT5": (transformers.UMT5EncoderModel, t5),
        "Llama": (transformers.LlamaModel, grouped),
        "Llama with a head": (transformers.LlamaForCausalLM, grouped),
        "Qwen3": (transformers.Qwen3Model, grouped),
        "Gemma 2": (transformers.Gemma2Model, grouped),
    }[name]
    model = model_class(model_class.config_class(**config, **options)).eval()
    for embedding in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
        torch.nn.init.normal_(embedding.weight)  # so that prompts differ
    return model


# --- transformers ----------------------------------------------------------------------------------------------------


@functools.cache
def vae() -> AutoencoderKL:
    """A VAE with one latent for each pixel."""
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1).eval()


def transformer(name: str, **config):
    """A transformer of diffusers with random weights, whose outputs change slowly with time and are not zero."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    for parameter in model.parameters():  # what a new model has as zeros or as small numbers
        if parameter.ndim > 1 and parameter.std() < 0.05:
            torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        first = getattr(module, "linear_1", None) if type(module).__name__ == "TimestepEmbedding" else None
        first = module.mlp[0] if type(module).__name__ == "TimestepEmbedder" else first
        if first is not None:  # cosines and sines, each from fast to slow
            waves = first.weight.data.unflatten(1, (2, -1))
            waves[:, :, : 3 * waves.shape[-1] // 4] = 0
    return model


def with_outputs_of_order_one(pipe: DiffusionPipeline, inputs: dict[str, Any], last: torch.nn.Linear):
    """Scale the last layer so that the model's first outputs have a root mean square of one."""
    inputs, seen = {"output_type": "latent", **inputs}, []
    hook = last.register_forward_hook(lambda module, args, output: seen.append(output))
    pipe.set_progress_bar_config(disable=True)
    pipe(**own(inputs), num_inference_steps=2, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    hook.remove()
    size = seen[0].square().mean().sqrt()
    for parameter in last.parameters():
        parameter.data /= size
    return pipe, inputs


def own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of one call, which may write into lists, as Z-Image does; pictures for all paths are a list in it."""
    pictures = {"image": list(inputs["image"])} if isinstance(inputs.get("image"), tuple) else {}
    return {name: list(value) if isinstance(value, list) else value for name, value in inputs.items()} | pictures


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- families --------------------------------------------------------------------------------------------------------


@family
def sd3():
    clip = text_encoder("CLIP with projection", 8)
    model = transformer(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip,
        tokenizer=tokenizer(),
        text_encoder_2=clip,
        tokenizer_2=tokenizer(),
        text_encoder_3=text_encoder("T5"),
        tokenizer_3=tokenizer(),
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 8, "width": 8, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


def _flux(pipeline_class, **inputs):
    model = transformer(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipe = pipeline_class(
        scheduler=scheduler,
        vae=vae(),
        text_encoder=text_encoder("CLIP"),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder("T5"),
        tokenizer_2=tokenizer(),
        transformer=model,
    )
    size = {"height": 8, "width": 8, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, {"prompt": PROMPTS, **size, **inputs}, model.proj_out)


@family
def flux():
    return _flux(diffusers.FluxPipeline, guidance_scale=3.5)


@family
def flux_with_negative_prompts():
    """For which the model is called a second time."""
    return _flux(
        diffusers.FluxPipeline, guidance_scale=3.5, negative_prompt=["blurry", "blurry dog"], true_cfg_scale=3.0
    )


@family
def flux_kontext():
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    return _flux(diffusers.FluxKontextPipeline, guidance_scale=2.5, image=picture, max_area=64, _auto_resize=False)


def _flux_2(**inputs):
    model = transformer(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.manual_seed(0)
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = diffusers.Flux2Pipeline(
        scheduler=scheduler, vae=decoder.eval(), text_encoder=None, tokenizer=None, transformer=model
    )
    inputs = {"prompt_embeds": embeddings(2, 4, 16), "guidance_scale": 4.0, "height": 64, "width": 64, **inputs}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def flux_2():
    return _flux_2()


@family
def flux_2_with_references():
    """Two pictures for both paths."""
    return _flux_2(image=tuple(Image.new("RGB", (64, 64), (200, 100, 50 * i)) for i in (1, 2)))


@family
def qwen_image():
    model = transformer(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        time_shift_type="exponential",
        shift_terminal=0.02,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=model
    )
    inputs = {"prompt_embeds": embeddings(2, 4, 16), "negative_prompt_embeds": embeddings(2, 4, 16, seed=1)}
    for name in list(inputs):
        inputs[f"{name}_mask"] = torch.ones(2, 4, dtype=torch.long)
    inputs |= {"true_cfg_scale": 4.0, "height": 64, "width": 64}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def z_image():
    model = transformer(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    pipe = diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=text_encoder("Qwen3"),
        tokenizer=tokenizer(),
        transformer=model,
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 4.0, "height": 8, "width": 8, "max_sequence_length": 16}
    return with_outputs_of_order_one(pipe, inputs, model.all_final_layer["2-1"].linear)


@family
def sana():
    model = transformer(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_end=0.02, solver_order=2
    )
    pipe = diffusers.SanaPipeline(
        tokenizer=tokenizer(), text_encoder=text_encoder("Gemma 2"), vae=None, transformer=model, scheduler=scheduler
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 4.5, "height": 256, "width": 256, "max_sequence_length": 8}
    inputs |= {"use_resolution_binning": False, "complex_human_instruction": ("a blurry user",)}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def lumina_2():
    model = transformer(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    pipe = diffusers.Lumina2Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=text_encoder("Gemma 2"),
        tokenizer=tokenizer(),
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 4.0, "height": 64, "width": 64, "max_sequence_length": 16}
    inputs |= {"system_prompt": "a user"}
    return with_outputs_of_order_one(pipe, inputs, model.norm_out.linear_2)


@family
def wan():
    model = transformer(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder("UMT5"),
        vae=None,
        scheduler=scheduler,
        transformer=model,
    )
    inputs = {"prompt": PROMPTS, "negative_prompt": "blurry", "guidance_scale": 5.0, "height": 32, "width": 32}
    inputs |= {"num_frames": 5, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def wan_2_2():
    """With two transformers that are not quite the same, the second of them below a noise level."""
    pipe, inputs = wan()
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.875)
    torch.manual_seed(1)
    for parameter in pipe.transformer_2.parameters():
        parameter.data += 0.03 * parameter.data.std() * torch.randn_like(parameter)
    return pipe, {**inputs, "guidance_scale": 4.0, "guidance_scale_2": 3.0}


@family
def ltx():
    model = transformer(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler, vae=None, text_encoder=text_encoder("T5"), tokenizer=tokenizer(), transformer=model
    )
    inputs = {"prompt": PROMPTS, "negative_prompt": "blurry", "guidance_scale": 3.0, "height": 64, "width": 64}
    inputs |= {"num_frames": 9, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def ltx_from_a_picture():
    """Which steps all frames but the first."""
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe, inputs = ltx()
    pipe = diffusers.LTXImageToVideoPipeline(**{**pipe.components, "vae": decoder.eval()})
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.new("RGB", (64, 64), (200, 100, 50 * i)) for i in (1, 2)]
    return pipe, {**inputs, "image": pictures, "num_frames": 17}


@family
def hunyuan_video():
    model = transformer(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=text_encoder("Llama"),
        tokenizer=tokenizer(),
        transformer=model,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder("CLIP", max_position_embeddings=77),
        tokenizer_2=tokenizer(),
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 6.0, "height": 32, "width": 32, "num_frames": 5}
    inputs |= {"max_sequence_length": 8, "prompt_template": {"template": "user {}", "crop_start": 1}}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def chroma():
    model = transformer(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    waves = model.distilled_guidance_layer.in_proj.weight.data[:, :16].unflatten(1, (2, -1))
    waves[:, :, :6] = 0  # as those of all others
    pipe = diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=vae(),
        text_encoder=text_encoder("T5"),
        tokenizer=tokenizer(),
        transformer=model,
    )
    inputs = {"prompt": PROMPTS, "negative_prompt": "blurry", "guidance_scale": 3.0, "height": 8, "width": 8}
    inputs |= {"max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def aura_flow():
    model = transformer(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder("UMT5"),
        vae=vae(),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 3.5, "height": 8, "width": 8, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def hidream():
    clip = text_encoder("CLIP with projection", 8, max_position_embeddings=218)
    model = transformer(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=scheduler,
        vae=vae(),
        text_encoder=clip,
        tokenizer=tokenizer(),
        text_encoder_2=clip,
        tokenizer_2=tokenizer(),
        text_encoder_3=text_encoder("T5"),
        tokenizer_3=tokenizer(),
        text_encoder_4=text_encoder("Llama with a head"),
        tokenizer_4=tokenizer(),
        transformer=model,
    )
    pipe.default_sample_size = 8  # by which sizes are scaled
    inputs = {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 8, "width": 8, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.final_layer.linear)


@family
def kandinsky_5():
    """Which writes the next sample into the tensor of the one before."""
    model = transformer(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    waves = model.time_embeddings.in_layer.weight.data.unflatten(1, (2, -1))
    waves[:, :, : 3 * waves.shape[-1] // 4] = 0
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=10.0),
    )
    inputs = {"guidance_scale": 5.0, "height": 32, "width": 32, "num_frames": 5}
    for seed, name in enumerate(("", "negative_")):
        inputs[f"{name}prompt_embeds_qwen"] = embeddings(2, 4, 16, seed=seed)
        inputs[f"{name}prompt_embeds_clip"] = embeddings(2, 16, seed=seed)
        inputs[f"{name}prompt_cu_seqlens"] = torch.tensor([0, 4, 8], dtype=torch.int32)
    return with_outputs_of_order_one(pipe, inputs, model.out_layer.out_layer)


@family
def wan_from_a_picture():
    """Of Wan 2.1 and 2.2: latents of the picture are further channels."""
    model = transformer(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder("UMT5"),
        vae=decoder.eval(),
        scheduler=scheduler,
        transformer=model,
    )
    pipe.register_modules(transformer_2=None)
    inputs = {"prompt_embeds": embeddings(2, 4, 16), "negative_prompt_embeds": embeddings(2, 4, 16, seed=1)}
    inputs |= {"image": Image.new("RGB", (32, 32), (200, 100, 50)), "guidance_scale": 5.0}
    inputs |= {"height": 32, "width": 32, "num_frames": 5}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


@family
def flux_inpainting():
    """Which writes the known part of the picture into the sample between steps."""
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 8, 4))
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    return _flux(diffusers.FluxInpaintPipeline, guidance_scale=3.5, image=picture, mask_image=mask, strength=1.0)


@family
def bria():
    return bria_with()


def bria_with(**config):
    model = transformer(
        "BriaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    pipe = diffusers.BriaPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(**config),
        vae=vae(),
        text_encoder=text_encoder("T5"),
        tokenizer=tokenizer(),
    )
    inputs = {"prompt": PROMPTS, "guidance_scale": 5.0, "height": 16, "width": 16, "max_sequence_length": 8}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


def cogview_4():
    model = transformer(
        "CogView4Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
    )
    inputs = {"prompt_embeds": embeddings(2, 4, 16), "negative_prompt_embeds": embeddings(2, 4, 16, seed=1)}
    inputs |= {"guidance_scale": 5.0, "height": 64, "width": 64}
    return with_outputs_of_order_one(pipe, inputs, model.proj_out)


def ltx_2():
    """Videos with sound, which a copy of the scheduler samples beside them. They are not decoded."""
    torch.manual_seed(0)
    pipe = diffusers.LTX2Pipeline(
        transformer=transformer(
            "LTX2VideoTransformer3DModel",
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
        vae=transformer(
            "AutoencoderKLLTX2Video",
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        ),
        audio_vae=transformer("AutoencoderKLLTX2Audio", ch_mult=(1, 1, 1), num_res_blocks=1),
        text_encoder=text_encoder("Qwen3", 32),
        tokenizer=tokenizer(),
        connectors=LTX2TextConnectors(
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
    return pipe, {"prompt": PROMPTS, "guidance_scale": 4.0, **options}
