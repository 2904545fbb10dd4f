"""`GenieDiTPipeline`: class-conditional sampling with a transformer of flows or noise, in pixels or latents."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from genie_diffusers import ExactSlope, GenieDiTPipeline, GeniePipeline, GenieScheduler, ImageClassifier

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = REPOSITORY / "genie_diffusers" / "checkpoints"
NULL = 3  # the class after those of the transformers below


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch_size: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.randn((batch_size, channels, 8, 8), generator=seeded(seed))


def make_transformer(**config) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 3,
            "num_layers": 2,
            "attention_bias": True,
            "sample_size": 8,
            "num_embeds_ada_norm": NULL,
            **config,
        }
    )
    for block in transformer.transformer_blocks:
        # as in the tests of UNets: slow in time, visible in the sample and the class
        block.norm1.emb.timestep_embedder.linear_1.weight.data.unflatten(1, (2, 2, -1))[:, :, 0] = 0
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.3)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.3)
    return transformer.eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return quiet(GenieDiTPipeline(make_transformer(), FlowMatchEulerDiscreteScheduler()))


def velocity(transformer, x, t, labels, guidance_scale=1.0):
    """The guided prediction, each branch by itself."""

    def branch(classes):
        return transformer(x, torch.full((len(x),), float(t)), class_labels=torch.tensor(classes)).sample

    null = branch([NULL] * len(x))
    return null + guidance_scale * (branch(labels) - null)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_it_integrates_the_guided_velocity(pipe, guidance_scale):
    options = {"class_labels": [1, 0], "guidance_scale": guidance_scale, "output_type": "latent"}
    images = pipe(latents=noise(2), num_inference_steps=5, **options).images
    sigmas = [*torch.linspace(1.0, 0.001, 5).tolist(), 0.0]
    x = noise(2)
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            x = x + (following - sigma) * velocity(pipe.transformer, x, 1000 * sigma, [1, 0], guidance_scale)
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)


def test_guidance_scale_one_is_no_guidance_on_half_the_batch(pipe):
    calls = []
    pipe.transformer.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    options = {"class_labels": [1, 0], "latents": noise(2), "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe(**options).images
    assert calls == [2, 2, 2]
    nearly = pipe(guidance_scale=1.0 + 1e-6, **options).images
    assert calls[3:] == [4, 4, 4]
    torch.testing.assert_close(nearly, plain, rtol=1e-3, atol=1e-3)


def test_without_classes_the_null_class_is_drawn(pipe):
    options = {"latents": noise(2), "num_inference_steps": 3, "output_type": "latent"}
    unconditional = pipe(**options).images
    torch.testing.assert_close(unconditional, pipe(class_labels=[NULL, NULL], **options).images)
    assert not torch.allclose(unconditional, pipe(class_labels=[0, 0], **options).images, rtol=1e-2)


@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, GenieScheduler])
def test_one_generator_per_image_gives_the_same_images_for_any_split_into_batches(pipe, scheduler_class):
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)

    def draw(seeds):
        return pipe(
            class_labels=[seed % 3 for seed in seeds],
            guidance_scale=2.0,
            generator=[seeded(seed) for seed in seeds],
            num_inference_steps=4,
            output_type="latent",
        ).images

    whole = draw([0, 1, 2, 3])
    parts = torch.cat([draw([0]), draw([1, 2]), draw([3])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_one_generator_draws_the_noise_of_the_batch(pipe):
    drawn = pipe(batch_size=2, class_labels=1, generator=seeded(4), output_type="latent").images
    given = pipe(class_labels=[1, 1], latents=noise(2, seed=4), output_type="latent").images
    assert torch.equal(drawn, given)


# --- schedulers ------------------------------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SCHEDULERS = {
    "Euler": FlowMatchEulerDiscreteScheduler(shift=2.0),
    "Heun": FlowMatchHeunDiscreteScheduler(shift=2.0),
    "UniPC": UniPCMultistepScheduler(flow_shift=2.0, **FLOW),
    "DPM-Solver": DPMSolverMultistepScheduler(flow_shift=2.0, **FLOW),
    "DEIS": DEISMultistepScheduler(flow_shift=2.0, **FLOW),
    "Genie": GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=2.0).config),
    "Genie from UniPC": GenieScheduler.from_config(UniPCMultistepScheduler(flow_shift=2.0, **FLOW).config),
}


@pytest.fixture(scope="module")
def solution() -> torch.Tensor:
    """Of the guided flow, by many steps of the stock scheduler."""
    pipe = quiet(GenieDiTPipeline(make_transformer(), FlowMatchEulerDiscreteScheduler(shift=2.0)))
    return draw_guided(pipe, 600)


def draw_guided(pipe, num_inference_steps: int) -> torch.Tensor:
    options = {"class_labels": [1, 0], "guidance_scale": 2.0, "latents": noise(2), "output_type": "latent"}
    return pipe(num_inference_steps=num_inference_steps, **options).images


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_every_scheduler_of_flows_converges_to_the_same_pictures(pipe, solution, name):
    pipe.scheduler = FLOW_SCHEDULERS[name]
    errors = [((draw_guided(pipe, steps) - solution).norm() / solution.norm()).item() for steps in (5, 40)]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05, errors


def test_with_the_exact_slope_of_the_transformer_it_converges_too(pipe, solution):
    pipe.scheduler = GenieScheduler.from_config(FLOW_SCHEDULERS["Euler"].config)
    pipe.scheduler.attach(ExactSlope(pipe.transformer))
    errors = [((draw_guided(pipe, steps) - solution).norm() / solution.norm()).item() for steps in (5, 20)]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05, errors


def test_a_unet_of_flows_is_sampled_by_its_own_pipeline(make_unet):
    pipe = quiet(GeniePipeline(make_unet(), FlowMatchEulerDiscreteScheduler()))
    options = {"latents": noise(2), "output_type": "latent"}
    euler = pipe(num_inference_steps=200, **options).images
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    genie = pipe(num_inference_steps=20, **options).images
    assert (genie - euler).norm() < 0.05 * euler.norm()


# --- checkpoints of DiTPipeline --------------------------------------------------------------------------------------


@pytest.fixture
def latent_components() -> dict:
    """A transformer of noise and variances in the latents of an autoencoder, as published."""
    transformer = make_transformer(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    return {"transformer": transformer, "vae": vae.eval()}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pictures_are_those_of_the_stock_pipeline(latent_components, guidance_scale):
    scheduler = DDIMScheduler(clip_sample=False)
    options = {"class_labels": [207, 5], "guidance_scale": guidance_scale, "num_inference_steps": 4}
    stock = quiet(DiTPipeline(**latent_components, scheduler=scheduler))
    expected = stock(generator=seeded(), output_type="np", **options).images
    ours = quiet(GenieDiTPipeline(**latent_components, scheduler=scheduler))
    images = ours(generator=seeded(), output_type="np", **options).images
    assert images.std() > 0.01
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert ours(output_type="latent", **options).images.shape == (2, 4, 8, 8)


def test_a_folder_of_the_stock_pipeline_loads_and_samples_with_our_scheduler(latent_components, tmp_path):
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(**latent_components, scheduler=scheduler).save_pretrained(tmp_path)
    pipe = quiet(GenieDiTPipeline.from_pretrained(tmp_path))
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    assert pipe(class_labels=[207], guidance_scale=4.0, output_type="pt").images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_learned_variances_reach_a_scheduler_that_draws_with_them(latent_components, guidance_scale):
    options = {"class_labels": [7], "guidance_scale": guidance_scale, "latents": noise(1, channels=4)}
    seen = {}
    for variance_type in ("learned_range", "fixed_small"):
        scheduler = DDPMScheduler(clip_sample=False, variance_type=variance_type)
        step, outputs = scheduler.step, []
        seen[variance_type] = outputs

        def note(model_output, *args, step=step, outputs=outputs, **kwargs):
            outputs.append(model_output)
            return step(model_output, *args, **kwargs)

        scheduler.step = note
        quiet(GenieDiTPipeline(**latent_components, scheduler=scheduler))(num_inference_steps=2, **options)
    learned, fixed = (seen[name][0] for name in ("learned_range", "fixed_small"))
    torch.testing.assert_close(learned[:, :4], fixed)
    with torch.no_grad():
        time = torch.full((1,), 500)
        output = latent_components["transformer"](options["latents"], time, class_labels=torch.tensor([7])).sample
    torch.testing.assert_close(learned[:, 4:], output[:, 4:])


# --- callbacks, outputs and errors -----------------------------------------------------------------------------------


def test_callback_is_told_of_every_step_and_may_change_what_follows(pipe):
    told = []

    def callback(pipeline, i, t, tensors):
        told.append((pipeline, i, float(t), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    images = pipe(latents=noise(2), num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
    timesteps = pipe.scheduler.timesteps.tolist()
    assert told == [(pipe, i, timesteps[i], (2, 3, 8, 8)) for i in range(3)]
    assert images.abs().max() == 0


def test_output_types_are_the_same_images(pipe):
    options = {"latents": noise(2), "num_inference_steps": 3}
    latent = pipe(output_type="latent", **options).images
    expected = (latent / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe(output_type="pt", **options).images, expected)
    arrays = pipe(output_type="np", **options).images
    assert np.abs(np.stack(pipe(**options).images) / 255 - arrays).max() <= 0.51 / 255
    (as_tuple,) = pipe(output_type="latent", return_dict=False, **options)
    assert torch.equal(as_tuple, latent)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"class_labels": 4}, ("`class_labels`", "between 0 and 3", "4")),
        ({"guidance_scale": 2.0}, ("`guidance_scale=2.0`", "`class_labels`")),
        ({"guidance_scale": float("nan"), "class_labels": 1}, ("`guidance_scale`", "nan")),
        ({"batch_size": 0}, ("`batch_size`", "got 0")),
        ({"batch_size": 3, "class_labels": [0, 1]}, ("'batch_size': 3", "'class_labels': 2")),
        ({"generator": [seeded(), seeded()], "class_labels": [0]}, ("'generator': 2", "'class_labels': 1")),
        ({"latents": torch.zeros(2, 3, 8, 9)}, ("`latents`", "(2, 3, 8, 8)", "(2, 3, 8, 9)")),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ("`callback_on_step_end_tensor_inputs`", "'noise'")),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_errors_before_the_model_is_called(pipe, options, parts):
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError) as error:
        pipe(**options)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert calls == []


# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_those_of_float32(pipe, dtype):
    options = {"class_labels": 1, "latents": noise(1), "num_inference_steps": 3, "output_type": "np"}
    expected = pipe(**options).images
    pipe.to(dtype)
    assert pipe(**{**options, "output_type": "latent"}).images.dtype == dtype
    assert np.abs(pipe(**options).images - expected).mean() < 0.02


@pytest.mark.slow
def test_it_saves_and_loads_in_a_fresh_process(pipe, latent_components, tmp_path):
    folders = {"pixels": pipe, "latents": GenieDiTPipeline(**latent_components, scheduler=DDIMScheduler())}
    expected = {}
    for name, saved in folders.items():
        saved.save_pretrained(tmp_path / name)
        options = {"class_labels": [1], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
        expected[name] = float(quiet(saved)(generator=seeded(), **options).images.sum())
    code = (
        "import sys, torch\n"
        "from genie_diffusers import GenieDiTPipeline\n"
        "for folder in sys.argv[1:]:\n"
        "    pipe = GenieDiTPipeline.from_pretrained(folder)\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    options = {'class_labels': [1], 'guidance_scale': 2.0, 'num_inference_steps': 3, 'output_type': 'np'}\n"
        "    images = pipe(generator=generator, **options).images\n"
        "    print(type(pipe.scheduler).__name__, pipe.vae is not None, float(images.sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in folders)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["FlowMatchEulerDiscreteScheduler", "False"], ["DDIMScheduler", "True"]]
    assert [float(line[2]) for line in lines] == pytest.approx(list(expected.values()), rel=1e-5)


# --- the packaged flow -----------------------------------------------------------------------------------------------


def test_the_packaged_flow_draws_what_it_is_asked_for():
    pipe = quiet(GenieDiTPipeline.from_pretrained(CHECKPOINTS / "flow-cifar10-16"))
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and type(pipe.transformer) is DiTTransformer2DModel
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    classifier = ImageClassifier.from_pretrained(CHECKPOINTS / "classifier-cifar10-16").eval()
    labels = list(range(10)) * 4
    options = {"guidance_scale": 4.0, "generator": seeded(), "num_inference_steps": 10, "output_type": "pt"}
    images = pipe(class_labels=labels, **options).images
    with torch.no_grad():
        seen = classifier(2 * images - 1).argmax(-1)
    assert (seen == torch.tensor(labels)).float().mean() > 0.6
