import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from genie_diffusers import GenieDiTPipeline, GeniePipeline
from genie_diffusers.learning import run as learning_run
from genie_diffusers.learning.run import (
    RunLog,
    push_to_hub,
)
from training import train_diffusion

REPOSITORY = Path(__file__).resolve().parents[2]

NUM_PICTURES, NUM_CLASSES = 40, 3  # of the `data` fixture


def tiny_unet(**config) -> UNet2DModel:
    config = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "num_class_embeds": NUM_CLASSES + 1} | config
    return UNet2DModel(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        **config,
    )


def tiny_config(folder: Path, **config) -> Path:
    tiny_unet(**config).save_config(folder)
    return folder


def parse(output_dir="unused", **named) -> argparse.Namespace:
    if "pretrained_model_name_or_path" not in named:
        named.setdefault("model_config_name_or_path", "unused")
    named |= {"dataset_name": "unused", "max_train_steps": 1, "output_dir": output_dir}
    return train_diffusion.parse_args([str(part) for k, v in named.items() for part in (f"--{k}", v)])


def launch(data: Path, config: Path, output_dir: Path, *arguments, processes: int = 1) -> subprocess.Popen:
    if processes == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:  # `accelerate launch --cpu` starts several processes only through MPI
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(REPOSITORY / "training" / "train_diffusion.py"), "--dataset_name", str(data)]
    script += ["--model_config_name_or_path", str(config), "--output_dir", str(output_dir)]
    script += ["--label_dropout", "0.2", "--random_flip", "--lr_warmup_steps", "2", "--eval_batch_size", "3"]
    environment = {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(data.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *script, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    output = process.communicate()[0]
    assert process.returncode == 0, output


def losses(output_dir: Path) -> dict[int, float]:
    return {step: loss for step, loss, _ in RunLog.read(output_dir / "loss.csv")}


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> tuple[Path, dict[int, float]]:
    """A run of 30 steps that was killed between two checkpoints and resumed, and the losses of the killed run."""
    output_dir = tmp_path_factory.mktemp("resumed")
    # Dropout draws from the global generators, whose state must come back too.
    config = tiny_config(tmp_path_factory.mktemp("unet"), dropout=0.1)
    arguments = ["--train_batch_size", "8", "--max_train_steps", "30", "--checkpointing_steps", "10"]
    arguments += ["--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest", "--sample_steps", "15"]
    process = launch(data, config, output_dir, *arguments)
    while process.poll() is None:
        done = max(losses(output_dir), default=0) if (output_dir / "loss.csv").exists() else 0
        if done > 10 and 3 <= done % 10 <= 8:  # between two checkpoints
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    before = losses(output_dir)
    # What a kill in the middle of saving leaves behind.
    (output_dir / "partial-checkpoint").mkdir()
    (output_dir / "partial-checkpoint" / "model.safetensors").write_bytes(b"half")
    finish(launch(data, config, output_dir, *arguments))
    return output_dir, before


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_losses(resumed):
    output_dir, before = resumed
    after = losses(output_dir)
    assert list(after) == list(range(1, 31))
    assert max(before) % 10 > 0, "nothing was repeated after the last checkpoint"
    assert {step: after[step] for step in before} == before


@pytest.mark.slow
def test_rotation_leaves_the_newest_complete_checkpoint_and_nothing_else(resumed):
    assert [path.name for path in resumed[0].glob("*checkpoint*")] == ["checkpoint-30"]


@pytest.mark.slow
def test_result_is_a_pipeline_that_loads_in_a_fresh_process(resumed):
    code = (
        "import sys, torch\n"
        "from diffusers import UNet2DModel\n"
        "from genie_diffusers import GeniePipeline\n"
        "unet = UNet2DModel.from_pretrained(sys.argv[1], subfolder='unet')\n"
        "pipeline = GeniePipeline.from_pretrained(sys.argv[1])\n"
        "assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipeline.unet.parameters()))\n"
        "print(pipeline(class_labels=[0, 1], num_inference_steps=2).images[0].size)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(resumed[0])], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "(8, 8)"


@pytest.mark.slow
def test_saved_weights_are_the_averaged_ones(resumed):
    saved = list(UNet2DModel.from_pretrained(resumed[0] / "unet").parameters())
    checkpoint = resumed[0] / "checkpoint-30"
    averaged = torch.load(checkpoint / "custom_checkpoint_1.pkl", weights_only=True)["shadow_params"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(saved, averaged, strict=True))
    assert not all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(saved, load_raw_weights(checkpoint).parameters(), strict=True)
    )


def load_raw_weights(checkpoint: Path) -> UNet2DModel:
    from safetensors.torch import load_file

    unet = tiny_unet()
    unet.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return unet


def test_card_shows_the_samples_and_the_command(resumed):
    card = ModelCard.load(resumed[0] / "README.md")
    assert card.data.library_name == "diffusers"
    assert "accelerate launch training/train_diffusion.py --dataset_name path/to/" in card.text
    assert str(resumed[0].parent) not in card.text, "a folder of this computer"
    for name in ("samples.png", "loss.png"):
        assert f"({name})" in card.text
        Image.open(resumed[0] / name).verify()


def test_tracker_holds_every_loss_once_and_the_sample_grids(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed[0] / "logs" / "train_diffusion")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 31))
    assert logged == pytest.approx(losses(resumed[0]), rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [15, 30, 30]


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [UNet2DModel, DiTTransformer2DModel])
def test_flow_is_trained_resumed_and_sampled(data, tmp_path, model_class):
    if model_class is UNet2DModel:
        model, pipeline_class = tiny_unet(), GeniePipeline
    else:
        model = DiTTransformer2DModel(2, 8, 3, num_layers=1, sample_size=8, num_embeds_ada_norm=NUM_CLASSES)
        pipeline_class = GenieDiTPipeline
    model.save_config(tmp_path / "config")

    def train(name: str, steps: int) -> dict[int, float]:
        named = {"process": "flow", "dataset_name": data, "cache_dir": tmp_path / "cache", "label_dropout": 0.2}
        named |= {"model_config_name_or_path": tmp_path / "config", "output_dir": tmp_path / name}
        named |= {"train_batch_size": 4, "max_train_steps": steps, "lr_scheduler": "constant", "report_to": "none"}
        named |= {"eval_batch_size": 3, "ddpm_num_inference_steps": 2, "guidance_scale": 2.0, "mixed_precision": "no"}
        named |= {"resume_from_checkpoint": "latest"}
        AcceleratorState._reset_state(reset_partial_state=True)
        train_diffusion.main(
            train_diffusion.parse_args([str(part) for k, v in named.items() for part in (f"--{k}", v)])
        )
        return losses(tmp_path / name)

    whole = train("whole", 4)
    train("resumed", 2)
    assert train("resumed", 4) == whole and len(whole) == 4
    pipeline = pipeline_class.from_pretrained(tmp_path / "resumed")
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    images = pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    card = (tmp_path / "resumed" / "README.md").read_text()
    assert f"from genie_diffusers import {pipeline_class.__name__}\n" in card
    assert "flow_prediction" in card and f"| Null class | {NUM_CLASSES} |" in card


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_batch_is_split(data, tmp_path):
    config = tiny_config(tmp_path / "unet")
    runs = {
        "whole": (1, ["--train_batch_size", "8"]),
        "split": (2, ["--train_batch_size", "2", "--gradient_accumulation_steps", "2"]),
    }
    for name, (processes, arguments) in runs.items():
        arguments += ["--max_train_steps", "6", "--learning_rate", "1e-3", "--report_to", "none"]
        finish(launch(data, config, tmp_path / name, *arguments, processes=processes))
    whole, split = losses(tmp_path / "whole"), losses(tmp_path / "split")
    assert len(whole) == 6
    assert split == pytest.approx(whole, rel=1e-5)


# Publication


def test_neither_training_state_nor_what_was_computed_for_it_is_published(resumed, monkeypatch):
    uploads = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, **kwargs):
            uploads.append(kwargs)

    monkeypatch.setattr(learning_run, "HfApi", Api)
    push_to_hub(parse(output_dir=resumed[0], hub_model_id="tiny"))
    (upload,) = uploads
    files = [str(path.relative_to(resumed[0])) for path in resumed[0].rglob("*") if path.is_file()]
    files += ["computed/trajectories.safetensors", "computed/tables/config.json"]
    published = filter_repo_objects(
        files, allow_patterns=upload["allow_patterns"], ignore_patterns=upload["ignore_patterns"]
    )
    assert sorted(published) == [
        "README.md",
        "loss.png",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
