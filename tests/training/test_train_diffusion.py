import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import train_diffusion
import training_utils
from genie_diffusers import VariancePreserving

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
    return {step: loss for step, loss, _ in training_utils.RunLog.read(output_dir / "loss.csv")}


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


def test_killed_run_resumes_with_the_same_losses(resumed):
    output_dir, before = resumed
    after = losses(output_dir)
    assert list(after) == list(range(1, 31))
    assert max(before) % 10 > 0, "nothing was repeated after the last checkpoint"
    assert {step: after[step] for step in before} == before


def test_rotation_leaves_the_newest_complete_checkpoint_and_nothing_else(resumed):
    assert [path.name for path in resumed[0].glob("*checkpoint*")] == ["checkpoint-30"]


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


# The data


@pytest.fixture
def pictures(data, tmp_path):
    return training_utils.load_pictures(str(data), 4, 3, label_column="label", cache_dir=str(tmp_path))


def test_pictures_are_the_area_averages_of_their_central_squares(data, pictures):
    source = datasets.Dataset.from_parquet(str(data / "train-00000-of-00001.parquet"))
    for i in (0, 7):
        square = np.asarray(source[i]["image"], dtype=np.float64)[:, 2:14]
        average = square.reshape(4, 3, 4, 3, 3).mean((1, 3))
        ours = np.frombuffer(pictures[i]["pixels"], np.uint8).reshape(4, 4, 3)
        # PIL rounds after each of its two passes.
        assert np.abs(ours - average).max() <= 1.0
        assert pictures[i]["label"] == source[i]["label"]


def stream(pictures, **arguments):
    return training_utils.TrainingStream(pictures, (3, 4, 4), (3, 4, 4), seed=3, **arguments)


def test_sample_depends_on_its_position_alone(pictures):
    arguments = {"random_flip": True, "label_dropout": 0.5, "null_class": 3}
    positions = [5, 77, 41, 0]
    together = stream(pictures, **arguments).__getitems__(positions)
    for i, position in enumerate(positions):
        alone = stream(pictures, **arguments).__getitems__([position])
        for name, values in together.items():
            assert torch.equal(values[i], alone[name][0])


def test_every_epoch_has_every_picture_once_in_another_order(pictures):
    samples = stream(pictures)
    epochs = [samples.__getitems__(list(range(i * NUM_PICTURES, (i + 1) * NUM_PICTURES))) for i in range(2)]
    first, second = (epoch["images"].flatten(1).tolist() for epoch in epochs)
    assert sorted(first) == sorted(second) and first != second
    assert len({tuple(picture) for picture in first}) == NUM_PICTURES
    assert not torch.equal(epochs[0]["noise"], epochs[1]["noise"])


def test_flips_and_dropped_labels_have_their_frequencies(pictures):
    positions = list(range(50 * NUM_PICTURES))
    plain = stream(pictures).__getitems__(positions)
    augmented = stream(pictures, random_flip=True, label_dropout=0.1, null_class=3).__getitems__(positions)
    flipped = (augmented["images"] == plain["images"].flip(3)).flatten(1).all(1)
    same = (augmented["images"] == plain["images"]).flatten(1).all(1)
    assert (flipped ^ same).all()
    # Five standard deviations of 2,000 draws.
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.056)
    assert (augmented["labels"] == 3).float().mean() == pytest.approx(0.1, abs=0.034)
    kept = augmented["labels"] != 3
    assert torch.equal(augmented["labels"][kept], plain["labels"][kept])
    assert torch.equal(augmented["noise"], plain["noise"])


def test_processes_share_the_stream_without_gap_or_overlap():
    batches = [list(itertools.islice(training_utils.PositionSampler(24, 4, process, 3), 5)) for process in range(3)]
    interleaved = [position for step in zip(*batches, strict=True) for batch in step for position in batch]
    assert interleaved == list(range(24, 24 + 60))


# The diffusion


def diffusion(**config) -> train_diffusion.VariancePreservingTraining:
    return train_diffusion.PROCESSES["vp"](config)


def test_timesteps_are_uniform_over_the_integers():
    times = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(diffusion(num_train_timesteps=1000).timesteps(times), minlength=1000)
    assert counts.tolist() == [4] * 1000


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_model_that_predicts_the_target_recovers_the_picture_in_one_step(prediction_type):
    training = diffusion(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 10, 300, 999])
    noisy, target = (f(images, noise, timesteps) for f in (training.add_noise, training.target))
    for i in range(4):
        scheduler = training.scheduler
        scheduler.set_timesteps(timesteps=[int(timesteps[i])])
        step = scheduler.step(target[i : i + 1], timesteps[i], noisy[i : i + 1])
        assert torch.allclose(step.prev_sample, images[i : i + 1], atol=1e-8)


def other_process(name: str, **config):
    return train_diffusion.PROCESSES[name]({"sample_size": (3, 4), **config})


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_a_model_that_predicts_the_target_recovers_the_picture_of_any_process(name):
    training = other_process(name)
    channels = 3 * training.process.weight_shape[-1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 3, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, channels, 3, 4, generator=generator, dtype=torch.float64)
    timesteps = training.timesteps(torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64))
    seen, target = (f(images, noise, timesteps) for f in (training.add_noise, training.target))
    state = training.process.add_noise(images, noise, timesteps)
    scheduler = training.scheduler
    for i, timestep in enumerate(timesteps.tolist()):
        scheduler.set_timesteps(timesteps=[timestep])
        row = slice(i, i + 1)
        torch.testing.assert_close(scheduler.scale_model_input(state[row], timestep), seen[row])
        step = scheduler.step(target[row], timestep, state[row])
        torch.testing.assert_close(training.process.pictures(step.prev_sample), images[row], rtol=1e-6, atol=1e-6)


def test_langevin_unet_from_a_unet_for_pictures_does_for_positions_what_that_does(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    wide, _ = train_diffusion.load_model(parse(pretrained_model_name_or_path=tmp_path, process="cld"))
    assert (wide.config.in_channels, wide.config.out_channels) == (6, 6)
    state = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        output = wide(state, 10, class_labels=labels).sample
        expected = unet(state[:, :3], 10, class_labels=labels).sample
    torch.testing.assert_close(output[:, :3], expected)
    assert output[:, 3:].abs().max() == 0
    wide.save_pretrained(tmp_path)  # one for states is taken as it is
    again, _ = train_diffusion.load_model(parse(pretrained_model_name_or_path=tmp_path, process="cld"))
    assert again.config.in_channels == 6


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_trained_pipeline_of_any_process_is_trained_further(name, tmp_path):
    config = {"cld": {"friction": 2.0}, "blurring": {"blur_sigma": 5.0}}[name]
    training = other_process(name)
    training.scheduler.register_to_config(sample_size=8, **config)
    channels = 3 * training.process.weight_shape[-1]
    training.pipeline(tiny_unet(in_channels=channels, out_channels=channels)).save_pretrained(tmp_path)
    unet, schedule = train_diffusion.load_model(parse(pretrained_model_name_or_path=tmp_path, process=name))
    again = train_diffusion.PROCESSES[name](schedule)
    assert again.image_channels(unet.config.in_channels) == 3
    assert {key: again.scheduler.config[key] for key in config} == config
    assert again.scheduler.config.preconditioned


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_other_processes_predict_noise_only(name, tmp_path):
    with pytest.raises(ValueError, match=f"`--prediction_type` must be epsilon for `--process {name}`"):
        folder = tiny_config(tmp_path)
        args = parse(model_config_name_or_path=folder, process=name, prediction_type="sample")
        train_diffusion.load_model(args)


# Checkpoints


def fake_accelerator(save_state) -> SimpleNamespace:
    return SimpleNamespace(
        is_main_process=True, num_processes=1, wait_for_everyone=lambda: None, save_state=save_state
    )


def save(folder: str) -> None:
    Path(folder).mkdir()
    (Path(folder) / "model").write_text("whole")


def test_checkpoint_that_was_not_finished_is_never_picked_up(tmp_path):
    args = parse(output_dir=tmp_path, checkpoints_total_limit=1)
    training_utils.save_checkpoint(fake_accelerator(save), args, 10)

    def killed_while_saving(folder):
        save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training_utils.save_checkpoint(fake_accelerator(killed_while_saving), args, 20)
    assert [path.name for path in training_utils.complete_checkpoints(tmp_path)] == ["checkpoint-10"]
    training_utils.save_checkpoint(fake_accelerator(save), args, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]
    assert json.loads((tmp_path / "checkpoint-20" / "training_state.json").read_text())["step"] == 20


def test_rotation_counts_steps_as_numbers(tmp_path):
    args = parse(output_dir=tmp_path, checkpoints_total_limit=2)
    for step in (5, 50, 500):
        training_utils.save_checkpoint(fake_accelerator(save), args, step)
    assert [path.name for path in training_utils.complete_checkpoints(tmp_path)] == ["checkpoint-50", "checkpoint-500"]


def test_resume_with_another_seed_or_batch_size_is_an_error(tmp_path):
    training_utils.save_checkpoint(fake_accelerator(save), parse(output_dir=tmp_path), 10)
    for changed in ({"seed": 1}, {"train_batch_size": 3}):
        args = parse(output_dir=tmp_path, resume_from_checkpoint="latest", **changed)
        with pytest.raises(ValueError, match="A resumed run must have the"):
            training_utils.load_checkpoint(fake_accelerator(save), args)


def test_resume_from_what_is_no_checkpoint_is_an_error(tmp_path):
    args = parse(output_dir=tmp_path, resume_from_checkpoint=tmp_path / "partial-checkpoint")
    with pytest.raises(ValueError, match="must be `latest` or a complete folder"):
        training_utils.load_checkpoint(fake_accelerator(save), args)


def test_new_run_beside_old_checkpoints_is_an_error(tmp_path):
    training_utils.save_checkpoint(fake_accelerator(save), parse(output_dir=tmp_path), 10)
    with pytest.raises(ValueError, match="`--output_dir` must hold no checkpoints"):
        training_utils.start_accelerator(parse(output_dir=tmp_path, report_to="none"))


# Bad input


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"resolution": 9}, "`--resolution` must be a multiple of 2"),
        ({"num_class_embeds": None}, {"label_dropout": 0.1}, "`--label_dropout` must be 0 for a UNet without"),
        ({"out_channels": 6}, {}, "as many output channels as input channels"),
    ],
)
def test_unet_that_does_not_fit_the_arguments_is_an_error(tmp_path, config, arguments, message):
    args = parse(model_config_name_or_path=tiny_config(tmp_path, **config), **arguments)
    with pytest.raises(ValueError, match=message):
        train_diffusion.load_model(args)


def test_conditional_model_without_its_label_column_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"`--label_column` must be one of the columns image, label .* got 'class'"):
        training_utils.load_pictures(str(data), 4, 3, label_column="class", cache_dir=str(tmp_path))


def test_column_of_another_type_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="`--image_column` must hold pictures, got 'label'"):
        training_utils.load_pictures(str(data), 4, 3, image_column="label", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`--label_column` must hold integers, got 'image'"):
        training_utils.load_pictures(str(data), 4, 3, label_column="image", cache_dir=str(tmp_path))


def test_picture_smaller_than_the_resolution_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="got 16 and a picture of 16x12 pixels"):
        training_utils.load_pictures(str(data), 16, 3, cache_dir=str(tmp_path))


def test_label_that_is_the_null_class_is_an_error():
    unet = tiny_unet()
    train_diffusion.check_labels([0, 2], train_diffusion.num_classes(unet, label_dropout=0.1))
    train_diffusion.check_labels([0, 3], train_diffusion.num_classes(unet, label_dropout=0.0))
    with pytest.raises(ValueError, match="Labels must be between 0 and 2"):
        train_diffusion.check_labels([0, 3], train_diffusion.num_classes(unet, label_dropout=0.1))


# What is computed once


@pytest.fixture
def computed(tmp_path):
    """Calls `computed_once` with arguments, and notes how often it computes."""

    def call(**named) -> str:
        def compute(path):
            call.times += 1
            path.write_text(str(call.times))
            if named.get("killed"):
                raise KeyboardInterrupt

        args = argparse.Namespace(output_dir=tmp_path, **{"steps": [2, 3], "scale": 1.0} | named)
        return training_utils.computed_once(args, "result.txt", ["steps", "scale"], compute).read_text()

    call.times = 0
    return call


def test_what_follows_from_the_same_arguments_is_computed_once(computed):
    assert computed() == "1"
    assert computed(another_argument=5) == "1"
    with pytest.raises(ValueError, match=r"`--scale` must be 1\.0, with which .*result\.txt was computed, got 2\.0"):
        computed(scale=2.0)
    with pytest.raises(ValueError, match=r"`--steps` must be \[2, 3\]"):
        computed(steps=[2])
    assert computed.times == 1


def test_what_was_killed_while_it_was_computed_is_computed_again(computed):
    with pytest.raises(KeyboardInterrupt):
        computed(killed=True, scale=3.0)
    assert computed() == "2"
    assert computed() == "2"


# Publication


def test_neither_training_state_nor_what_was_computed_for_it_is_published(resumed, monkeypatch):
    uploads = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, **kwargs):
            uploads.append(kwargs)

    monkeypatch.setattr(training_utils, "HfApi", Api)
    training_utils.push_to_hub(parse(output_dir=resumed[0], hub_model_id="tiny"))
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


def test_process_of_a_pretrained_pipeline_is_kept_unless_asked_otherwise(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, prediction_type="sample")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    _, schedule = train_diffusion.load_model(parse(pretrained_model_name_or_path=tmp_path))
    training = train_diffusion.PROCESSES["vp"](schedule)
    expected = VariancePreserving.from_config(scheduler.config)
    assert np.array_equal(training.process.alpha(np.arange(100)), expected.alpha(np.arange(100)))
    assert training.prediction_type == "sample"
    args = parse(pretrained_model_name_or_path=tmp_path, prediction_type="v_prediction")
    assert train_diffusion.PROCESSES["vp"](train_diffusion.load_model(args)[1]).prediction_type == "v_prediction"
