import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    VQModel,
)

from genie_diffusers import GenieDiTPipeline, GeniePipeline, VariancePreserving
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


def tiny_transformer(**config) -> DiTTransformer2DModel:
    config = {"sample_size": 8, "num_layers": 2, "num_embeds_ada_norm": NUM_CLASSES} | config
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, attention_bias=True, **config
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


# Flows


def flow(**config):
    return PROCESSES["flow"](config)


def test_training_times_of_flows_are_logit_normal_and_never_clean_data():
    times = torch.arange(4000, dtype=torch.float64) / 4000
    levels = flow(num_train_timesteps=500).timesteps(times) / 500
    assert 0 < levels.min() and levels.max() == 1
    logits = torch.logit(levels[1:])
    assert abs(logits.mean()) < 1e-3
    assert logits.std().item() == pytest.approx(1, abs=2e-3)
    assert (logits < -1).double().mean().item() == pytest.approx(0.1587, abs=1e-3)


def test_the_flow_that_is_learned_is_the_derivative_of_the_path():
    training = flow()
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 3, 3, 2, 2, generator=generator, dtype=torch.float64)
    timesteps, h = torch.tensor([10.0, 300.0, 990.0], dtype=torch.float64), 1.0
    later, earlier = (training.add_noise(images, noise, timesteps + e) for e in (h, -h))
    torch.testing.assert_close(training.target(images, noise, timesteps), (later - earlier) / (2 * h / 1000))
    torch.testing.assert_close(training.add_noise(images, noise, torch.zeros(3)), images)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_the_flow_that_fits_gaussian_data_best_is_the_exact_one(level):
    """Of data N(μ, s²): E[z − x_0 | x] = −μ + (σ − (1 − σ) s²)/((1 − σ)² s² + σ²) · (x − (1 − σ) μ)."""
    training, mean, std = flow(), 0.4, 0.5
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 400_000, 1, generator=generator, dtype=torch.float64)
    images, timesteps = mean + std * data, torch.full((len(data),), 1000 * level, dtype=torch.float64)
    noisy, target = (f(images, noise, timesteps) for f in (training.add_noise, training.target))
    offset = noisy - (1 - level) * mean
    fitted = torch.linalg.lstsq(torch.cat([torch.ones_like(offset), offset], dim=1), target).solution.flatten()
    slope = (level - (1 - level) * std**2) / ((1 - level) ** 2 * std**2 + level**2)
    torch.testing.assert_close(fitted, torch.tensor([-mean, slope], dtype=torch.float64), rtol=0, atol=0.01)


def test_the_saved_scheduler_takes_noise_to_gaussian_data_along_their_exact_flow():
    training, mean, std = flow(), 0.4, 0.5
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    scheduler, x = training.scheduler, noise
    scheduler.set_timesteps(1000)
    for timestep in scheduler.timesteps:
        level = float(timestep) / 1000
        slope = (level - (1 - level) * std**2) / ((1 - level) ** 2 * std**2 + level**2)
        x = scheduler.step(slope * (x - (1 - level) * mean) - mean, timestep, x).prev_sample
    torch.testing.assert_close(x, mean + std * noise, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_trained_flow_is_a_pipeline_of_stock_parts_and_is_trained_further(kind, tmp_path):
    model = tiny_unet() if kind == "unet" else tiny_transformer()
    training = PROCESSES["flow"](FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500).config)
    pipeline = training.pipeline(model)
    assert type(pipeline) is (GeniePipeline if kind == "unet" else GenieDiTPipeline)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    pipeline.save_pretrained(tmp_path)
    again, schedule = load_model(parse(pretrained_model_name_or_path=tmp_path, process="flow", label_dropout=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert PROCESSES["flow"](schedule).scheduler.config.shift == 3.0
    assert PROCESSES["flow"](schedule).timesteps(torch.zeros(1, dtype=torch.float64)) == 500
    assert num_classes(again, label_dropout=0.1) == NUM_CLASSES
    with pytest.raises(ValueError, match=r"`--process` must be flow for .*, which predicts flows, got vp"):
        load_model(parse(pretrained_model_name_or_path=tmp_path))


def test_a_flow_from_a_pipeline_of_another_diffusion_has_its_number_of_timesteps(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path)
    _, schedule = load_model(parse(pretrained_model_name_or_path=tmp_path, process="flow"))
    scheduler = PROCESSES["flow"](schedule).scheduler
    assert scheduler.config.num_train_timesteps == 100 and scheduler.config.shift == 1.0


# Transformers


def test_a_new_transformer_starts_from_nothing_but_blocks_that_are_the_identity(tmp_path):
    tiny_transformer().save_config(tmp_path)
    model, _ = load_model(parse(model_config_name_or_path=tmp_path))
    sample, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, NUM_CLASSES])
    seen = {}
    model.pos_embed.register_forward_hook(lambda module, args, output: seen.update(first=output))
    model.norm_out.register_forward_hook(lambda module, args, output: seen.update(last=args[0]))
    assert model(sample, torch.ones(2), class_labels=labels).sample.abs().max() == 0
    assert torch.equal(seen["first"], seen["last"])
    assert model.proj_out_2.weight.std() == 0 < model.transformer_blocks[0].ff.net[0].proj.weight.std()


@pytest.mark.parametrize("label_dropout", [0.0, 0.1])
def test_a_transformer_drops_no_labels_by_itself(tmp_path, label_dropout):
    tiny_transformer().save_pretrained(tmp_path)
    model, _ = load_model(parse(pretrained_model_name_or_path=tmp_path, label_dropout=label_dropout))
    labels = torch.arange(NUM_CLASSES).repeat(200)
    sample, times = torch.ones(len(labels), 3, 8, 8), torch.ones(len(labels))
    outputs = model.train()(sample, times, class_labels=labels).sample.unflatten(0, (200, NUM_CLASSES))
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))
    assert num_classes(model, label_dropout) == NUM_CLASSES
    null = model(sample[:1], times[:1], class_labels=torch.tensor([NUM_CLASSES])).sample
    assert not torch.allclose(null, outputs[0, :1])


def test_a_transformer_of_another_resolution_is_the_same_when_it_is_loaded_again(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model, _ = load_model(parse(pretrained_model_name_or_path=tmp_path, resolution=12))
    model.save_pretrained(tmp_path)
    inputs = {"timestep": torch.ones(1), "class_labels": torch.tensor([1])}
    sample = torch.randn(1, 3, 12, 12)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(sample, **inputs).sample, model.eval()(sample, **inputs).sample)


def test_process_of_a_pretrained_pipeline_is_kept_unless_asked_otherwise(tmp_path):
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


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"resolution": 9}, "`--resolution` must be a multiple of 2"),
        ({"out_channels": 6}, {}, "as many output channels as input channels"),
        ({}, {"process": "cld"}, "`--process` must be vp or flow for a DiTTransformer2DModel, got cld"),
        ({}, {"process": "flow", "prediction_type": "epsilon"}, "`--prediction_type` must be left out"),
        ({}, {"process": "flow", "ddpm_beta_schedule": "linear"}, "`--ddpm_beta_schedule` must be left out"),
    ],
)
def test_transformer_that_does_not_fit_the_arguments_is_an_error(tmp_path, config, arguments, message):
    tiny_transformer(**config).save_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(parse(model_config_name_or_path=tmp_path, **arguments))


def test_a_model_of_another_class_is_an_error(tmp_path):
    VQModel().save_config(tmp_path)
    with pytest.raises(ValueError, match=r"The model must be one of UNet2DModel, .*, got VQModel"):
        load_model(parse(model_config_name_or_path=tmp_path))


def test_label_that_is_the_null_class_is_an_error():
    unet = tiny_unet()
    check_labels([0, 2], num_classes(unet, label_dropout=0.1))
    check_labels([0, 3], num_classes(unet, label_dropout=0.0))
    with pytest.raises(ValueError, match="Labels must be between 0 and 2"):
        check_labels([0, 3], num_classes(unet, label_dropout=0.1))
