"""`GenieStableDiffusionPipeline` and `GenieStableDiffusionXLPipeline`: diffusers' own, with a head."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    EulerDiscreteScheduler,
    LDMSuperResolutionPipeline,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from peft import LoraConfig, get_peft_model_state_dict

from genie_diffusers import (
    DerivativeHead,
    GenieScheduler,
    GenieStableDiffusionPipeline,
    GenieStableDiffusionXLPipeline,
    GenieUNet2DModel,
    StepHead,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
)
TABLE = {"timesteps": [999, 500], "weights": [[1.2, -0.3], [1.1, -0.4, 0.1]], "residuals": [0.3, 0.2]}


def draw(pipe, num_inference_steps: int = 4, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"prompt": "a cat", "guidance_scale": 5.0, "output_type": "latent"} | options
    return pipe(generator=generator, num_inference_steps=num_inference_steps, **options).images


@pytest.fixture
def make_pipe(make_stable_diffusion, with_head):
    def make(pipeline_class=GenieStableDiffusionPipeline, head_class=DerivativeHead, **config):
        pipe = make_stable_diffusion(pipeline_class)
        pipe.scheduler = GenieScheduler.from_config(
            pipe.scheduler.config, **{"prediction_type": "v_prediction", "timestep_spacing": "trailing", **config}
        )
        pipe.unet = with_head(pipe, head_class)
        return pipe

    return make


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (GenieStableDiffusionPipeline, StableDiffusionPipeline),
        (GenieStableDiffusionXLPipeline, StableDiffusionXLPipeline),
    ],
)
def test_it_is_the_stock_pipeline_with_the_head_attached(make_pipe, ours, stock):
    pipe = make_pipe(ours)
    plain = stock(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    with_head = draw(pipe, guidance_rescale=0.5)
    torch.testing.assert_close(draw(plain, guidance_rescale=0.5), with_head)
    pipe.scheduler.attach(None)
    assert not torch.allclose(draw(pipe, guidance_rescale=0.5), with_head, rtol=1e-2)
    rebuilt = ours(**pipe.components)
    rebuilt.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(rebuilt, guidance_rescale=0.5), with_head)


def test_the_head_follows_a_new_scheduler_and_stock_pipelines_made_from_it(make_pipe):
    pipe = make_pipe()
    with_head = draw(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.isfinite(draw(pipe)).all()
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(draw(pipe), with_head)
    options = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "strength": 0.5}
    # `from_pipe` hands over by itself only what has the very type that it expects.
    from_ours = StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet)
    images = draw(from_ours, **options)
    from_ours.scheduler.attach(None)
    assert not torch.allclose(draw(from_ours, **options), images, rtol=1e-2)
    pipe = GenieStableDiffusionPipeline.from_pipe(from_ours, unet=from_ours.unet)
    torch.testing.assert_close(draw(pipe), with_head)


def test_a_step_head_draws_by_its_table(make_pipe):
    pipe, seen = make_pipe(head_class=StepHead), []
    pipe.unet.derivative_head.register_to_config(tables={"2": TABLE})
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append(int(args[1])))
    assert torch.isfinite(draw(pipe, 2)).all()
    assert seen == TABLE["timesteps"]


def test_the_analytical_first_step_is_in_the_initial_noise_and_costs_no_call(make_pipe):
    pipe, seen = make_pipe(analytical_first_step=True), []
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append((args[0], int(args[1]))))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw(pipe, 4, latents=noise)
    scale = pipe.scheduler.init_noise_sigma
    assert len(seen) == 4 and seen[0][1] < 999 and abs(scale - 1) > 1e-3
    torch.testing.assert_close(seen[0][0], (scale * noise).repeat(2, 1, 1, 1))


def test_a_lora_is_loaded_scaled_fused_and_unloaded_with_the_head_in_place(make_pipe, tmp_path):
    donor = make_pipe()
    torch.manual_seed(0)
    donor.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = get_peft_model_state_dict(donor.unet)
    assert layers and not any("derivative_head" in name for name in layers)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = make_pipe()
    without = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    with_lora = draw(pipe)
    torch.testing.assert_close(with_lora, draw(donor))
    assert not torch.allclose(with_lora, without, rtol=1e-2)
    pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(draw(pipe), with_lora, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    assert (draw(pipe) - without).norm() < 0.8 * (with_lora - without).norm()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), without, rtol=1e-3, atol=1e-4)  # fusing rounds


def test_animatediff_builds_a_unet_of_its_own_and_gets_the_fallback(make_pipe):
    ours = make_pipe()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    components = {name: ours.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    pipe = AnimateDiffPipeline(**components, motion_adapter=adapter, scheduler=ours.scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a cat", "num_inference_steps": 3, "num_frames": 2, "output_type": "latent"}
    options |= {"height": 16, "width": 16}
    with pytest.raises(ValueError, match="AnimateDiff, samples without a head"):
        pipe(**options)
    with pytest.raises(ValueError, match="a plain `UNetMotionModel` does not"):
        pipe.scheduler.attach(pipe.unet)
    pipe.scheduler.attach(None)
    frames = pipe(**options).frames
    assert frames.shape == (1, 4, 2, 8, 8) and torch.isfinite(frames).all()


@pytest.mark.parametrize("head_class", [None, DerivativeHead, StepHead])
def test_super_resolution_with_a_picture_on_further_channels(make_unet, head_class):
    torch.manual_seed(0)
    vqvae = VQModel(block_out_channels=(8,), latent_channels=3, num_vq_embeddings=16, norm_num_groups=4)
    unet, scheduler, calls = make_unet(in_channels=6), GenieScheduler(), []
    if head_class is not None:
        head = head_class.for_unet(unet)
        if head_class is StepHead:
            head.register_to_config(tables={"2": TABLE})
        head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        unet = GenieUNet2DModel.from_unet(unet, head)
        scheduler.attach(unet)
    pipe = LDMSuperResolutionPipeline(vqvae, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = pipe(picture, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()
    assert calls == ([] if head_class is None else [(1, 3, 8, 8)] * 2)


@pytest.mark.slow
def test_the_package_is_imported_without_the_text_to_image_pipelines():
    """They import transformers, an extra."""
    code = "import sys, genie_diffusers; assert 'transformers.models.clip' not in sys.modules\n"
    code += "assert genie_diffusers.GenieStableDiffusionXLPipeline.__name__ in genie_diffusers.__all__"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd="/")
