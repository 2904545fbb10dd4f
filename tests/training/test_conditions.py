"""Step heads of text-to-image models and upscalers: conditions in a table, memory of one call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from genie_diffusers import GeniePipeline, GenieScheduler, StepHead
from genie_diffusers.learning import conditions, paths
from genie_diffusers.learning.paths import draw, solve, solver_of
from genie_diffusers.learning.run import RunLog
from training import train_step_head

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = ["a cat", "a dog on a mat", "cats", "the sea", "a b c"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:torch"
    ),
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base()


def arguments(base, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "output_dir": output_dir,
        "table_steps": "2,3",
        "head_steps": "2,3",
        "head_width": 8,
        "teacher_steps": 12,
        "fit_trajectories": 8,
        "train_trajectories": 9,
        "validation_trajectories": 2,
        "train_batch_size": 2,
        "max_train_steps": 3,
        "lr_warmup_steps": 0,
        "checkpointing_steps": 3,
        "report_to": "none",
    } | named
    return [str(part) for name, value in named.items() for part in (f"--{name}", value) if part != ""]


def train(base, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_step_head.main(train_step_head.parse_args(arguments(base, output_dir, **named)))


def losses(output_dir: Path) -> list[float]:
    return [loss for _, loss, _ in RunLog.read(output_dir / "loss.csv")]


@pytest.mark.slow
def test_a_launched_run_ends_in_a_head_that_a_fresh_process_samples_with(base, captions, tmp_path):
    script = [str(REPOSITORY / "training" / "train_step_head.py")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *script]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = arguments(base, tmp_path / "head", captions=captions, max_guidance_scale=5, gradient_checkpointing="")
    run = subprocess.run([*launch, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    code = (
        "import sys, torch\n"
        "from genie_diffusers import GenieScheduler, GenieStableDiffusionPipeline, GenieUNet2DConditionModel\n"
        "base, head, out = sys.argv[1:]\n"
        "def draw(pipe):\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    return pipe('a cat', num_inference_steps=3, generator=generator, output_type='latent').images\n"
        "pipe = GenieStableDiffusionPipeline.from_pretrained(base)\n"
        "pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)\n"
        "pipe.unet = GenieUNet2DConditionModel.from_unet(pipe.unet, derivative_head=head)\n"
        "images = draw(pipe)\n"
        "pipe.save_pretrained(out)\n"
        "torch.testing.assert_close(draw(GenieStableDiffusionPipeline.from_pretrained(out)), images)\n"
        "print(pipe.scheduler.timesteps.tolist(), bool(torch.isfinite(images).all()))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(base), str(tmp_path / "head"), str(tmp_path / "pipeline")],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert fresh.returncode == 0, fresh.stderr
    table = StepHead.load_config(tmp_path / "head")["tables"]["3"]
    assert fresh.stdout.split("\n")[-2] == f"{table['timesteps']} True"
    assert "distilled from other weights" not in fresh.stderr
    card = ModelCard.load(tmp_path / "head" / "README.md").text
    assert "GenieStableDiffusionPipeline.from_pretrained" in card and "accelerate launch" in card
    assert "fitted to 8 solutions, a third of them guided" in card


@pytest.mark.parametrize("pipeline_class", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_a_class_is_a_caption_and_the_last_one_the_empty_prompt(make_base, captions, tmp_path, pipeline_class):
    model = make_base(pipeline_class)
    args = train_step_head.parse_args(arguments(model, tmp_path, captions=captions, resolution=32, max_captions=4))
    unet = conditions.load_unet(model)
    unet = conditions.with_head(unet, StepHead.for_unet(unet, width=8))
    denoiser, _ = conditions.conditioned(unet, args, "no", torch.device("cpu"))
    config = denoiser.config
    assert (config.num_class_embeds, config.in_channels, config.sample_size) == (5, 4, 16)
    assert paths.null_labels(denoiser, torch.tensor([0, 3, 4])).min() >= 4
    pipe = pipeline_class.from_pretrained(model)
    sample, timestep = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    found, expected = denoiser(sample, timestep, class_labels=torch.tensor([1, 4])).sample, []
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            CAPTIONS[1], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        for i in (0, 1):
            added = {}
            if pipeline_class is StableDiffusionXLPipeline:
                time_ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
                added = {"added_cond_kwargs": {"text_embeds": encoded[2 + i], "time_ids": time_ids}}
            expected.append(pipe.unet(sample[i : i + 1], timestep, encoded[i], **added).sample)
    torch.testing.assert_close(found, torch.cat(expected), rtol=2e-3, atol=1e-3)  # embeddings are rounded
    assert not torch.allclose(found[0], denoiser(sample, timestep, torch.tensor([2, 4])).sample[0], rtol=1e-2)


def test_embeddings_are_computed_once(base, captions, tmp_path, monkeypatch):
    train(base, tmp_path, captions=captions)
    monkeypatch.setattr(conditions, "_of_captions", None)
    train(base, tmp_path, captions=captions, max_train_steps=4, resume_from_checkpoint="latest")
    assert len(losses(tmp_path)) == 4
    rows = load_file(tmp_path / "computed" / "conditions.safetensors")
    assert rows["encoder_hidden_states"].shape == (6, 16, 16)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss_and_keeps_one_call(base, captions, tmp_path):
    train(base, tmp_path / "plain", captions=captions, max_guidance_scale=5)
    train(base, tmp_path / "checkpointed", captions=captions, max_guidance_scale=5, gradient_checkpointing="")
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    unet = conditions.load_unet(base)
    head = StepHead.for_unet(unet, GenieScheduler.load_config(base, subfolder="scheduler"), width=8)
    head.register_to_config(tables=StepHead.load_config(tmp_path / "plain")["tables"])
    torch.nn.init.normal_(head.conv_out.weight, std=0.1)
    saved = {}
    for name in ("plain", "checkpointed"):
        args = train_step_head.parse_args(arguments(base, tmp_path / "plain", captions=captions))
        model_with_head = conditions.with_head(conditions.load_unet(base), head).requires_grad_(False)
        model_with_head.derivative_head.requires_grad_(True)
        if name == "checkpointed":
            conditions.rematerialised(model_with_head)
        denoiser, _ = conditions.conditioned(model_with_head, args, "no", torch.device("cpu"))
        scheduler = solver_of(GenieScheduler.load_config(base, subfolder="scheduler"))
        scheduler.attach(denoiser)
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        noises = draw(denoiser, 2, 0, 0.1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            solve(denoiser, scheduler, 3, noises).sum()
        saved[name] = sum(kept.values())
    assert saved["checkpointed"] < 0.5 * saved["plain"]


def test_half_precision_is_that_of_the_denoiser_alone(base, captions, tmp_path):
    args = train_step_head.parse_args(arguments(base, tmp_path, captions=captions))
    unet = conditions.load_unet(base)
    unet = conditions.with_head(unet, StepHead.for_unet(unet, width=8))
    denoiser, _ = conditions.conditioned(unet, args, "bf16", torch.device("cpu"))
    assert denoiser.unet.conv_in.weight.dtype == torch.bfloat16
    assert denoiser.unet.derivative_head.conv_out.weight.dtype == torch.float32
    train(base, tmp_path / "run", captions=captions, mixed_precision="bf16", max_guidance_scale=3)
    assert all(0 < loss < 10 for loss in losses(tmp_path / "run"))


def test_an_upscaler_is_distilled_with_its_low_resolution_pictures(data, tmp_path):
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
    pictures = {"dataset_name": data, "low_resolution": 4}
    train(tmp_path / "base", tmp_path / "head", **pictures)
    rows = load_file(tmp_path / "head" / "computed" / "conditions.safetensors")["channels"]
    assert rows.shape == (40, 3, 8, 8) and rows.min() >= -1 and rows.max() <= 1
    head = StepHead.from_pretrained(tmp_path / "head")
    assert head.config.in_channels == 3 and list(head.config.tables) == ["2", "3"]
    pipe = GeniePipeline(conditions.with_head(unet, head), GenieScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(image=rows[:2], num_inference_steps=3, output_type="pt").images.shape == (2, 3, 8, 8)


def test_conditions_that_are_missing_or_have_no_use_are_refused(base, captions, data, tmp_path):
    with pytest.raises(ValueError, match="`--captions` must be given for a `UNet2DConditionModel`"):
        train(base, tmp_path)
    with pytest.raises(ValueError, match="`--dataset_name` must not be given"):
        train(base, tmp_path, captions=captions, dataset_name=data)
    with pytest.raises(ValueError, match="`--low_resolution` must not be given for this model, got 4"):
        train(base, tmp_path, captions=captions, low_resolution=4)
    with pytest.raises(ValueError, match="`--caption_column` must be one of the columns image, label of"):
        train(base, tmp_path, captions=data)
    with pytest.raises(ValueError, match="`--caption_column` must hold text, got 'label'"):
        train(base, tmp_path, captions=data, caption_column="label")


def test_channels_of_no_known_use_are_refused(make_base, captions, tmp_path):
    with pytest.raises(ValueError, match="8 input and 4 output channels cannot be distilled"):
        train(make_base(unet_channels=8), tmp_path, captions=captions)


def test_the_8_bit_optimizer_says_what_it_needs(base, captions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="`--use_8bit_adam` needs bitsandbytes"):
        train(base, tmp_path, captions=captions, use_8bit_adam="")
