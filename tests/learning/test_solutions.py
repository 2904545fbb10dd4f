import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from genie_diffusers import GeniePipeline, GenieScheduler
from genie_diffusers.learning.solutions import (
    Teacher,
    add_teacher_arguments,
)
from genie_diffusers.models.genie_unet import GenieUNet2DModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


def teacher_of(base, **named) -> Teacher:
    parser = argparse.ArgumentParser()
    add_teacher_arguments(parser)
    named = {"pretrained_model_name_or_path": base, "num_inference_steps": 8, "label_dropout": 0.2} | named
    return Teacher(
        parser.parse_args([str(part) for name, value in named.items() for part in (f"--{name}", value)]), CPU
    )


class Gaussian(torch.nn.Module):
    """The denoiser of data N(0.7, 0.5²): the state is α 0.7 + √(α² 0.25 + σ²) z all along the ODE."""

    config = SimpleNamespace(in_channels=3, sample_size=4, num_class_embeds=None)
    derivative_head = None

    def __init__(self, process):
        super().__init__()
        self.process = process

    def level(self, t: float) -> tuple[float, float, float]:
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        return alpha, sigma, (alpha**2 * 0.25 + sigma**2) ** 0.5

    def forward(self, sample, timestep, class_labels=None):
        alpha, sigma, spread = self.level(float(timestep))
        return SimpleNamespace(sample=sigma * (sample - 0.7 * alpha) / spread**2)

    def state(self, noise: torch.Tensor, t: float) -> torch.Tensor:
        first, last = self.level(999.0), self.level(t)
        return 0.7 * last[0] + last[2] * (noise - 0.7 * first[0]) / first[2]


@pytest.fixture
def exact_teacher(base, monkeypatch):
    """Builds a teacher whose model is a Gaussian's exact denoiser."""
    process = GenieScheduler().process
    unet = Gaussian(process)
    monkeypatch.setattr(GenieUNet2DModel, "from_pretrained", lambda *args, **kwargs: unet)

    def build(**named) -> Teacher:
        named = {"label_dropout": 0.0, **named}
        return teacher_of(base, **named)

    return build


@pytest.mark.parametrize(
    ("scheduler", "steps", "tolerance"),
    [
        ("GenieScheduler", 40, 2e-3),
        ("DPMSolverMultistepScheduler", 60, 4e-3),
        ("DDIMScheduler", 500, 1e-2),
        ("EulerDiscreteScheduler", 400, 1e-2),  # its states are scaled
        ("HeunDiscreteScheduler", 60, 4e-3),  # it calls the model twice at a timestep
    ],
)
def test_every_solver_passes_through_the_exact_states(exact_teacher, scheduler, steps, tolerance):
    options = {"timestep_spacing": "trailing"} if scheduler == "DDIMScheduler" else {"timestep_spacing": "linspace"}
    teacher = exact_teacher(scheduler=scheduler, num_inference_steps=steps, scheduler_options=json.dumps(options))
    noises = teacher.draw([0, 1], seed=0)
    states = teacher.solve(noises)
    assert states.shape == (2, 4, 3, 4, 4)
    for m, t in enumerate(teacher.solution_timesteps):
        expected = teacher.unet.state(noises.noise, t)
        torch.testing.assert_close(states[:, m], expected, rtol=0, atol=tolerance)


def test_states_between_model_calls_are_as_exact_as_those_at_them(exact_teacher):
    teacher = exact_teacher(num_inference_steps=40)
    noises = teacher.draw([0, 1], seed=0)
    visited = teacher.scheduler.timesteps.tolist()
    index = next(i for i, t in enumerate(visited) if t < 300)
    errors = []
    for t in (float(visited[index]), visited[index] + 0.4 * (visited[index - 1] - visited[index])):
        teacher.rows = [teacher._row(float(visited[index - 1]), float(visited[index]), t)]
        errors.append((teacher.solve(noises)[:, 0] - teacher.unet.state(noises.noise, t)).abs().max())
    assert errors[0] < 1e-3 and errors[1] < 1.5 * errors[0] + 1e-4


def test_guided_solutions_are_those_of_a_guided_pipeline(base):
    teacher = teacher_of(base, guidance_scale=2.5, label_dropout=0.0)
    noises = teacher.draw([0, 1, 2], seed=3)
    assert set(noises.labels.tolist()) <= {0, 1, 2}
    pipe = GeniePipeline.from_pretrained(base)
    pipe.scheduler = teacher.scheduler
    images = pipe(
        class_labels=noises.labels,
        latents=noises.noise,
        guidance_scale=2.5,
        num_inference_steps=8,
        output_type="latent",
    ).images
    torch.testing.assert_close(teacher.solve(noises)[:, -1], images, rtol=1e-4, atol=1e-4)


def test_noise_is_a_pure_function_of_seed_and_number(base):
    teacher = teacher_of(base)
    whole, part = teacher.draw(list(range(100)), 0), teacher.draw([7, 5], 0)
    assert torch.equal(whole.noise[[7, 5]], part.noise) and torch.equal(whole.labels[[7, 5]], part.labels)
    assert not torch.equal(teacher.draw([7], 1).noise, part.noise[:1])
    assert abs(whole.noise.mean()) < 0.02 and abs(whole.noise.std() - 1) < 0.02
    assert set(whole.labels.tolist()) == {0, 1, 2, 3} and (whole.labels == 3).float().mean() < 0.4
