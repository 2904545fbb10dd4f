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

from genie_diffusers import DSNOPipeline, GeniePipeline, GenieScheduler, ImageClassifier
from genie_diffusers.learning import operators
from genie_diffusers.learning.operators import (
    HeldOut,
    check,
)
from genie_diffusers.learning.run import RunLog
from genie_diffusers.learning.solutions import Teacher, TrajectoryStream
from training import generate_trajectories, train_dsno

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with random weights whose output changes slowly with time, as a pipeline folder."""
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
    # the fast half of the sinusoids is cut off
    unet.time_embedding.linear_1.weight.data.unflatten(1, (2, 2, -1))[:, :, 0] = 0
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def solutions(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("solutions")
    named = {"pretrained_model_name_or_path": base, "output_dir": folder, "num_trajectories": 40, "shard_size": 16}
    named |= {"num_inference_steps": 8, "label_dropout": 0.2}
    AcceleratorState._reset_state(reset_partial_state=True)
    generate_trajectories.main(generate_trajectories.parse_args(as_list(named)))
    return folder


def as_list(named) -> list[str]:
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def arguments(base, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "output_dir": output_dir,
        "num_inference_steps": 8,
        "fit_trajectories": 16,
        "validation_trajectories": 8,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "lr_warmup_steps": 0,
        "lr_scheduler": "constant",  # the same for a first part that is run alone
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "report_to": "none",
    } | named
    return as_list(named)


def train(base, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dsno.main(train_dsno.parse_args(arguments(base, output_dir, **named)))


def losses(output_dir: Path) -> dict[int, float]:
    return {step: loss for step, loss, _ in RunLog.read(output_dir / "loss.csv")}


@pytest.fixture(scope="module")
def trained(base, solutions, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "operator"
    train(base, output_dir, trajectories=solutions)
    return output_dir


# --- the run ---------------------------------------------------------------------------------------------------------


def test_result_is_a_pipeline_with_a_card(trained):
    pipe = DSNOPipeline.from_pretrained(trained)
    assert pipe.unet.num_time_points == 4 and pipe.unet.config.modes == 2
    assert pipe(class_labels=[0, 1]).images[0].size == (8, 8)
    card = ModelCard.load(trained / "README.md")
    assert 'DSNOPipeline.from_pretrained("operator")' in card.text
    assert "40, of 8 steps of GenieScheduler" in card.text
    for name in ("samples.png", "loss.png"):
        assert f"({name})" in card.text
        Image.open(trained / name).verify()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["disk", "fly"])
def test_a_resumed_run_has_the_losses_and_the_weights_of_a_whole_one(base, solutions, tmp_path, monkeypatch, source):
    options = {"trajectories": solutions} if source == "disk" else {"label_dropout": 0.1, "time_grid": "linear"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for output_dir, last in ((whole, 4), (resumed, 2)):
        train(base, output_dir, max_train_steps=last, **options)
    monkeypatch.setattr(operators, "fit_start", None)
    train(base, resumed, resume_from_checkpoint="latest", **options)
    assert list(losses(resumed)) == [1, 2, 3, 4]
    assert losses(resumed) == losses(whole)
    with pytest.raises(ValueError, match=r"`--fit_trajectories` must be 16, with which .*start was computed, got 17"):
        train(base, resumed, resume_from_checkpoint="latest", max_train_steps=5, fit_trajectories=17, **options)
    pipes = [DSNOPipeline.from_pretrained(folder) for folder in (resumed, whole)]
    assert pipes[0].unet.config.timesteps == pipes[1].unet.config.timesteps
    assert all(torch.equal(a, b) for a, b in zip(*(pipe.unet.parameters() for pipe in pipes), strict=True))


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_batch_is_split(base, solutions, trained, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "trajectories": solutions}
    script = [str(REPOSITORY / "training" / "train_dsno.py"), *arguments(base, tmp_path / "split", **split)]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, *script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(trained), rel=1e-3)


@pytest.mark.slow
def test_one_call_learns_to_land_nearer_at_every_time_point(base, solutions, tmp_path):
    options = {"max_train_steps": 120, "checkpointing_steps": 120, "train_batch_size": 8, "ema_max_decay": 0.9}
    train(base, tmp_path / "run", trajectories=solutions, max_loss_weight=3, validation_trajectories=16, **options)
    rows = ModelCard.load(tmp_path / "run" / "README.md").text

    def errors(name: str) -> np.ndarray:
        return np.array(rows.split(f"| {name} | ")[1].split(" |")[0].split(", "), dtype=float)

    before, after = errors("The same before training"), errors("Held-out relative error at each time point")
    assert len(after) == 4 and (after < 0.9 * before).all()


def test_a_plain_regression_learns_from_the_same_solutions(base, solutions, tmp_path):
    train(base, tmp_path / "run", trajectories=solutions, num_time_points=1, modes=0)
    unet = DSNOPipeline.from_pretrained(tmp_path / "run").unet
    assert unet.config.solution_timesteps == [-1.0] and len(unet.temporal_layers) == 0


def test_features_pull_at_every_weight(base, solutions, tmp_path):
    classifier = ImageClassifier(sample_size=8, num_classes=3, block_out_channels=(8, 8), layers_per_block=1)
    classifier.save_pretrained(tmp_path / "classifier")
    options = {"trajectories": solutions, "max_train_steps": 2, "feature_network": tmp_path / "classifier"}
    train(base, tmp_path / "with", feature_loss_weight=0.5, **options)
    train(base, tmp_path / "without", feature_loss_weight=0.0, **options)
    assert losses(tmp_path / "with")[1] > losses(tmp_path / "without")[1]
    assert "0.5 × distance in features of classifier" in ModelCard.load(tmp_path / "with" / "README.md").text


# --- its parts -------------------------------------------------------------------------------------------------------


def test_held_out_noises_are_not_those_of_the_training(base, solutions):
    args = train_dsno.parse_args(arguments(base, "run"))
    teacher = Teacher(args, torch.device("cpu"))
    held_out = HeldOut(teacher, 4, 0, 4, torch.device("cpu"))
    stored = TrajectoryStream(solutions, seed=0).rows(list(range(40)))["noise"]
    assert not any(torch.equal(a, b) for a in held_out.noises.noise for b in stored)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"num_time_points": 3}, "must be such that the operator's time points are among those of `--trajectories`"),
        ({"modes": 4}, "`modes` must be between 0 and 3"),
        ({"max_loss_weight": 0.5}, r"`--max_loss_weight` must be at least 1.*got 0\.5"),
        ({"fit_trajectories": 0}, "`--fit_trajectories` and `--validation_trajectories` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(base, solutions, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "run", trajectories=solutions, **named)


def test_solutions_of_other_weights_are_refused(base, solutions, tmp_path):
    pipe = GeniePipeline.from_pretrained(base)
    torch.nn.init.normal_(pipe.unet.conv_in.weight)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are of a model with other weights"):
        train(tmp_path / "other", tmp_path / "run", trajectories=solutions)


def test_skipping_needs_shards(base, tmp_path):
    args = train_dsno.parse_args([*arguments(base, tmp_path / "run"), "--skip_damaged_shards"])
    with pytest.raises(ValueError, match="`--skip_damaged_shards` needs `--trajectories`"):
        check(args)
