"""Calibration in the variance-preserving pipelines of diffusers, from the first call to the use of what is learned."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from genie_diffusers import GenieScheduler, calibrate
from genie_diffusers.calibration import Calibration
from genie_diffusers.calibration.recording import split_inputs
from genie_diffusers.core.table import Table
from tests.pipelines.tiny_diffusion import FAMILIES, image_to_image, stable_diffusion_xl, stable_diffusion_xl_refiner

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
)
#: calls of the runs that are learned from: few, since these models are smooth
TEACHER = 24


def made(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    if name == "kolors":
        pytest.importorskip("sentencepiece", reason="diffusers imports Kolors with the library of its tokenizer only")
    return quietly(FAMILIES[name]())


def quietly(family: tuple[DiffusionPipeline, dict[str, Any]]) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Without a progress bar, and with modules of its own, which may be cast, hooked and compiled."""
    pipe, inputs = family
    modules = {key: value for key, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    pipe.register_modules(**copy.deepcopy(modules))
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(inputs)


def model_of(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class Calls(list):
    """The timesteps that a pipeline calls its model with."""

    def __init__(self, pipe):
        self.hook = model_of(pipe).register_forward_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs, output):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.append(float(torch.as_tensor(timestep).flatten()[0]))

    def timesteps(self) -> list[float]:
        self.hook.remove()
        return list(self)


class Steps(list):
    """What a scheduler does in each of its steps."""

    def __init__(self, scheduler):
        self.scheduler, self.step = scheduler, scheduler.step
        scheduler.step = self.note

    def note(self, model_output, timestep, sample, *args, **kwargs):
        found = self.step(model_output, timestep, sample, *args, **kwargs)
        self.append(
            {
                "timestep": float(timestep),
                "sample": sample.clone(),
                "following": found[0].clone(),
                "table": self.scheduler.table,
                "levels": self.scheduler.levels.gammas.tolist(),
            }
        )
        return found


def draw(pipe, inputs: dict[str, Any], steps: int, seed: int = 100, scheduler=None, **options) -> torch.Tensor:
    """Two samples of one noise each, with noises that no calibration has seen."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    options = {**inputs, **options}
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        options.setdefault("output_type", "latent")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    found = pipe(**options, num_inference_steps=steps, generator=generators)[0]
    return torch.as_tensor(np.asarray(found) if not torch.is_tensor(found) else found).float()


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def converged(pipe, inputs, **options) -> torch.Tensor:
    """Where the solver ends with many calls."""
    scheduler = plain(pipe.scheduler)
    scheduler.register_to_config(time_grid="uniform_lambda")
    return draw(pipe, inputs, 40, scheduler=scheduler, **options)


def plain(scheduler) -> GenieScheduler:
    """The solver with nothing learned."""
    return GenieScheduler.from_config(scheduler.config, clip_sample=False, tables=None)


def errors(pipe, inputs, steps: int, learned: GenieScheduler, **options) -> tuple[float, float]:
    """How far the learned run and that of the solver end from the solution, on noises that were not learned from."""
    reference = converged(pipe, inputs, **options)
    ours = draw(pipe, inputs, steps, scheduler=learned, **options)
    assert learned.table == Table.from_dict(learned.config.tables[str(steps)], learned.process, steps)
    return distance(ours, reference), distance(draw(pipe, inputs, steps, scheduler=plain(learned)), reference)


# --- families --------------------------------------------------------------------------------------------------------

#: a minute together
LONG = ("cogvideox-2b", "sd-inpainting-4", "sd-inpainting-9", "sd-controlnet", "sd-instruct-pix2pix", "sdxl", "kolors")
LONG += (
    "sd-two-controlnets",
    "sd-ip-adapter",
    "sd-upscale",
    "animatediff",
    "hunyuan-dit",
    "latte",
    "audioldm2",
    "ddpm",
    "ddim",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in FAMILIES])
def test_few_calls_of_every_family(name):
    pipe, inputs = made(name)
    original = pipe.scheduler
    shape = draw(pipe, inputs, 4).shape
    learned = calibrate(pipe, (3, 4), teacher_steps=TEACHER, refinements=0, **inputs)
    assert pipe.scheduler is original
    reference = converged(pipe, inputs)
    for steps in (3, 4):
        calls = Calls(pipe)
        samples = draw(pipe, inputs, steps, scheduler=learned)
        assert samples.shape == shape and samples.isfinite().all()
        entry = learned.config.tables[str(steps)]
        assert calls.timesteps() == learned.timesteps.tolist() == entry["timesteps"]
        assert learned.table == Table.from_dict(entry, learned.process, steps) and learned.step_index == steps
        ours = distance(samples, reference)
        solver = distance(draw(pipe, inputs, steps, scheduler=plain(learned)), reference)
        assert ours < 0.5 * solver, (steps, ours, solver)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-controlnet", "sdxl", "animatediff", "cogvideox", "hunyuan-dit", "audioldm2"])
def test_refined_tables(name):
    pipe, inputs = made(name)
    learned = calibrate(pipe, 4, teacher_steps=TEACHER, refinements=1, **inputs)
    ours, solver = errors(pipe, inputs, 4, learned)
    assert ours < 0.5 * solver, (ours, solver)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sd", "cogvideox")), "dit"]
)
def test_one_path_in_a_call(name):
    """The paths of one call are told apart: each in a call of its own, they give the same tables."""
    pipe, inputs = made(name)
    whole, split = (
        Calibration(pipe, 3, max_batch_size=size, teacher_steps=TEACHER, refinements=0, **inputs) for size in (None, 1)
    )
    first, second = (draw(pipe, inputs, 3, scheduler=one.run()) for one in (whole, split))
    np.testing.assert_allclose(whole.fits[3].errors, split.fits[3].errors, rtol=1e-2)
    assert whole.fits[3].errors[0] != pytest.approx(whole.fits[3].errors[1], rel=1e-3)
    assert distance(first, second) < 1e-3


@pytest.mark.slow
def test_two_guidance_scales_at_once():
    pipe, inputs = made("sd")
    learned = calibrate(pipe, 4, teacher_steps=TEACHER, refinements=0, **{**inputs, "guidance_scale": (1.0, 5.0)})
    assert learned.config.tables["4"]["learned_for"]["guidance_scale"] == [1.0, 5.0]
    for scale in (1.0, 5.0):
        ours, solver = errors(pipe, {**inputs, "guidance_scale": scale}, 4, learned)
        assert ours < 0.6 * solver, (scale, ours, solver)


@pytest.mark.slow
def test_negative_prompts_and_rescaled_guidance_reach_every_path():
    pipe, inputs = made("sdxl")
    inputs |= {"negative_prompt": "a bird", "guidance_rescale": 0.7, "original_size": (16, 16)}
    learned = calibrate(pipe, 4, teacher_steps=TEACHER, refinements=0, **inputs)
    inputs["negative_prompt"] = ["a bird"] * 2
    ours, solver = errors(pipe, inputs, 4, learned)
    assert ours < 0.5 * solver, (ours, solver)


def test_lists_for_adapters_belong_to_all_paths():
    """However the paths are split; a list of lists has one for each path, as in diffusers."""
    pipe, inputs = made("sd-two-controlnets")
    three = {**inputs, "prompt": ["a cat", "a dog", "a bird"]}
    count, batches = split_inputs(pipe, three, None, 0, 2)
    assert count == 3 and [batch.numbers for batch in batches] == [[0, 1], [2]]
    for batch in batches:
        assert batch.inputs["image"] == inputs["image"]
        assert batch.inputs["controlnet_conditioning_scale"] == [0.5, 0.3]
    nested = [inputs["image"]] * 3
    _, batches = split_inputs(pipe, {**three, "image": nested}, None, 0, 2)
    assert [batch.inputs["image"] for batch in batches] == [nested[:2], nested[2:]]
    one, given = made("sd-controlnet")
    _, batches = split_inputs(one, given, None, 0, 1)
    assert [batch.inputs["image"] for batch in batches] == [[picture] for picture in given["image"]]
    adapted, given = made("sd-ip-adapter")
    _, batches = split_inputs(adapted, given, None, 0, 1)
    assert [batch.inputs["ip_adapter_image_embeds"] for batch in batches] == [given["ip_adapter_image_embeds"]] * 2


def test_pictures_as_inputs_are_told_apart_in_a_folder(tmp_path):
    pipe, inputs = made("sd-instruct-pix2pix")
    options = {"teacher_steps": 16, "refinements": 0, "output_dir": tmp_path}
    first = calibrate(pipe, 2, **options, **inputs)
    calls = Calls(pipe)
    again = calibrate(pipe, 2, **options, **inputs)
    assert again.config.tables == first.config.tables
    assert len(calls) == 4 + 8, "the runs that say how far the recorded one has converged"
    with pytest.raises(ValueError, match="`inputs` must be"):
        calibrate(pipe, 2, **options, **{**inputs, "image": inputs["image"][::-1]})


# --- pipelines that were changed -------------------------------------------------------------------------------------


def cast(pipe, dtype: torch.dtype):
    pipe.to(dtype)


def add_lora(pipe, rank: int = 2):
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=rank, init_lora_weights=False, target_modules=["to_q", "to_v"])
        model_of(pipe).add_adapter(config)


def cache(pipe, name: str, **options):
    if name in ("FasterCache", "PyramidAttentionBroadcast"):
        options |= {
            "spatial_attention_block_skip_range": 2,
            "current_timestep_callback": lambda: pipe.current_timestep,
        }
    pipe.transformer.enable_cache(getattr(diffusers, f"{name}Config")(**options))


def compile_model(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


#: that diffusers does not know to be what CogVideoX calls so
ATTENTION = {"cache_identifiers": ["transformer_blocks.*attn1"]}
#: what was done to a pipeline → the pipeline, and what does it
CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bfloat16": ("pixart-sigma", lambda pipe: cast(pipe, torch.bfloat16)),
    "LoRA": ("cogvideox", add_lora),
    "offloaded models": ("pixart-sigma", lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "weights in float8": (
        "pixart-sigma",
        lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ),
    "first block cache": ("cogvideox", lambda pipe: cache(pipe, "FirstBlockCache", threshold=0.4)),
    "faster cache": ("cogvideox", lambda pipe: cache(pipe, "FasterCache", tensor_format="BFCHW")),
    "attention broadcast": ("cogvideox", lambda pipe: cache(pipe, "PyramidAttentionBroadcast")),
    "Taylor cache": (
        "cogvideox",
        lambda pipe: cache(pipe, "TaylorSeerCache", cache_interval=2, disable_cache_before_step=1, **ATTENTION),
    ),
}
#: more of them, which take longer
LONG_CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "float16, HunyuanDiT": ("hunyuan-dit", lambda pipe: cast(pipe, torch.float16)),
    "float16, UNet": ("sd", lambda pipe: cast(pipe, torch.float16)),
    "bfloat16, UNet": ("sdxl", lambda pipe: cast(pipe, torch.bfloat16)),
    "LoRA, UNet": ("sd", add_lora),
    "offloaded models, UNet": ("sdxl", lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "compiled": ("sd", compile_model),
    "compiled in place": ("sd", lambda pipe: pipe.unet.compile(backend="aot_eager")),
    "FreeU": ("sd", lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
}


@pytest.mark.parametrize("change", [*CHANGES, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_CHANGES)])
def test_what_was_done_to_a_pipeline_is_learned_with_it(change):
    name, make = (CHANGES | LONG_CHANGES)[change]
    pipe, inputs = made(name)
    unchanged = draw(pipe, inputs, 4)
    make(pipe)
    before = draw(pipe, inputs, 4)
    if "offloaded" in change or "compiled" in change:
        torch.testing.assert_close(before, unchanged, rtol=1e-3, atol=1e-3)
    else:
        assert distance(before, unchanged) > 1e-5
    learned = calibrate(pipe, 4, teacher_steps=TEACHER, refinements=0, **inputs)
    # nothing of the runs that were left in their midst remains in caches and hooks
    torch.testing.assert_close(draw(pipe, inputs, 4), before, rtol=0, atol=0)
    ours, solver = errors(pipe, inputs, 4, learned)
    assert ours < 0.5 * solver, (ours, solver)


def test_a_calibration_that_fails_leaves_nothing_in_caches():
    pipe, inputs = made("cogvideox")
    cache(pipe, "TaylorSeerCache", cache_interval=2, disable_cache_before_step=1, **ATTENTION)
    before = draw(pipe, inputs, 4)
    calls = Calls(pipe)
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, output: tuple(one * np.nan for one in output) if len(calls) == 4 else output
    )
    with pytest.raises(ValueError, match="The model returned NaN or infinity at timestep"):
        calibrate(pipe, 4, teacher_steps=TEACHER, **inputs)
    hook.remove()
    torch.testing.assert_close(draw(pipe, inputs, 4), before, rtol=0, atol=0)


# --- parts of a run --------------------------------------------------------------------------------------------------


def test_a_base_and_a_refiner_share_a_run():
    base, inputs = quietly(stable_diffusion_xl(prediction_type="v_prediction"))
    refiner, refined = quietly(stable_diffusion_xl_refiner(prediction_type="v_prediction"))
    learned = calibrate(base, 6, teacher_steps=TEACHER, refinements=0, **inputs)
    base.scheduler = refiner.scheduler = learned
    steps = Steps(learned)
    latents = draw(base, inputs, 6, denoising_end=0.8)
    taken = len(steps)
    assert 0 < taken < 6 and all(step["table"] is steps[0]["table"] for step in steps)
    assert steps[0]["table"] == Table.from_dict(learned.config.tables["6"], learned.process, 6)
    whole = draw(refiner, refined, 6, image=latents, denoising_start=0.8)
    assert [step["timestep"] for step in steps] == learned.config.tables["6"]["timesteps"]
    # the refiner begins with what the base has ended with, at the level at which it has
    torch.testing.assert_close(steps[taken]["sample"], steps[taken - 1]["following"], rtol=0, atol=0)
    assert steps[taken]["levels"][taken] == steps[taken - 1]["levels"][taken]
    assert whole.isfinite().all()


def test_a_refiner_with_nothing_left_to_do_says_so():
    """With few calls a table need not call the model in the last fifth at all."""
    base, inputs = made("sdxl")
    refiner, refined = quietly(stable_diffusion_xl_refiner())
    base.scheduler = refiner.scheduler = GenieScheduler.from_config(base.scheduler.config)
    for pipe in (base, refiner):
        pipe.scheduler.register_to_config(time_grid="linear")
    latents = draw(base, inputs, 2, denoising_end=0.8)
    base.scheduler.set_timesteps(2)
    last = f"{float(base.scheduler.timesteps[-1]):g}"
    with pytest.raises(ValueError, match=f"the pipeline asks for lies after its last timestep, {last}. Take more"):
        draw(refiner, refined, 2, image=latents, denoising_start=0.8)


def test_a_part_of_a_run_is_not_learned():
    pipe, inputs = made("sdxl")
    with pytest.raises(ValueError, match="`denoising_end` must be left out, got 0"):
        calibrate(pipe, 4, denoising_end=0.8, **inputs)


def test_image_to_image_is_learned_from_noise_alone_and_used_from_anywhere():
    pipe, inputs = quietly(image_to_image())
    with pytest.raises(ValueError, match="`strength` must be left out"):
        calibrate(pipe, 4, teacher_steps=TEACHER, strength=0.5, **inputs)
    with pytest.raises(ValueError, match="`pipe` starts at step 5, not with noise"):  # 0.8 is what it is by default
        calibrate(pipe, 4, teacher_steps=TEACHER, **inputs)
    learned = calibrate(pipe, 4, teacher_steps=TEACHER, refinements=0, strength=1.0, **inputs)
    ours, solver = errors(pipe, {**inputs, "strength": 1.0}, 4, learned)
    assert ours < 0.5 * solver, (ours, solver)
    calls = Calls(pipe)
    assert draw(pipe, inputs, 4, scheduler=learned, strength=0.5).isfinite().all()
    assert calls.timesteps() == learned.config.tables["4"]["timesteps"][2:]


def test_noise_that_is_drawn_anew_from_a_sample_is_refused():
    pipe, inputs = made("animatediff")
    pipe.enable_free_init(num_iters=2)
    with pytest.raises(ValueError, match="`pipe` sets the timesteps of its scheduler twice in a call"):
        calibrate(pipe, 3, teacher_steps=8, **inputs)
