"""Derivative heads of text-to-image models, and both kinds of heads beside masks and low-resolution pictures."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import ModelCard
from PIL import Image

from genie_diffusers import DerivativeHead, GeniePipeline, GenieScheduler, StepHead
from genie_diffusers.learning import conditions, paths
from genie_diffusers.learning.derivative_heads import SlopeDistillation
from genie_diffusers.learning.run import RunLog
from genie_diffusers.models.exact_slope import forward_mode
from training import train_genie_head, train_step_head

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
#: what is painted or enlarged → pipeline and input channels of its UNet
TASKS = {
    "inpainting": (StableDiffusionInpaintPipeline, 9),
    "inpainting XL": (StableDiffusionXLInpaintPipeline, 9),
    "upscaling": (StableDiffusionUpscalePipeline, 7),
}
every_task = pytest.mark.parametrize("task", TASKS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
    ),
]


def arguments(base, data, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "dataset_name": data,
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "head_width": 8,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "report_to": "none",
    } | named
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def derivative_arguments(*args, **named) -> list[str]:
    return arguments(*args, **{"validation_samples": 4, "num_inference_steps": 2} | named)


def step_arguments(*args, **named) -> list[str]:
    named = {"fit_trajectories": 8, "train_trajectories": 9, "validation_trajectories": 2, "teacher_steps": 12} | named
    return arguments(*args, **{"table_steps": "2", "head_steps": "2"} | named)


def train(*args, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_genie_head.main(train_genie_head.parse_args(derivative_arguments(*args, **named)))


def losses(output_dir: Path) -> list[float]:
    return [loss for _, loss, _ in RunLog.read(output_dir / "loss.csv")]


def conditioned(base, data, output_dir, latents=True, **named):
    """The denoiser of captions and pictures that a run trains a head of, and the latents."""
    output_dir.mkdir()
    args = train_genie_head.parse_args(derivative_arguments(base, data, output_dir, **named))
    unet = conditions.load_unet(base)
    head = DerivativeHead.for_unet(unet, GenieScheduler.load_config(base, subfolder="scheduler"), width=8)
    return conditions.conditioned(conditions.with_head(unet, head), args, "no", CPU, latents)


# --- what the denoiser is given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_class", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_each_picture_is_encoded_as_the_pipeline_decodes_it_and_has_its_own_caption(
    make_base, captioned_data, tmp_path, pipeline_class
):
    base = make_base(pipeline_class)
    denoiser, latents = conditioned(base, captioned_data, tmp_path / "run", max_captions=5)
    assert latents.shape == (5, 4, 8, 8) and denoiser.config.num_class_embeds == 6
    pipe = pipeline_class.from_pretrained(base)
    with Image.open(captioned_data / "01.png") as picture:
        pixels = pipe.image_processor.preprocess(picture.convert("RGB").crop((2, 0, 18, 16)))
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(
        "a dog on a mat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    rounding = {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(latents[1:2], expected, **rounding)
    torch.testing.assert_close(denoiser.rows["encoder_hidden_states"][1:2], text[0], **rounding)
    stream = conditions.LatentStream(latents, range(2, 5), seed=0)
    batch = stream.__getitems__([0, 1, 2])
    assert sorted(batch["labels"].tolist()) == [2, 3, 4]
    assert torch.equal(batch["images"], latents[batch["labels"]].float())


@every_task
def test_the_denoiser_is_called_as_its_own_pipeline_calls_it(make_base, captioned_data, tmp_path, monkeypatch, task):
    # The pipelines draw from the encoder's distribution.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline_class, channels = TASKS[task]
    base = make_base(pipeline_class, channels)
    denoiser, _ = conditioned(base, captioned_data, tmp_path / "run", max_noise_level=0)
    seen = []

    def see(module, args, kwargs):
        added = kwargs.get("added_cond_kwargs") or {}
        seen.append((args[0], kwargs["encoder_hidden_states"], kwargs.get("class_labels"), *added.values()))

    pipe = pipeline_class.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for unet in (pipe.unet, denoiser.unet):
        unet.register_forward_pre_hook(see, with_kwargs=True)
    number, sample = 1, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with Image.open(captioned_data / "01.png") as file:
        picture = file.convert("RGB").crop((2, 0, 18, 16))
    if "inpainting" in task:
        mask = conditions.random_mask(16, np.random.default_rng([0, number]))
        given = {"image": picture, "mask_image": Image.fromarray(np.uint8(255 * mask))}
        given |= {"height": 16, "width": 16, "strength": 1.0}
    else:
        given = {"image": picture.resize((8, 8), Image.Resampling.BOX), "noise_level": 0}
    pipe("a dog on a mat", latents=sample, num_inference_steps=1, guidance_scale=5.0, output_type="latent", **given)
    label = torch.tensor([number])
    labels = torch.cat([paths.null_labels(denoiser, label), label])
    with torch.no_grad():
        denoiser(sample.repeat(2, 1, 1, 1), torch.tensor(500), class_labels=labels)
    (theirs, their_text, their_level, *their_added), (ours, our_text, our_level, *our_added) = seen
    # Level 0 has noise of a hundredth, and pixels are rounded to bytes.
    torch.testing.assert_close(ours[:, 4:], theirs[:, 4:], rtol=1e-3, atol=0.05 if task == "upscaling" else 1e-3)
    torch.testing.assert_close(our_text, their_text, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(our_added, their_added, rtol=1e-3, atol=1e-3)
    assert (our_level is None and their_level is None) or torch.equal(our_level, their_level)


def test_levels_of_noise_are_drawn_up_to_the_largest(make_base, captioned_data, tmp_path):
    denoiser, _ = conditioned(make_base(*TASKS["upscaling"]), captioned_data, tmp_path / "run", max_noise_level=300)
    levels, pictures = denoiser.rows["noise_level"], denoiser.rows["channels"]
    assert 0 <= levels.min() < 100 and 200 < levels.max() <= 300
    assert pictures[levels > 200].std() > 1.2 * pictures[levels < 100].std()


def test_masks_are_rectangles_ellipses_and_whole_pictures():
    masks = [conditions.random_mask(32, np.random.default_rng(seed)) for seed in range(400)]
    assert all(set(np.unique(mask)) <= {0.0, 1.0} and mask.any() for mask in masks)
    whole = np.mean([mask.all() for mask in masks])
    boxes = [mask[np.ix_(mask.any(1), mask.any(0))] for mask in masks if not mask.all()]
    filled = np.array([box.mean() for box in boxes])
    assert 0.15 < whole < 0.35
    assert 0.3 < np.mean(filled == 1) < 0.8
    assert 0.6 < np.median(filled[filled < 1]) < 0.95


# --- the slope -------------------------------------------------------------------------------------------------------


@every_task
def test_target_is_the_exact_slope_beside_further_channels_along_the_guided_path(
    make_base, captioned_data, tmp_path, task
):
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    base = make_base(*TASKS[task], scheduler)
    denoiser, latents = conditioned(base, captioned_data, tmp_path / "run")
    process = GenieScheduler.from_config(scheduler.config).process
    distillation = SlopeDistillation(denoiser, process, "v_prediction", max_guidance_scale=5.0, branch_dropout=0.4)
    batch = conditions.LatentStream(latents, range(24), seed=0).__getitems__(list(range(8)))
    inputs, slope = distillation(batch, CPU)
    cases = set()
    for i in range(8):
        timestep, label = int(batch["times"][i] * 1000), batch["labels"][i : i + 1]
        alpha, sigma = float(process.alpha(timestep)), float(process.sigma(timestep))
        sample = alpha * batch["images"][i : i + 1] + sigma * batch["noise"][i : i + 1]
        branch, guidance = batch["choices"][i].tolist()
        scale, null = 1 + 4 * max(0.0, 2 * guidance - 1), denoiser.null_labels(label)
        cases.add((branch < 0.4, scale > 1))

        def noise(labels, x, t, alpha, sigma):
            return alpha * denoiser(x, t, class_labels=labels).sample + sigma * x

        point = sample, *(torch.tensor(value) for value in (float(timestep), alpha, sigma))
        own = null if branch < 0.4 else label
        with torch.no_grad():
            of_own, of_null, of_label = (noise(labels, *point) for labels in (own, null, label))
        direction = of_own if scale == 1 else of_null + scale * (of_label - of_null)
        torch.testing.assert_close(inputs["noise_prediction"][i : i + 1], direction, rtol=1e-3, atol=1e-3)
        # along dx/dλ = σ² x − σ ε, dα/dλ = ασ², dσ/dλ = −σα²
        rates = 1 / float(process.log_snr_derivative(timestep)), alpha * sigma**2, -sigma * alpha**2
        rate = sigma**2 * sample - sigma * direction, *(torch.tensor(value) for value in rates)
        with torch.no_grad(), forward_mode(denoiser.unet):
            expected = torch.func.jvp(functools.partial(noise, own), point, rate)[1]
        torch.testing.assert_close(slope[i : i + 1], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert len(cases) >= 3, "a case is missing from the points"


def test_half_precision_is_that_of_the_denoiser_alone_and_hardly_changes_the_target(
    make_base, captioned_data, tmp_path
):
    base = make_base()
    denoiser, latents = conditioned(base, captioned_data, tmp_path / "run")
    process = GenieScheduler.from_pretrained(base, subfolder="scheduler").process
    batch, targets = conditions.LatentStream(latents, range(24), seed=0).__getitems__(list(range(16))), []
    for dtype in (torch.float32, torch.float16):
        denoiser.unet.to(dtype)
        denoiser.unet.derivative_head.float()
        distillation = SlopeDistillation(denoiser, process, "epsilon", 0.3, 5.0, 0.25)
        inputs, slope = distillation(batch, CPU)
        assert {values.dtype for values in inputs.values()} == {torch.float32}
        targets.append(slope)
        assert denoiser.unet.derivative_head(**inputs).dtype == torch.float32
    assert (targets[1] - targets[0]).norm() < 0.05 * targets[0].norm()


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_launched_run_ends_in_a_folder_that_a_fresh_process_opens(make_base, captioned_data, tmp_path):
    base, head, whole = make_base(), tmp_path / "head", tmp_path / "pipeline"
    script = [str(REPOSITORY / "training" / "train_genie_head.py")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *script]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = derivative_arguments(base, captioned_data, head, max_guidance_scale=5, learning_rate=1e-2)
    run = subprocess.run([*launch, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    code = (
        "import sys, torch, genie_diffusers\n"
        "from genie_diffusers import DerivativeHead, GenieScheduler, GenieStableDiffusionPipeline\n"
        "from genie_diffusers import GenieUNet2DConditionModel\n"
        "base, head, out = sys.argv[1:]\n"
        "def draw(pipe):\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    return pipe('a cat', num_inference_steps=3, generator=generator, output_type='latent').images\n"
        "assert DerivativeHead.from_pretrained(head).conv_out.weight.norm() > 0\n"
        "pipe = GenieStableDiffusionPipeline.from_pretrained(base)\n"
        "pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)\n"
        "without = draw(pipe)\n"
        "pipe.unet = GenieUNet2DConditionModel.from_unet(pipe.unet, derivative_head=head)\n"
        "images = draw(pipe)\n"
        "pipe.save_pretrained(out)\n"
        "torch.testing.assert_close(draw(GenieStableDiffusionPipeline.from_pretrained(out)), images)\n"
        "print(bool(torch.isfinite(images).all()), not torch.equal(images, without))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(base), str(head), str(whole)],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.split("\n")[-2] == "True True"
    assert "distilled from other weights" not in fresh.stderr
    card = ModelCard.load(head / "README.md").text
    assert "GenieStableDiffusionPipeline.from_pretrained" in card and "accelerate launch" in card
    with Image.open(head / "samples.png") as grid:
        assert grid.size == (8 * 16, 2 * 16)


def test_latents_and_embeddings_are_computed_once_and_for_these_arguments(
    make_base, captioned_data, tmp_path, monkeypatch
):
    base, head = make_base(), tmp_path / "head"
    train(base, captioned_data, head)
    for name in ("_of_captions", "_of_pictures"):
        monkeypatch.setattr(conditions, name, None)
    train(base, captioned_data, head, max_train_steps=4, resume_from_checkpoint="latest")
    assert len(losses(head)) == 4
    for name, value, before in (("resolution", 8, "None"), ("max_captions", 7, "10000")):
        message = f"`--{name}` must be {before}, with which .*pictures.safetensors was computed, got {value}"
        with pytest.raises(ValueError, match=message):
            train(base, captioned_data, head, resume_from_checkpoint="latest", max_train_steps=6, **{name: value})


@every_task
@pytest.mark.parametrize("kind", ["derivative head", "step head"])
def test_both_heads_are_trained_beside_further_channels_and_sample_in_the_stock_pipeline(
    make_base, captioned_data, tmp_path, task, kind
):
    pipeline_class, channels = TASKS[task]
    base, output_dir = make_base(pipeline_class, channels), tmp_path / "head"
    options = {"max_guidance_scale": 5, "learning_rate": 1e-2}
    if kind == "step head":
        AcceleratorState._reset_state(reset_partial_state=True)
        named = step_arguments(base, captioned_data, output_dir, **options)
        train_step_head.main(train_step_head.parse_args(named))
    else:
        train(base, captioned_data, output_dir, **options)
    head = (StepHead if kind == "step head" else DerivativeHead).from_pretrained(output_dir)
    assert head.config.in_channels == 4
    pipe = pipeline_class.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    pipe.unet = conditions.with_head(pipe.unet, head)
    pipe.scheduler.attach(pipe.unet)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"image": picture}
    if "inpainting" in task:
        given = {"image": picture.repeat(1, 1, 2, 2), "mask_image": torch.ones(1, 1, 16, 16)}
        given |= {"height": 16, "width": 16, "strength": 1.0}
    calls = []
    pipe.unet.derivative_head.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
    images = pipe("a cat", num_inference_steps=2, guidance_scale=3.0, output_type="np", **given).images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
    assert set(calls) <= {2} and (calls or kind == "step head")  # whose network may not have helped
    card = ModelCard.load(output_dir / "README.md").text
    assert f"from diffusers import {pipeline_class.__name__}" in card and "pipe.scheduler.attach(pipe.unet)" in card


def test_a_derivative_head_of_an_upscaler_without_text(data, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    GeniePipeline(unet, GenieScheduler()).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", data, tmp_path / "head", low_resolution=4, target="jvp")
    assert DerivativeHead.from_pretrained(tmp_path / "head").config.in_channels == 3
    assert "pipe(image=picture, num_inference_steps=2)" in ModelCard.load(tmp_path / "head" / "README.md").text


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"max_guidance_scale": 0.5}, "`--max_guidance_scale` must be at least 1"),
        (
            {"caption_column": "prompt"},
            "`--caption_column` must be one of the columns image, text of .*, got 'prompt'",
        ),
        ({"resolution": 32}, "`--resolution` must not exceed the side of any picture, got 32"),
        ({"low_resolution": 4}, "`--low_resolution` must not be given for this model, got 4"),
        ({"validation_samples": 24}, "`--validation_samples` must be between 1 and 23, got 24"),
    ],
)
def test_bad_input_is_refused(make_base, captioned_data, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        train(make_base(), captioned_data, tmp_path / "head", **named)


def test_pictures_with_captions_are_not_flipped(make_base, captioned_data, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    named = [*derivative_arguments(make_base(), captioned_data, tmp_path / "head"), "--random_flip"]
    with pytest.raises(ValueError, match="`--random_flip` must be left out"):
        train_genie_head.main(train_genie_head.parse_args(named))
