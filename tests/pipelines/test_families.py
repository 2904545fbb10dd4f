"""Tiny random pipelines of diffusers' families, with schedulers of ours from the configuration of their own."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from genie_diffusers import GenieScheduler
from tests.pipelines import tiny_diffusion, tiny_flow

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
)

FAMILIES = {**tiny_diffusion.FAMILIES, **tiny_flow.FAMILIES, "ltx_2": tiny_flow.ltx_2}
#: families that call their model once for each branch of guidance
TWO_CALLS = ("flux_with_negative_prompts", "qwen_image", "lumina_2", "wan", "wan_2_2", "wan_from_a_picture", "chroma")
TWO_CALLS += ("kandinsky_5",)
#: those whose own solver ends where ours does, since it is no random one and starts from pure noise too
DETERMINISTIC = ("cogvideox", "cogvideox-2b", "pixart-sigma", "dit", *tiny_flow.FAMILIES, "ltx_2")


def quick(names):
    """All of one kind of pipeline, and of flows those whose schedulers differ."""
    of_flows = ("sd3", "flux", "qwen_image", "wan", "ltx_2")
    slow = [name for name in tiny_flow.FAMILIES if name not in of_flows]
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.fixture
def made(request) -> tuple[DiffusionPipeline, dict[str, Any]]:
    if request.param == "kolors":
        pytest.importorskip("sentencepiece", reason="diffusers imports Kolors with the library of its tokenizer only")
    pipe, inputs = FAMILIES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, inputs


def draw(pipe, inputs: dict[str, Any], steps: int, scheduler=None, seeds=(0, 1)) -> torch.Tensor:
    """Samples of these noises, as latents where the pipeline lets them out."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    options = tiny_flow.own(inputs)
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        options["output_type"] = "latent"
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    samples = pipe(**options, num_inference_steps=steps, generator=generators)[0]
    return torch.as_tensor(np.asarray(samples) if not torch.is_tensor(samples) else samples).float()


def ours(scheduler, **options) -> GenieScheduler:
    return GenieScheduler.from_config(scheduler.config, clip_sample=False, **options)


def distance(samples: torch.Tensor, reference: torch.Tensor) -> float:
    return float((samples - reference).norm() / reference.norm())


@pytest.mark.parametrize("made", quick(FAMILIES), indirect=True)
def test_as_many_model_calls_as_steps(made, request):
    pipe, inputs = made
    shape = draw(pipe, inputs, 3).shape
    calls = []
    for name, model in pipe.components.items():
        if name in ("unet", "transformer", "transformer_2") and model is not None:
            model.register_forward_hook(lambda *args: calls.append(1))
    samples = draw(pipe, inputs, 3, ours(pipe.scheduler))
    assert samples.shape == shape and samples.isfinite().all() and samples.std() > 0.01
    assert len(calls) == 3 * (2 if request.node.callspec.params["made"] in TWO_CALLS else 1)
    assert pipe.scheduler.step_index == 3


@pytest.mark.parametrize("made", quick(DETERMINISTIC), indirect=True)
def test_many_steps_end_where_those_of_its_own_scheduler_do(made):
    pipe, inputs = made
    own = pipe.scheduler
    solution = draw(pipe, inputs, 60, ours(own))
    assert distance(draw(pipe, inputs, 30, ours(own)), solution) < 0.03
    few, many = (distance(draw(pipe, inputs, steps, own), solution) for steps in (10, 40))
    assert many < 0.04 and many < 0.6 * few


def test_a_copy_of_the_scheduler_samples_the_sound_of_a_video():
    pipe, inputs = tiny_flow.ltx_2()
    pipe.set_progress_bar_config(disable=True)
    own, sounds = pipe.scheduler, []
    for scheduler in (own, ours(own)):
        pipe.scheduler = scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        sounds.append(pipe(**inputs, num_inference_steps=40, generator=generators, output_type="latent").audio)
    assert distance(sounds[1], sounds[0]) < 0.02
