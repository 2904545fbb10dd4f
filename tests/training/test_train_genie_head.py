import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image

from genie_diffusers import DerivativeHead, GeniePipeline, GenieScheduler
from genie_diffusers.learning.run import RunLog
from training import train_genie_head

REPOSITORY = Path(__file__).resolve().parents[2]
NULL_CLASS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with attention and random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=NULL_CLASS + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


def parse(base, data, output_dir, **named):
    named = {
        "pretrained_model_name_or_path": base,
        "dataset_name": data,
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "train_batch_size": 4,
        "max_train_steps": 6,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-2,
        "validation_samples": 10,
        "num_inference_steps": 2,
        "report_to": "none",
    } | named
    return train_genie_head.parse_args([str(part) for name, value in named.items() for part in (f"--{name}", value)])


def train(*args, **named):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_genie_head.main(parse(*args, **named))


def losses(output_dir: Path) -> dict[int, float]:
    return {step: loss for step, loss, _ in RunLog.read(output_dir / "loss.csv")}


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "head"
    train(base, data, output_dir, max_guidance_scale=3.0, checkpointing_steps=3)
    return output_dir


@pytest.mark.slow
def test_a_head_learns_the_slope_of_held_out_pictures(base, data, tmp_path):
    train(base, data, tmp_path / "head", max_train_steps=80, train_batch_size=16, ema_max_decay=0.9)
    facts = ModelCard.load(tmp_path / "head" / "README.md").text
    errors = facts.split("Held-out relative error of dε/dλ | ")[1].split(" (")[0].split(", ")
    assert np.mean([float(error) for error in errors]) < 0.9, "no better than no slope at all"


def test_a_resumed_run_has_the_losses_and_the_head_of_an_uninterrupted_one(base, data, trained, tmp_path):
    resumed = tmp_path / "head"
    arguments = {"max_guidance_scale": 3.0, "checkpointing_steps": 3}
    # A schedule that does not depend on the number of steps, so that the first part can be run alone.
    for output_dir, last in ((tmp_path / "whole", 6), (resumed, 3)):
        train(base, data, output_dir, lr_scheduler="constant", max_train_steps=last, **arguments)
    train(base, data, resumed, lr_scheduler="constant", resume_from_checkpoint="latest", **arguments)
    assert losses(resumed) == losses(tmp_path / "whole")
    heads = [DerivativeHead.from_pretrained(folder) for folder in (resumed, tmp_path / "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(head.parameters() for head in heads), strict=True))


@pytest.mark.slow
def test_result_is_a_head_that_loads_onto_its_base_in_a_fresh_process(base, trained):
    code = (
        "import sys\n"
        "from diffusers import UNet2DModel\n"
        "from genie_diffusers import GeniePipeline, GenieScheduler, GenieUNet2DModel\n"
        "unet = UNet2DModel.from_pretrained(sys.argv[1], subfolder='unet')\n"
        "unet = GenieUNet2DModel.from_unet(unet, derivative_head=sys.argv[2])\n"
        "pipeline = GeniePipeline(unet, GenieScheduler.from_pretrained(sys.argv[1], subfolder='scheduler'))\n"
        "print(pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3).images[0].size)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(base), str(trained)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "(8, 8)"
    assert "distilled from other weights" not in run.stderr


def test_head_is_published_without_the_base_and_notes_what_it_is_for(base, trained):
    head = DerivativeHead.from_pretrained(trained)
    assert head.config.process["num_train_timesteps"] == 1000
    assert head.config.prediction_type == "epsilon"
    assert len(head.config.fingerprint) == 8
    assert not any((trained / name).exists() for name in ("unet", "model_index.json"))


def test_card_shows_the_error_by_noise_level_and_how_to_use_the_head(trained):
    card = ModelCard.load(trained / "README.md")
    assert 'derivative_head="head"' in card.text
    for name in ("samples.png", "loss.png", "error.png"):
        assert f"({name})" in card.text
        Image.open(trained / name).verify()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"max_guidance_scale": 0.5}, "`--max_guidance_scale` must be at least 1"),
        ({"resolution": 16}, "`--resolution` must be 8"),
        ({"validation_samples": 40}, "`--validation_samples` must be between 1 and 39, got 40"),
        ({"derivative_head": "anything", "head_width": 8}, "`--head_width` is that of `--derivative_head`"),
    ],
)
def test_bad_input_is_refused(base, data, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        train(base, data, tmp_path / "head", **named)
