import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard

from genie_diffusers import GenieInverseScheduler, GeniePipeline
from genie_diffusers.learning.paths import relative_error
from training import train_encoding

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(like_trained, tmp_path_factory) -> Path:
    """A class-conditional model with random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(like_trained(unet), DDPMScheduler()).save_pretrained(folder)
    return folder


def arguments(base, data, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "dataset_name": data,
        "cache_dir": output_dir.parent / "cache",
        "num_inference_steps": "2,3",
        "train_batch_size": 4,
        "max_train_steps": 40,
        "learning_rate": 0.03,
        "lr_warmup_steps": 2,
        "validation_samples": 8,
        "report_to": "none",
        "mixed_precision": "no",
        "output_dir": output_dir,
    } | named
    listed = []
    for name, value in named.items():
        listed += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return listed


def train(base, data, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_encoding.main(train_encoding.parse_args(arguments(base, data, output_dir, **named)))


def losses(output_dir: Path) -> list[float]:
    with (output_dir / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "encoder"
    train(base, data, output_dir)
    return output_dir


@pytest.mark.slow
def test_learning_brings_round_trips_closer(trained):
    found = np.array(losses(trained))
    assert found[-10:].mean() < 0.95 * found[:4].mean()
    card = ModelCard.load(trained / "README.md")
    assert "Held-out relative error of the round trip, learned | 2: " in card.text
    assert str(REPOSITORY) not in card.text


def test_result_is_an_encoder_of_a_pipeline(base, trained):
    pipe = GeniePipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    encoder = GenieInverseScheduler.from_pretrained(trained)
    assert set(encoder.config.tables) == {"2", "3"}
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states = []
    for encoding in (encoder.config.tables, None):
        pipe.scheduler = GenieInverseScheduler.from_config(encoder.config, tables=encoding)
        options = {"class_labels": [0, 1], "num_inference_steps": 3, "output_type": "latent"}
        states.append(pipe(latents=pictures, **options).images)
    assert 1e-4 < relative_error(*states).max() < 1


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(base, data, trained, tmp_path):
    train(base, data, tmp_path / "encoder", checkpointing_steps=20)
    (tmp_path / "encoder" / "checkpoint-40").rename(tmp_path / "not-a-checkpoint")
    train(base, data, tmp_path / "encoder", checkpointing_steps=20, resume_from_checkpoint="latest")
    rows = [GenieInverseScheduler.load_config(folder)["tables"] for folder in (trained, tmp_path / "encoder")]
    assert rows[0] == rows[1]


def test_an_earlier_result_is_gone_on_with_and_its_other_rows_are_kept(base, data, trained, tmp_path):
    train(base, data, tmp_path / "more", origin=trained, num_inference_steps=3, max_train_steps=12)
    earlier, later = (GenieInverseScheduler.load_config(folder)["tables"] for folder in (trained, tmp_path / "more"))
    assert later["2"] == earlier["2"]
    own = [error for line in (tmp_path / "more" / "README.md").read_text().splitlines() for error in line.split("|")]
    text = ModelCard.load(trained / "README.md").text
    reached = text.split("learned | ")[1].split("3: ")[1].split(" ")[0]
    assert any(f"3: {reached}" in cell for cell in own), "the origin is what was learned before"


@pytest.mark.slow
def test_two_processes_learn_as_one(base, data, tmp_path):
    options = {"max_train_steps": 6, "learning_rate": 0.03, "num_inference_steps": 3}
    train(base, data, tmp_path / "whole", **options, train_batch_size=8)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    split = arguments(base, data, tmp_path / "split", **options, train_batch_size=2, gradient_accumulation_steps=2)
    run = subprocess.run(
        [sys.executable, "-m", *launcher, str(REPOSITORY / "training" / "train_encoding.py"), *split],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_samples": 1}, "`--validation_samples` must be at least 2"),
        ({"validation_samples": 40}, "`--validation_samples` must leave some of the 40 pictures"),
        ({"num_inference_steps": "0,2"}, "`--num_inference_steps` positive"),
    ],
)
def test_bad_arguments_are_named(base, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(base, data, tmp_path / "encoder", **options)
