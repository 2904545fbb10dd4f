"""diffusers' own pipelines with our schedulers from `pipe.scheduler.config`, and pipelines that were saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file

import genie_diffusers
from genie_diffusers import (
    ExactSlope,
    GenieInverseScheduler,
    GeniePipeline,
    GenieScheduler,
    GenieStableDiffusionPipeline,
    GenieStableDiffusionXLPipeline,
    QuasiTaylorScheduler,
)
from genie_diffusers.models import sources
from genie_diffusers.models.guidance import branch_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
)

# With v-prediction and "trailing" timesteps all solvers start at the same noise level, and the picture is what the
# random UNet makes of the noise rather than the noise itself.
SMOOTH = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(images, reference) -> float:
    """Relative root mean square difference of images in [0, 1]."""
    return float(np.linalg.norm(images - reference) / np.linalg.norm(reference - 0.5))


class Calls(list):
    """The timesteps that a pipeline calls its UNet with."""

    def __init__(self, unet):
        unet.register_forward_hook(self.note)

    def note(self, module, args, output):
        if args[1].ndim == 0:  # an `ExactSlope` passes one for each sample
            self.append(int(args[1]))


# --- DDPMPipeline and DDIMPipeline -----------------------------------------------------------------------------------


def pixel_pipeline(pipeline_class, unet, config=SMOOTH, source=None, scheduler_class=GenieScheduler, **options):
    pipe = pipeline_class(unet, DDPMScheduler(**config))
    # after construction: DDIMPipeline wants its own
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    if source == "exact":
        pipe.scheduler.attach(ExactSlope(unet))
    elif source == "head":
        pipe.scheduler.attach(unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel_images(pipe, num_inference_steps: int) -> np.ndarray:
    options = {"eta": 0.0} if isinstance(pipe, DDIMPipeline) else {}
    return pipe(2, generator=seeded(), num_inference_steps=num_inference_steps, output_type="np", **options).images


@pytest.fixture
def solution(make_unet):
    """Images of the probability-flow ODE, solved by DPM-Solver++ in 200 steps."""
    pipe = pixel_pipeline(DDPMPipeline, make_unet())
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pixel_images(pipe, 200)


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("source", [None, "exact", "head"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_pixel_pipelines_draw_what_ours_draws(make_genie_unet, pipeline_class, source, clip_sample):
    config = {**SMOOTH, "clip_sample": clip_sample}
    unet = make_genie_unet(config)
    images = pixel_images(pixel_pipeline(pipeline_class, unet, config, source), 4)
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0.05
    ours = pixel_pipeline(GeniePipeline, unet, config, source)
    if source is None:
        ours.scheduler.attach(None)
    np.testing.assert_allclose(images, pixel_images(ours, 4), atol=1e-5)


@pytest.mark.parametrize("source", ["exact", "head"])
def test_attached_sources_change_the_images(make_genie_unet, source):
    unet = make_genie_unet(SMOOTH)
    without = pixel_images(pixel_pipeline(DDPMPipeline, unet), 4)
    assert distance(pixel_images(pixel_pipeline(DDPMPipeline, unet, source=source), 4), without) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_pixel_pipelines_converge_to_the_solution_of_the_ode(make_unet, solution, pipeline_class):
    pipe = pixel_pipeline(pipeline_class, make_unet())
    coarse, fine = (distance(pixel_images(pipe, steps), solution) for steps in (20, 80))
    assert fine < 0.005
    assert fine < coarse / 8  # second order: 16
    ddim = DDIMPipeline(make_unet(), pipe.scheduler)
    ddim.set_progress_bar_config(disable=True)
    assert type(ddim.scheduler) is DDIMScheduler
    assert coarse < 0.6 * distance(pixel_images(ddim, 20), solution)


def test_exact_slopes_bring_pixel_pipelines_closer_to_the_solution(make_unet, solution):
    plain = distance(pixel_images(pixel_pipeline(DDPMPipeline, make_unet()), 8), solution)
    exact = distance(pixel_images(pixel_pipeline(DDPMPipeline, make_unet(), source="exact"), 8), solution)
    assert exact < 0.9 * plain


def test_ddim_pipeline_refuses_noise_that_the_sampler_would_not_add(make_unet):
    pipe = pixel_pipeline(DDIMPipeline, make_unet())
    with pytest.raises(ValueError, match=r"`eta`.*0\.5"):
        pipe(num_inference_steps=2, eta=0.5)


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("method", ["ode", "sde"])
def test_pixel_pipelines_draw_what_ours_draws_by_quasi_taylor(make_unet, pipeline_class, method):
    options = {"scheduler_class": QuasiTaylorScheduler, "method": method, "taylor_order": 3}
    images = pixel_images(pixel_pipeline(pipeline_class, make_unet(), **options), 6)
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0.05
    ours = pixel_pipeline(GeniePipeline, make_unet(), **options)
    np.testing.assert_allclose(images, pixel_images(ours, 6), atol=1e-5)


def test_pixel_pipelines_converge_to_the_solution_of_the_ode_by_quasi_taylor(make_unet, solution):
    pipe = pixel_pipeline(DDPMPipeline, make_unet(), scheduler_class=QuasiTaylorScheduler, taylor_order=3)
    coarse, fine = (distance(pixel_images(pipe, steps), solution) for steps in (20, 80))
    assert fine < 0.05
    assert fine < coarse / 3  # first order: 4


# --- Stable Diffusion ------------------------------------------------------------------------------------------------


@pytest.fixture
def stable_diffusion(make_stable_diffusion, with_head):
    """A pipeline with our scheduler from its scheduler's configuration, with a source or without."""

    def make(
        pipeline_class=StableDiffusionPipeline, source=None, unet_channels=4, scheduler_class=GenieScheduler, **config
    ):
        pipe = make_stable_diffusion(pipeline_class, unet_channels)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **{**SMOOTH, **config})
        if source == "exact":
            pipe.scheduler.attach(ExactSlope(pipe.unet))
        elif source == "head":
            pipe.unet = with_head(pipe)
            pipe.scheduler.attach(pipe.unet)
        return pipe

    return make


def picture(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.rand((1, channels, 16, 16), generator=seeded(seed))


LEFT_HALF = torch.zeros(1, 1, 16, 16)
LEFT_HALF[..., :8] = 1.0

#: pipeline → its class, the channels of its UNet, and what it is called with
TASKS = {
    "text-to-image": (StableDiffusionPipeline, 4, {}),
    "img2img-0.5": (StableDiffusionImg2ImgPipeline, 4, {"image": picture(1), "strength": 0.5}),
    "img2img-1.0": (StableDiffusionImg2ImgPipeline, 4, {"image": picture(1), "strength": 1.0}),
    "inpaint": (
        StableDiffusionInpaintPipeline,
        4,
        {"image": picture(1), "mask_image": LEFT_HALF, "height": 16, "width": 16},
    ),
    "inpaint-0.5": (
        StableDiffusionInpaintPipeline,
        4,
        {"image": picture(1), "mask_image": LEFT_HALF, "height": 16, "width": 16, "strength": 0.5},
    ),
    "inpaint-9-channels": (
        StableDiffusionInpaintPipeline,
        9,
        {"image": picture(1), "mask_image": LEFT_HALF, "height": 16, "width": 16},
    ),
}
every_task = pytest.mark.parametrize("task", TASKS)
#: what else is guided or conditioned
FURTHER_TASKS = {
    "controlnet": (StableDiffusionControlNetPipeline, 4, {"image": picture(1)}),
    "perturbed attention": (StableDiffusionPAGPipeline, 4, {"pag_scale": 2.0}),
    "upscale": (
        StableDiffusionUpscalePipeline,
        7,
        {"image": picture(1)[..., ::2, ::2], "noise_level": 20},
    ),
    "xl": (StableDiffusionXLPipeline, 4, {"guidance_rescale": 0.7}),
    "xl-img2img-0.5": (StableDiffusionXLImg2ImgPipeline, 4, {"image": picture(1), "strength": 0.5}),
    "xl, perturbed attention": (StableDiffusionXLPAGPipeline, 4, {"pag_scale": 2.0}),
}


def draw(pipe, task: str, num_inference_steps: int, **options) -> np.ndarray:
    arguments = {
        "prompt": "a cat",
        "guidance_scale": 5.0,
        "generator": seeded(),
        "num_inference_steps": num_inference_steps,
        "output_type": "latent",
        **(TASKS | FURTHER_TASKS)[task][2],
        **options,
    }
    images = pipe(**arguments).images
    return images.numpy() if torch.is_tensor(images) else images


def latent_distance(latents: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS | FURTHER_TASKS)
@pytest.mark.parametrize("source", [None, "exact", "head"])
def test_stable_diffusion_pipelines_run_all_their_steps(stable_diffusion, task, source):
    pipeline_class, unet_channels, options = (TASKS | FURTHER_TASKS)[task]
    pipe = stable_diffusion(pipeline_class, source, unet_channels)
    calls = Calls(pipe.unet)
    images = draw(pipe, task, 4, output_type="np")
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all() and images.std() > 0.01
    taken = 2 if options.get("strength") == 0.5 else 4
    assert calls == pipe.scheduler.timesteps[-taken:].tolist()
    assert pipe.scheduler.step_index == 4


@every_task
@pytest.mark.parametrize("method", ["ode", "sde"])
def test_stable_diffusion_pipelines_run_all_their_steps_by_quasi_taylor(stable_diffusion, task, method):
    pipeline_class, unet_channels, options = TASKS[task]
    pipe = stable_diffusion(pipeline_class, None, unet_channels, QuasiTaylorScheduler, method=method)
    calls = Calls(pipe.unet)
    images = draw(pipe, task, 4, output_type="np")
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all() and images.std() > 0.01
    taken = 2 if options.get("strength") == 0.5 else 4
    assert calls == pipe.scheduler.timesteps[-taken:].tolist()


@pytest.mark.slow
@every_task
def test_stable_diffusion_pipelines_agree_with_the_solvers_of_diffusers_at_many_steps(stable_diffusion, task):
    pipeline_class, unet_channels, _ = TASKS[task]
    pipe = stable_diffusion(pipeline_class, None, unet_channels)
    config = pipe.scheduler.config
    # Inpainting of a UNet without mask channels edits every step, so its limit depends on the steps: the same ones.
    genie = draw(pipe, task, 50)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    dpm = draw(pipe, task, 50)
    pipe.scheduler = DDIMScheduler.from_config(config)
    ddim = draw(pipe, task, 50)
    assert latent_distance(genie, dpm) < 0.006
    assert latent_distance(genie, ddim) < 0.06


def test_stable_diffusion_agrees_with_ddim_by_quasi_taylor(stable_diffusion):
    pipe = stable_diffusion()
    config = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(config, set_alpha_to_one=True)
    ddim = draw(pipe, "text-to-image", 25)
    distances = []
    for taylor_order in (1, 2, 3):
        pipe.scheduler = QuasiTaylorScheduler.from_config(config, taylor_order=taylor_order)
        distances.append(latent_distance(draw(pipe, "text-to-image", 25), ddim))
    assert distances[2] < distances[1] < distances[0]
    assert distances[2] < 0.002


@pytest.mark.slow
def test_exact_slopes_and_the_data_form_bring_stable_diffusion_closer_to_the_solution(stable_diffusion):
    pipe = stable_diffusion()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    solution = draw(pipe, "text-to-image", 150)

    def distance(method, source):
        pipe = stable_diffusion(source=source, method=method)
        return latent_distance(draw(pipe, "text-to-image", 8), solution)

    assert distance("taylor", "exact") < 0.9 * distance("taylor", None)
    for source in (None, "exact"):
        assert distance("hermite", source) < 0.8 * distance("taylor", source)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_slope_is_that_of_the_guided_prediction(stable_diffusion, prediction_type):
    """Against finite differences of the guided ε along the guided path, in float64."""
    pipe = stable_diffusion(prediction_type=prediction_type).to(torch.float64)
    exact = ExactSlope(pipe.unet)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    seen = []

    class Source:
        bind = exact.bind

        def __call__(self, sample, noise_prediction, timestep, **kwargs):
            slope = exact(sample, noise_prediction, timestep, **kwargs)
            seen.append((sample, noise_prediction, int(timestep), slope))
            return slope

    pipe.scheduler.attach(Source())
    draw(pipe, "text-to-image", 4)
    exact.remove()
    with torch.no_grad():
        embeddings = torch.cat(pipe.encode_prompt("a cat", "cpu", 1, True)[::-1])

    def level(t: float) -> tuple[float, float]:
        """α and σ at a real timestep: log ᾱ is all but quadratic over three of them."""
        nearest = min(round(t), 998)
        around = alphas_cumprod[nearest - 1 : nearest + 2].log()
        offset = t - nearest
        log = (
            around[1] + offset * (around[2] - around[0]) / 2 + offset**2 * (around[2] - 2 * around[1] + around[0]) / 2
        )
        return log.exp().sqrt().item(), (-log.expm1()).sqrt().item()

    @torch.no_grad()
    def guided(sample, t):
        time = torch.tensor(t, dtype=torch.float64)
        unconditional, conditional = pipe.unet(torch.cat([sample] * 2), time, embeddings).sample.chunk(2)
        output = unconditional + 5.0 * (conditional - unconditional)
        alpha, sigma = level(t)
        return output if prediction_type == "epsilon" else alpha * output + sigma * sample

    assert len(seen) == 4
    for sample, noise_prediction, t, slope in seen:
        _, sigma = level(t)
        velocity = sigma**2 * sample - sigma * noise_prediction
        lambda_dot = sum(sign * np.log(np.divide(*level(t + sign * 0.5))) for sign in (1, -1))  # dλ/dt
        torch.testing.assert_close(guided(sample, t), noise_prediction, rtol=1e-6, atol=1e-6)
        h = 0.5 * abs(lambda_dot)
        ahead, behind = (guided(sample + e * velocity, t + e / lambda_dot) for e in (h, -h))
        difference = (ahead - behind) / (2 * h)
        assert (slope - difference).norm() < 1e-3 * difference.norm()


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("text-to-image", {}, [-4, 5]),
        ("perturbed attention", {}, [-4, 7, -2]),
        ("xl", {"guidance_rescale": 0.0}, [-4, 5]),
        ("xl, perturbed attention", {"guidance_scale": 0.0}, [3, -2]),
        ("controlnet", {}, [-4, 5]),
        ("upscale", {}, [-4, 5]),
    ],
)
def test_heads_weigh_the_branches_as_the_pipeline_has_guided(stable_diffusion, monkeypatch, task, options, expected):
    pipeline_class, unet_channels, _ = FURTHER_TASKS.get(task, TASKS["text-to-image"])
    pipe, found = stable_diffusion(pipeline_class, "head", unet_channels), []

    def recorded(*args):
        found.append(branch_weights(*args))
        return found[-1]

    monkeypatch.setattr(sources, "branch_weights", recorded)
    draw(pipe, task, 3, **options)
    assert len(found) == 3
    for weights in found:
        torch.testing.assert_close(weights.flatten(), torch.tensor(expected).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("source", [None, "exact", "head"])
def test_rescaled_guidance_is_still_a_combination_of_the_branches(stable_diffusion, source):
    pipe = stable_diffusion(source=source)
    images = draw(pipe, "text-to-image", 3, guidance_rescale=0.7)
    assert np.isfinite(images).all()
    assert latent_distance(draw(pipe, "text-to-image", 3), images) > 0.01


def test_custom_timesteps_and_sigmas_are_taken_by_pipelines(stable_diffusion):
    pipe = stable_diffusion()
    calls = Calls(pipe.unet)
    by_timesteps = draw(pipe, "text-to-image", None, timesteps=[999, 700, 300, 20])
    assert calls == [999, 700, 300, 20]
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[[999, 700, 300, 20]]
    by_sigmas = draw(pipe, "text-to-image", None, sigmas=np.sqrt(1 / alphas_cumprod - 1).tolist())
    np.testing.assert_allclose(by_sigmas, by_timesteps, atol=1e-5)


def test_what_a_pipeline_rewrites_when_it_is_built_is_what_is_sampled_with(make_stable_diffusion):
    config = {"timestep_spacing": "leading", "prediction_type": "v_prediction"}
    rewritten = make_stable_diffusion(scheduler=GenieScheduler(clip_sample=True, **config))
    meant = make_stable_diffusion(scheduler=GenieScheduler(clip_sample=False, steps_offset=1, **config))
    images = draw(rewritten, "text-to-image", 4)
    assert (rewritten.scheduler.config.steps_offset, rewritten.scheduler.config.clip_sample) == (1, False)
    assert rewritten.scheduler.timesteps.tolist() == [801, 601, 401, 201]
    np.testing.assert_array_equal(images, draw(meant, "text-to-image", 4))


@pytest.mark.parametrize(
    "options",
    [{}, {"source": "exact"}, {"scheduler_class": QuasiTaylorScheduler, "method": "sde"}],
    ids=["genie", "genie, exact", "quasi-taylor-sde"],
)
def test_one_generator_per_image_gives_the_same_images_for_any_split_into_batches(stable_diffusion, options):
    pipe = stable_diffusion(**options)
    whole = draw(pipe, "text-to-image", 3, num_images_per_prompt=2, generator=[seeded(1), seeded(2)])
    parts = [draw(pipe, "text-to-image", 3, generator=[seeded(seed)]) for seed in (1, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-3)


@pytest.mark.parametrize("source", [None, "exact"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_the_known_half_exactly(stable_diffusion, source, strength):
    pipe = stable_diffusion(StableDiffusionInpaintPipeline, source)
    latents = torch.from_numpy(draw(pipe, "inpaint", 4, strength=strength))
    # the encoding is drawn from the generator, before the noise
    image = 2 * picture(1) - 1
    with torch.no_grad():
        known = pipe.vae.encode(image).latent_dist.sample(seeded()) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[..., 4:], known[..., 4:], rtol=0, atol=1e-6)
    assert (latents[..., :4] - known[..., :4]).abs().min() > 1e-4


@pytest.mark.slow
def test_diffedit_inverts_with_ours_as_it_does_with_ddim_and_in_fewer_steps(make_stable_diffusion):
    components = make_stable_diffusion().components
    components.pop("image_encoder")
    config = components["scheduler"].config
    pipe = StableDiffusionDiffEditPipeline(**components, inverse_scheduler=DDIMInverseScheduler.from_config(config))
    pipe.set_progress_bar_config(disable=True)

    options = {"image": picture(1), "inpaint_strength": 0.8, "guidance_scale": 1.0}

    def invert(cls, steps: int) -> torch.Tensor:
        pipe.inverse_scheduler = cls.from_config(config, timestep_spacing="trailing")
        inverted = pipe.invert("a cat", num_inference_steps=steps, generator=seeded(), **options)
        assert inverted.latents.shape[1] == round(0.8 * steps), "it stops half-way"
        return inverted.latents[0, 0]

    reference = invert(GenieInverseScheduler, 500)
    ours, theirs = (
        float((invert(cls, 100) - reference).norm()) for cls in (GenieInverseScheduler, DDIMInverseScheduler)
    )
    assert ours < 0.75 * theirs
    assert (invert(DDIMInverseScheduler, 500) - reference).norm() < 0.5 * theirs


# --- saving and loading ----------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import json, sys
import torch
import genie_diffusers
from diffusers import DiffusionPipeline
from genie_diffusers import ExactSlope
from safetensors.torch import save_file

folder, out = sys.argv[1:]
images, facts = {}, {}
for name, options in json.load(open(folder + "/pipelines.json")).items():
    loader = getattr(genie_diffusers, options.pop("loader"), DiffusionPipeline)
    pipe = loader.from_pretrained(f"{folder}/{name}")
    pipe.set_progress_bar_config(disable=True)
    facts[name] = [type(pipe).__name__, type(pipe.scheduler).__name__, type(pipe.unet).__name__]
    for source in options.pop("sources"):
        if source != "as loaded":
            pipe.scheduler.attach(ExactSlope(pipe.unet) if source == "exact" else pipe.unet)
        images[f"{name}, {source}"] = torch.as_tensor(
            pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=3, **options).images
        )
save_file({name: image.contiguous() for name, image in images.items()}, out)
print(json.dumps(facts))
"""


@pytest.mark.slow
def test_saved_pipelines_load_in_a_fresh_process(make_unet, make_genie_unet, stable_diffusion, with_head, tmp_path):
    ddpm = DDPMPipeline(make_unet(), GenieScheduler(**SMOOTH))
    ddpm_with_head = DDPMPipeline(make_genie_unet(SMOOTH), GenieScheduler(**SMOOTH))
    genie = GeniePipeline(make_genie_unet(SMOOTH), GenieScheduler(**SMOOTH))
    quasi_taylor = DDPMPipeline(make_unet(), QuasiTaylorScheduler(**SMOOTH, method="sde"))
    pipelines = {
        "quasi-taylor": (quasi_taylor, {"output_type": "np", "sources": ["as loaded"]}),
        "ddpm": (ddpm, {"output_type": "np", "sources": ["as loaded", "exact"]}),
        "ddpm-head": (ddpm_with_head, {"output_type": "np", "sources": ["as loaded", "head"]}),
        "genie": (genie, {"output_type": "np", "sources": ["as loaded"]}),
        "stable-diffusion": (
            stable_diffusion(),
            {"prompt": "a cat", "guidance_scale": 5.0, "output_type": "latent", "sources": ["as loaded", "exact"]},
        ),
    }
    for name, pipeline_class in (
        ("genie-stable-diffusion", GenieStableDiffusionPipeline),
        ("genie-stable-diffusion-xl", GenieStableDiffusionXLPipeline),
    ):
        pipe = stable_diffusion(pipeline_class)
        pipe.unet = with_head(pipe)
        options = {"prompt": "a cat", "guidance_scale": 5.0, "output_type": "latent", "sources": ["as loaded", "head"]}
        pipelines[name] = (pipe, options)
    expected = {}
    for name, (pipe, options) in pipelines.items():
        pipe.set_progress_bar_config(disable=True)
        options = dict(options)
        for source in options.pop("sources"):
            if source != "as loaded":
                pipe.scheduler.attach(ExactSlope(pipe.unet) if source == "exact" else pipe.unet)
            images = pipe(generator=seeded(), num_inference_steps=3, **options).images
            expected[f"{name}, {source}"] = torch.as_tensor(images)
        pipe.save_pretrained(tmp_path / name)  # with the source attached
        saved = (tmp_path / name / "scheduler" / "scheduler_config.json").read_text()
        assert "slope" not in saved and "head" not in saved
    named = {name: {**options, "loader": type(pipe).__name__} for name, (pipe, options) in pipelines.items()}
    (tmp_path / "pipelines.json").write_text(json.dumps(named))

    package = Path(genie_diffusers.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), str(tmp_path / "images.safetensors")],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0, fresh.stderr
    assert json.loads(fresh.stdout.splitlines()[-1]) == {
        "quasi-taylor": ["DDPMPipeline", "QuasiTaylorScheduler", "UNet2DModel"],
        "ddpm": ["DDPMPipeline", "GenieScheduler", "UNet2DModel"],
        "ddpm-head": ["DDPMPipeline", "GenieScheduler", "GenieUNet2DModel"],
        "genie": ["GeniePipeline", "GenieScheduler", "GenieUNet2DModel"],
        "stable-diffusion": ["StableDiffusionPipeline", "GenieScheduler", "UNet2DConditionModel"],
        "genie-stable-diffusion": ["GenieStableDiffusionPipeline", "GenieScheduler", "GenieUNet2DConditionModel"],
        "genie-stable-diffusion-xl": ["GenieStableDiffusionXLPipeline", "GenieScheduler", "GenieUNet2DConditionModel"],
    }
    images = load_file(tmp_path / "images.safetensors")
    assert images.keys() == expected.keys()
    for name in images:
        torch.testing.assert_close(
            images[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    # A stock pipeline starts without its head, ours with it.
    for name in ("genie-stable-diffusion", "genie-stable-diffusion-xl"):
        torch.testing.assert_close(images[f"{name}, as loaded"], images[f"{name}, head"])
    assert not torch.allclose(images["genie-stable-diffusion, head"], images["stable-diffusion, as loaded"], atol=1e-2)
    assert not torch.allclose(images["ddpm-head, as loaded"], images["ddpm-head, head"], atol=1e-2)
    torch.testing.assert_close(images["genie, as loaded"], images["ddpm-head, head"], rtol=1e-4, atol=1e-4)
