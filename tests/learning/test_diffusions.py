import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from genie_diffusers import VariancePreserving
from genie_diffusers.learning.data import check_labels
from genie_diffusers.learning.diffusions import PROCESSES, VariancePreservingTraining, load_model, num_classes
from training import train_diffusion

NUM_CLASSES = 3


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


def diffusion(**config) -> VariancePreservingTraining:
    return PROCESSES["vp"](config)


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
    return PROCESSES[name]({"sample_size": (3, 4), **config})


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
    wide, _ = load_model(parse(pretrained_model_name_or_path=tmp_path, process="cld"))
    assert (wide.config.in_channels, wide.config.out_channels) == (6, 6)
    state = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        output = wide(state, 10, class_labels=labels).sample
        expected = unet(state[:, :3], 10, class_labels=labels).sample
    torch.testing.assert_close(output[:, :3], expected)
    assert output[:, 3:].abs().max() == 0
    wide.save_pretrained(tmp_path)  # one for states is taken as it is
    again, _ = load_model(parse(pretrained_model_name_or_path=tmp_path, process="cld"))
    assert again.config.in_channels == 6


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_trained_pipeline_of_any_process_is_trained_further(name, tmp_path):
    config = {"cld": {"friction": 2.0}, "blurring": {"blur_sigma": 5.0}}[name]
    training = other_process(name)
    training.scheduler.register_to_config(sample_size=8, **config)
    channels = 3 * training.process.weight_shape[-1]
    training.pipeline(tiny_unet(in_channels=channels, out_channels=channels)).save_pretrained(tmp_path)
    unet, schedule = load_model(parse(pretrained_model_name_or_path=tmp_path, process=name))
    again = PROCESSES[name](schedule)
    assert again.image_channels(unet.config.in_channels) == 3
    assert {key: again.scheduler.config[key] for key in config} == config
    assert again.scheduler.config.preconditioned


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_other_processes_predict_noise_only(name, tmp_path):
    with pytest.raises(ValueError, match=f"`--prediction_type` must be epsilon for `--process {name}`"):
        folder = tiny_config(tmp_path)
        args = parse(model_config_name_or_path=folder, process=name, prediction_type="sample")
        load_model(args)


def test_process_of_a_pretrained_pipeline_is_kept_unless_asked_otherwise(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, prediction_type="sample")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    _, schedule = load_model(parse(pretrained_model_name_or_path=tmp_path))
    training = PROCESSES["vp"](schedule)
    expected = VariancePreserving.from_config(scheduler.config)
    assert np.array_equal(training.process.alpha(np.arange(100)), expected.alpha(np.arange(100)))
    assert training.prediction_type == "sample"
    args = parse(pretrained_model_name_or_path=tmp_path, prediction_type="v_prediction")
    assert PROCESSES["vp"](load_model(args)[1]).prediction_type == "v_prediction"


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
        load_model(args)


def test_label_that_is_the_null_class_is_an_error():
    unet = tiny_unet()
    check_labels([0, 2], num_classes(unet, label_dropout=0.1))
    check_labels([0, 3], num_classes(unet, label_dropout=0.0))
    with pytest.raises(ValueError, match="Labels must be between 0 and 2"):
        check_labels([0, 3], num_classes(unet, label_dropout=0.1))
