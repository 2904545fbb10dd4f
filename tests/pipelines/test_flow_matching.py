"""`StableDiffusion3Pipeline` with `GenieScheduler`: flow matching, by a transformer."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from genie_diffusers import ExactSlope, GenieScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")


@pytest.fixture
def make_pipe():
    def make(pipeline_class=StableDiffusion3Pipeline, scheduler_class=GenieScheduler, **config):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
        # as in the tests of UNets: slow in time, visible in the sample
        transformer.time_text_embed.timestep_embedder.linear_1.weight.data.unflatten(1, (2, 2, -1))[:, :, 0] = 0
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)
        texts = {f"{name}_{i}": None for name, i in (("text_encoder", 2), ("tokenizer", 2))}
        texts |= {"text_encoder": None, "tokenizer": None, "text_encoder_3": None, "tokenizer_3": None}
        scheduler = scheduler_class.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0, **config).config)
        pipe = pipeline_class(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, **texts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe, num_inference_steps: int = 4, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    texts = {
        name: torch.randn(1, *shape, generator=generator).to(pipe.dtype)
        for name, shape in (
            ("prompt_embeds", (3, 8)),
            ("negative_prompt_embeds", (3, 8)),
            ("pooled_prompt_embeds", (8,)),
            ("negative_pooled_prompt_embeds", (8,)),
        )
    }
    size = {} if "image" in options else {"height": 8, "width": 8}
    options = {"guidance_scale": 4.0, "output_type": "latent", **size, **options}
    return pipe(**texts, num_inference_steps=num_inference_steps, generator=generator, **options).images


def distance(latents, reference) -> float:
    return float((latents - reference).norm() / reference.norm())


@pytest.fixture
def solution(make_pipe):
    return draw(make_pipe(scheduler_class=FlowMatchEulerDiscreteScheduler), 500)


@pytest.mark.parametrize("exact", [False, True], ids=["fallback", "exact"])
def test_it_converges_to_the_solution_of_the_stock_scheduler(make_pipe, solution, exact):
    pipe = make_pipe()
    if exact:
        pipe.scheduler.attach(ExactSlope(pipe.transformer))
    errors = [distance(draw(pipe, steps), solution) for steps in (5, 20)]
    euler = distance(draw(make_pipe(scheduler_class=FlowMatchEulerDiscreteScheduler), 20), solution)
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.5 * euler


def test_exact_slope_is_the_difference_quotient_along_the_guided_path(make_pipe):
    pipe = make_pipe().to(torch.float64)
    seen, exact = [], ExactSlope(pipe.transformer)

    class Source:
        bind = exact.bind

        def __call__(self, sample, noise_prediction, timestep, **kwargs):
            call = calls[-1]
            slope = exact(sample, noise_prediction, timestep, **kwargs)
            seen.append((call, sample, noise_prediction, timestep, slope))
            return slope

    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe.scheduler.attach(Source())
    draw(pipe, 4)
    exact.remove()

    @torch.no_grad()
    def noise_at(call, sample, sigma):
        """ε = x + (1 − σ) v of the guided velocity."""
        times = torch.full((2,), 1000 * sigma, dtype=torch.float64)
        output = pipe.transformer(**{**call, "hidden_states": torch.cat([sample] * 2), "timestep": times})[0]
        unconditional, conditional = output.chunk(2)
        return sample + (1 - sigma) * (unconditional + 4.0 * (conditional - unconditional))

    for call, sample, noise_prediction, timestep, slope in seen[1:]:
        sigma = timestep / 1000
        torch.testing.assert_close(noise_at(call, sample, sigma), noise_prediction, rtol=1e-5, atol=1e-5)
        h = 1e-3
        log_snr = np.log((1 - sigma) / sigma)
        ends = [
            noise_at(call, sample + e * sigma * (sample - noise_prediction), 1 / (1 + np.exp(log_snr + e)))
            for e in (h, -h)
        ]
        difference = (ends[0] - ends[1]) / (2 * h)
        assert (slope - difference).norm() < 0.02 * difference.norm()


def test_image_to_image_and_dynamic_shifting(make_pipe):
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    pipe, steps = make_pipe(StableDiffusion3Img2ImgPipeline), []
    pipe.transformer.register_forward_hook(lambda *args: steps.append(1))
    assert torch.isfinite(draw(pipe, 4, image=picture, strength=0.5)).all() and len(steps) == 2
    shifted = make_pipe(use_dynamic_shifting=True)
    assert torch.isfinite(draw(shifted, mu=0.7)).all()
    plain = make_pipe()
    draw(plain)
    assert (shifted.scheduler.timesteps[1:] < plain.scheduler.timesteps[1:]).all()  # e^0.7 < 3


def test_a_transformer_that_is_called_with_another_time_is_refused():
    """As that of FLUX, which is called with σ itself."""

    class Denoiser(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample * timestep.reshape(-1, 1)

    denoiser = Denoiser()
    scheduler = GenieScheduler(prediction_type="flow_prediction")
    scheduler.attach(ExactSlope(denoiser))
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 4)
    with pytest.raises(ValueError, match=r"scheduler's timestep 1000, got `timestep=tensor\(\[1\.\]\)`"):
        scheduler.step(denoiser(sample, torch.ones(1)), scheduler.timesteps[0], sample)
