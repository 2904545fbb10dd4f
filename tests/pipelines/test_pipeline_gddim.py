"""`GDDIMPipeline`: states of any linear diffusion in, images out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genie_diffusers import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMPipeline, GDDIMScheduler

SIZE = (8, 12)
#: scheduler, channels of a state
SETTINGS = {
    "vp": (lambda: GDDIMScheduler(), 3),
    "cld": (lambda: GDDIMCLDScheduler(), 6),
    "cld, preconditioned": (lambda: GDDIMCLDScheduler(preconditioned=True), 6),
    "blurring": (lambda: GDDIMBlurringScheduler(sample_size=SIZE), 3),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture
def make_pipe(make_unet):
    def make(name: str, **config) -> GDDIMPipeline:
        build, channels = SETTINGS[name]
        unet = make_unet(sample_size=SIZE, in_channels=channels, out_channels=channels, **config)
        pipe = GDDIMPipeline(unet, build())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def noise_for(pipe: GDDIMPipeline, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, pipe.unet.config.in_channels, *SIZE, generator=generator)


@every_setting
def test_images_are_those_of_the_scheduler_from_the_prior(make_pipe, name):
    pipe = make_pipe(name)
    images = pipe(latents=noise_for(pipe), num_inference_steps=4, output_type="latent").images
    scheduler = SETTINGS[name][0]()
    scheduler.set_timesteps(4)
    state = scheduler.process.prior(noise_for(pipe))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = pipe.unet(scheduler.scale_model_input(state, timestep), timestep).sample
            state = scheduler.step(prediction, timestep, state).prev_sample
    assert images.shape == (2, 3, *SIZE)
    torch.testing.assert_close(images, state[:, :3])


@every_setting
def test_classes_and_guidance_follow_their_formula(make_pipe, name):
    pipe = make_pipe(name, num_class_embeds=4).to(torch.float64)
    options = {"latents": noise_for(pipe).double(), "num_inference_steps": 3, "output_type": "latent"}
    guided = pipe(class_labels=[1, 0], guidance_scale=2.0, **options).images
    scheduler = SETTINGS[name][0]()
    scheduler.set_timesteps(3)
    state = scheduler.process.prior(noise_for(pipe).double())
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(state, timestep)
            null = pipe.unet(model_input, timestep, class_labels=torch.tensor([3, 3])).sample
            towards = pipe.unet(model_input, timestep, class_labels=torch.tensor([1, 0])).sample
            state = scheduler.step(null + 2.0 * (towards - null), timestep, state).prev_sample
    torch.testing.assert_close(guided, state[:, :3], rtol=1e-4, atol=1e-4)


@every_setting
def test_images_do_not_depend_on_the_batch(make_pipe, name):
    pipe = make_pipe(name)
    pipe.scheduler.register_to_config(eta=1.0, multistep_order=1)

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(generator=generators, num_inference_steps=3, output_type="pt").images

    torch.testing.assert_close(draw([0, 1, 2])[1:], draw([1, 2]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_they_save_and_load_in_a_fresh_process(make_pipe, tmp_path):
    expected = {}
    for name in SETTINGS:
        pipe = make_pipe(name)
        expected[name] = pipe(latents=noise_for(pipe), num_inference_steps=3, output_type="np").images
        pipe.save_pretrained(tmp_path / name)
        np.save(tmp_path / name / "noise.npy", noise_for(pipe).numpy())
    code = (
        "import sys, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from genie_diffusers import GDDIMPipeline\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    latents = torch.from_numpy(np.load(folder / 'noise.npy'))\n"
        "    pipe = GDDIMPipeline.from_pretrained(folder)\n"
        "    images = pipe(latents=latents, num_inference_steps=3, output_type='np').images\n"
        "    np.save(folder / 'images.npy', images)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    for name, images in expected.items():
        np.testing.assert_allclose(np.load(tmp_path / name / "images.npy"), images, atol=1e-5)


def test_a_unet_for_pictures_does_not_fit_langevin_states(make_unet):
    with pytest.raises(ValueError, match=r"2 blocks of C channels are stacked, got \(1, 3, 8, 8\)"):
        GDDIMPipeline(make_unet(), GDDIMCLDScheduler())


def test_a_unet_of_another_size_does_not_fit_the_frequencies(make_unet):
    with pytest.raises(ValueError, match=r"must have the height and width \(32, 32\)"):
        GDDIMPipeline(make_unet(), GDDIMBlurringScheduler())
