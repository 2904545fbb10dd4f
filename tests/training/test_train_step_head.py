import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image

from genie_diffusers import GeniePipeline, GenieScheduler, GenieUNet2DModel, StepHead
from genie_diffusers.learning import fitting, paths, step_heads
from genie_diffusers.learning.run import RunLog
from genie_diffusers.learning.step_heads import check, keep_what_helps
from training import train_step_head

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


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


def arguments(base, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "output_dir": output_dir,
        "table_steps": "2,3,4",
        "head_steps": "2,3",
        "head_width": 8,
        "teacher_steps": 16,
        "fit_trajectories": 16,
        "train_trajectories": 12,
        "validation_trajectories": 8,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "lr_warmup_steps": 0,
        "lr_scheduler": "constant",  # the same for a first part that is run alone
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "report_to": "none",
    } | named
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def train(base, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_step_head.main(train_step_head.parse_args(arguments(base, output_dir, **named)))


def losses(output_dir: Path) -> dict[int, float]:
    return {step: loss for step, loss, _ in RunLog.read(output_dir / "loss.csv")}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """Four steps of training, whose network is kept whether it helps or not."""
    output_dir = tmp_path_factory.mktemp("run") / "solver"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_heads, "keep_what_helps", lambda *args: None)
        train(base, output_dir, max_guidance_scale=3.0)
    return output_dir


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_result_is_a_head_that_a_pipeline_samples_with_in_a_fresh_process(base, trained):
    code = (
        "import sys\n"
        "from diffusers import UNet2DModel\n"
        "from genie_diffusers import GeniePipeline, GenieScheduler, GenieUNet2DModel\n"
        "unet = UNet2DModel.from_pretrained(sys.argv[1], subfolder='unet')\n"
        "unet = GenieUNet2DModel.from_unet(unet, derivative_head=sys.argv[2])\n"
        "calls = []\n"
        "unet.derivative_head.register_forward_hook(lambda module, args, output: calls.append(output))\n"
        "pipeline = GeniePipeline(unet, GenieScheduler.from_pretrained(sys.argv[1], subfolder='scheduler'))\n"
        "images = pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3).images\n"
        "print(images[0].size, len(calls), pipeline.scheduler.timesteps.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(base), str(trained)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    timesteps = StepHead.load_config(trained)["tables"]["3"]["timesteps"]
    assert run.stdout.split("\n")[-2] == f"(8, 8) 3 {timesteps}"
    assert "distilled from other weights" not in run.stderr


def test_head_has_a_table_for_each_number_of_calls_and_works_in_those_it_is_for(trained):
    head = StepHead.from_pretrained(trained)
    assert list(head.config.tables) == ["2", "3", "4"]
    for steps, table in head.config.tables.items():
        assert len(table["timesteps"]) == len(table["rows"]) == int(steps)
        assert [len(row["prediction"]) for row in table["rows"]] == [1, 2, 3, 4][: int(steps)]
        assert all(("residual" in row) == (int(steps) < 4) for row in table["rows"])
    assert head.config.process["num_train_timesteps"] == 1000 and len(head.config.fingerprint) == 8
    assert head.conv_out.weight.norm() > 0
    assert not any((trained / name).exists() for name in ("unet", "model_index.json"))


def test_the_network_is_left_out_of_the_tables_that_are_better_alone(base, trained):
    unet = UNet2DModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    config = GenieScheduler.load_config(base, subfolder="scheduler")
    args = train_step_head.parse_args(arguments(base, trained))
    kept = []
    for sign in (1.0, -1.0):  # a small constant added to all pictures brings them closer with one sign of the two
        head = StepHead.from_pretrained(trained)
        tables = {steps: fitting.without_residuals(table) for steps, table in head.config.tables.items()}
        for table in tables.values():
            table["rows"][-1]["residual"] = [1e-3]
        head.register_to_config(tables=tables)
        torch.nn.init.zeros_(head.conv_out.weight)
        torch.nn.init.constant_(head.conv_out.bias, sign)
        model = GenieUNet2DModel.from_unet(unet, head)
        keep_what_helps(args, model, head, config, CPU)
        kept.append({steps: "residual" in table["rows"][-1] for steps, table in head.config.tables.items()})
    assert kept[0]["2"] != kept[1]["2"] and kept[0]["3"] != kept[1]["3"]
    assert kept[0]["4"] and kept[1]["4"], "4 calls are not among those of the network"


def test_card_shows_the_errors_and_how_to_use_the_head(trained):
    card = ModelCard.load(trained / "README.md")
    assert 'derivative_head="solver"' in card.text
    for name in ("loss.png", "error.png"):
        assert f"({name})" in card.text
        Image.open(trained / name).verify()
    for name in ("with the network", "tables alone", "hermite"):
        assert f"Held-out relative error, {name} | " in card.text


@pytest.mark.slow
def test_a_resumed_run_reads_its_solutions_and_has_the_losses_and_the_head_of_a_whole_one(base, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for output_dir, last in ((whole, 4), (resumed, 2)):
        train(base, output_dir, max_train_steps=last)
    pictures = (resumed / "computed" / "trajectories.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(step_heads, "fit_tables", None)
    train(base, resumed, resume_from_checkpoint="latest")
    assert (resumed / "computed" / "trajectories.safetensors").stat().st_mtime_ns == pictures
    assert list(losses(resumed)) == [1, 2, 3, 4]
    assert losses(resumed) == losses(whole)
    for name, value in {"teacher_steps": 17, "train_trajectories": 13, "label_dropout": 0.2}.items():
        with pytest.raises(ValueError, match=f"`--{name}` must be .* was computed, got {value}"):
            train(base, resumed, resume_from_checkpoint="latest", max_train_steps=5, **{name: value})
    heads = [StepHead.from_pretrained(folder) for folder in (resumed, whole)]
    assert heads[0].config.tables == heads[1].config.tables
    assert all(torch.equal(a, b) for a, b in zip(*(head.parameters() for head in heads), strict=True))


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_batch_is_split(base, tmp_path):
    train(base, tmp_path / "whole", max_guidance_scale=2.0)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_guidance_scale": 2.0}
    script = [str(REPOSITORY / "training" / "train_step_head.py"), *arguments(base, tmp_path / "split", **split)]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, *script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.slow
def test_gradients_are_those_of_the_loss_however_a_batch_is_accumulated(base, tmp_path, monkeypatch):
    """Adam does not see their size, which clipping does."""
    norms = {}
    for name, split in {"whole": (4, 1), "split": (1, 4)}.items():
        found = norms[name] = []

        def clip(self, parameters, max_norm, found=found):
            found.append(torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item())

        monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
        options = {"train_batch_size": split[0], "gradient_accumulation_steps": split[1], "max_train_steps": 2}
        train(base, tmp_path / name, **options)
    assert norms["split"] == pytest.approx(norms["whole"], rel=1e-3)


@pytest.mark.slow
def test_the_network_learns_what_the_tables_leave(base, tmp_path):
    options = {"table_steps": 3, "head_steps": 3, "train_trajectories": 128, "fit_trajectories": 32}
    options |= {"train_batch_size": 16, "learning_rate": 3e-3, "head_width": 16, "ema_max_decay": 0.9}
    train(base, tmp_path / "solver", max_train_steps=80, checkpointing_steps=80, **options)
    facts = ModelCard.load(tmp_path / "solver" / "README.md").text

    def error(name: str) -> float:
        return float(facts.split(f"Held-out relative error, {name} | 3: ")[1].split(" |")[0])

    assert error("with the network") < 0.96 * error("tables alone")


# --- the tables ------------------------------------------------------------------------------------------------------


def solved(unet, scheduler, steps: int, noises) -> torch.Tensor:
    with torch.no_grad():
        return paths.solve(unet, scheduler, steps, noises)


def test_tables_leave_less_error_than_ddim_on_noise_they_were_not_fitted_to(base, trained):
    unet = GenieUNet2DModel.from_pretrained(base, subfolder="unet").eval()
    noises = paths.draw(unet, 16, 9, 0.1)
    reference = solved(unet, paths.teacher_of({}), 60, noises)
    scheduler = paths.solver_of({})
    scheduler.attach(fitting.TablesAlone(StepHead.load_config(trained)["tables"]))
    for steps in (2, 3, 4):
        ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        by_table, by_ddim = (
            paths.relative_error(solved(unet, solver, steps, noises), reference).mean() for solver in (scheduler, ddim)
        )
        assert by_table < 0.7 * by_ddim


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"max_guidance_scale": 0.5}, r"`--max_guidance_scale` must be at least 1.*got 0\.5"),
        ({"head_steps": "2,5"}, r"`--head_steps` must be among `--table_steps`, which lack \[5\]"),
        ({"table_steps": "0,2,3"}, r"`--table_steps` must be positive.*got \[0, 2, 3\]"),
        ({"fit_trajectories": 4}, "`--fit_trajectories` at least 8.*, 4 and"),
        ({"validation_trajectories": 0}, "`--validation_trajectories` at least 1.*and 0"),
        ({"head_width": 12}, "`width` must be a positive multiple of 8, got 12"),
    ],
)
def test_bad_input_is_refused(base, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "solver", **named)


def test_guidance_needs_classes():
    arguments_of_a_run = train_step_head.parse_args(arguments("base", "run", max_guidance_scale=2.0))
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=3, out_channels=3, num_class_embeds=None))
    with pytest.raises(ValueError, match="`--max_guidance_scale` must be at least 1, and 1 for a model without"):
        check(arguments_of_a_run, unet)
