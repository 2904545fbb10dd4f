import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image

from genie_diffusers import GeniePipeline, GenieScheduler, GGDMScheduler, ImageClassifier, Table
from genie_diffusers.learning.run import RunLog
from genie_diffusers.learning.samplers import check
from genie_diffusers.metrics import ReferenceFeatures
from training import train_ggdm

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]

# --- the run ---------------------------------------------------------------------------------------------------------


def weights_of(table: dict, size: int) -> np.ndarray:
    """All numbers of a table, padded with zeros to `size` weights a row."""
    terms = [(what, lag) for what in ("sample", "data", "prediction") for lag in range(size)]
    read = Table.from_dict(table, GGDMScheduler().process)
    weights = [row.get(term, 0.0) for row in read for term in [*terms, ("noise", 0)]]
    return np.array([*weights, *read.timesteps])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with random weights, as a pipeline folder."""
    from diffusers import UNet2DModel

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
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """Features, and those of pictures that are nothing special."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    model = ImageClassifier(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    model.save_pretrained(folder)
    with torch.no_grad():
        features = model.features(torch.rand(64, 3, 8, 8) * 2 - 1)
    ReferenceFeatures(features.mean(0).double(), features.double().T.cov(), features).save_pretrained(folder)
    return folder


def arguments(base, classifier, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "feature_network": classifier,
        "output_dir": output_dir,
        "num_inference_steps": "2,3",
        "objective": "kernel",
        "origin": "ddim",
        "family": "states,history,time,noise",
        "validation_samples": 8,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "lr_warmup_steps": 0,
        "lr_scheduler": "constant",  # the same for a first part that is run alone
        "learning_rate": 1e-2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "report_to": "none",
    } | named
    flags = [f"--{name}" for name, value in named.items() if value is True]
    return flags + [str(p) for name, value in named.items() if value is not True for p in (f"--{name}", value)]


def train(base, classifier, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_ggdm.main(train_ggdm.parse_args(arguments(base, classifier, output_dir, **named)))


def losses(output_dir: Path) -> dict[int, float]:
    return {step: loss for step, loss, _ in RunLog.read(output_dir / "loss.csv")}


def tables(output_dir: Path) -> dict[str, dict]:
    return json.loads((output_dir / "scheduler_config.json").read_text())["tables"]


TRAJECTORY = {"objective": "trajectory", "family": "states,history,time", "teacher_steps": 16}
TRAJECTORY |= {"origin": "least_squares", "fit_trajectories": 16, "train_trajectories": 12}


@pytest.fixture(scope="module", params=["kernel", "trajectory"])
def trained(request, base, classifier, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "sampler"
    options = TRAJECTORY if request.param == "trajectory" else {"guidance_scale": 2.0}
    train(base, classifier, output_dir, report_to="tensorboard", **options)
    return output_dir


def test_result_is_a_sampler_that_a_pipeline_samples_with(base, trained):
    pipeline = GeniePipeline.from_pretrained(base)
    pipeline.scheduler = GGDMScheduler.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (2, 3):
        images = pipeline(class_labels=[0, 1], num_inference_steps=steps, output_type="np").images
        assert images.shape == (2, 8, 8, 3)
    origin = tables(trained / "computed" / "origin")
    for steps, table in tables(trained).items():
        change = weights_of(table, 3) - weights_of(origin[steps], 3)
        assert 1e-3 < np.abs(change).max()
        assert max(len(weights) for what, weights in table["rows"][-1].items() if what != "sample") == int(steps)


def test_card_and_curves_show_what_was_learned(trained):
    card = ModelCard.load(trained / "README.md")
    assert 'GGDMScheduler.from_pretrained("sampler")' in card.text
    for name in ("loss.png", "tables.png"):
        assert f"({name})" in card.text
        Image.open(trained / name).verify()
    assert "Held-out" in card.text and ", learned | 2: " in card.text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((trained / "logs").rglob("events.*")).parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "validation/3", "3/timesteps/1"} <= tags and {"3/prediction/2/1", "3/data/2/1"} & tags


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TRAJECTORY], ids=["kernel", "trajectory"])
def test_a_resumed_run_has_the_losses_and_the_tables_of_a_whole_one(base, classifier, tmp_path, options):
    for name, last in (("whole", 4), ("resumed", 2)):
        train(base, classifier, tmp_path / name, max_train_steps=last, **options)
    assert tables(tmp_path / "resumed") != tables(tmp_path / "whole")
    train(base, classifier, tmp_path / "resumed", resume_from_checkpoint="latest", **options)
    assert list(losses(tmp_path / "resumed")) == [1, 2, 3, 4]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert tables(tmp_path / "resumed") == tables(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"`--time_grid` must be .*origin was computed, got quadratic"):
        further = {"resume_from_checkpoint": "latest", "max_train_steps": 5, "time_grid": "quadratic"}
        train(base, classifier, tmp_path / "resumed", **options | further)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TRAJECTORY], ids=["kernel", "trajectory"])
def test_result_does_not_depend_on_how_a_batch_is_split(base, classifier, tmp_path, options):
    train(base, classifier, tmp_path / "whole", **options)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    split = arguments(
        base, classifier, tmp_path / "split", **options, train_batch_size=2, gradient_accumulation_steps=2
    )
    run = subprocess.run(
        [sys.executable, "-m", *launcher, str(REPOSITORY / "training" / "train_ggdm.py"), *split],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    for steps, table in tables(tmp_path / "whole").items():
        found = weights_of(tables(tmp_path / "split")[steps], 3)
        np.testing.assert_allclose(found, weights_of(table, 3), rtol=1e-3, atol=1e-4)


def test_an_earlier_result_is_an_origin_whose_other_tables_are_kept(base, classifier, tmp_path, trained):
    train(base, classifier, tmp_path / "more", origin=trained, num_inference_steps=3, family="states,history")
    assert tables(tmp_path / "more")["2"] == tables(trained)["2"]
    assert tables(tmp_path / "more")["3"] != tables(trained)["3"]


def test_kept_marginals_are_those_of_the_result(base, classifier, tmp_path):
    options = {"keep_marginals": True, "family": "states,noise,pred", "eta": 0.5, "mixed_precision": "bf16"}
    train(base, classifier, tmp_path / "kept", **options | {"family": "states,noise,time"})
    scheduler = GGDMScheduler.from_pretrained(tmp_path / "kept")
    scheduler.set_timesteps(3)
    np.testing.assert_allclose(scheduler.marginals()[1], scheduler.noise_stds, rtol=1e-9, atol=1e-12)
    train(base, classifier, tmp_path / "pred", **options)
    assert tables(tmp_path / "pred") != tables(tmp_path / "kept")


def test_real_pictures_may_come_from_a_data_set(base, classifier, tmp_path, data):
    options = {"dataset_name": data, "reference_pictures": 32, "kernel_degree": 1, "cache_dir": tmp_path}
    train(base, classifier, tmp_path / "sampler", max_train_steps=2, **options)
    assert "Held-out linear kernel distance, learned" in ModelCard.load(tmp_path / "sampler" / "README.md").text


def test_a_head_s_slopes_are_weighed_too(base, classifier, tmp_path):
    from genie_diffusers import DerivativeHead

    pipeline = GeniePipeline.from_pretrained(base)
    head = DerivativeHead.for_unet(pipeline.unet, pipeline.scheduler.config)
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    head.save_pretrained(tmp_path / "head")
    options = {"derivative_head": tmp_path / "head", "family": "slope", "guidance_scale": 2.0}
    train(base, classifier, tmp_path / "sampler", **options)
    assert any(row.get("slope", [0])[0] for row in tables(tmp_path / "sampler")["3"]["rows"])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"family": "states,histroy"}, "`--family` must be of states, .*got histroy"),
        ({"origin": "nowhere"}, "`--origin` must be one of ddim, .* or a folder, got 'nowhere'"),
        ({"family": "states,pred"}, "`pred` is in every `--family`"),
        ({"keep_marginals": True}, "`--family` without `history` and `slope`"),
        ({"family": "slope"}, "`slope` in `--family` and `--derivative_head` go together"),
        ({"objective": "trajectory"}, "`--objective trajectory` needs a deterministic sampler"),
        ({"validation_samples": 1}, "`--validation_samples` must be at least 2.*got 1 and"),
        ({"num_inference_steps": "0,2"}, r"`--num_inference_steps` positive, got 8 and \[0, 2\]"),
        ({"feature_network": "torch.nn:Identity"}, "`--dataset_name` must name real pictures"),
    ],
)
def test_bad_input_is_refused(base, classifier, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        train(base, classifier, tmp_path / "sampler", **named)


def test_guidance_needs_classes():
    given = train_ggdm.parse_args(arguments("base", "classifier", "run", guidance_scale=2.0))
    unet = SimpleNamespace(config=SimpleNamespace(num_class_embeds=None))
    with pytest.raises(ValueError, match=r"`--guidance_scale` must be 1 for a model without classes, got 2\.0"):
        check(given, unet)


def test_steps_that_the_origin_has_not_are_refused(base, classifier, tmp_path, trained):
    with pytest.raises(ValueError, match=r"must be among those of `--origin`, 2, 3, got \[4\] too"):
        train(base, classifier, tmp_path / "sampler", origin=trained, num_inference_steps="3,4")
