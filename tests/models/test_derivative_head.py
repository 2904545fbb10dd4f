import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from genie_diffusers import DerivativeHead, GenieScheduler, GenieUNet2DModel, VariancePreserving
from genie_diffusers.models.derivative_head import fingerprint


@pytest.fixture
def head(unet):
    """Builds a float64 head for a UNet, with random weights in the last layer too."""

    def build(model=None, **scheduler_config) -> DerivativeHead:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            head = DerivativeHead.for_unet(model or unet(), scheduler_config, width=16).double()
            torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        return head

    return build


@pytest.fixture
def inputs(noise):
    """Sample, noise prediction, features and time embedding for the head of the tiny UNet."""
    return noise(2, 2, 8, 8), noise(2, 2, 8, 8, seed=1), noise(2, 8, 8, 8, seed=2), noise(2, 32, seed=3)


def test_three_outputs_are_mixed_as_k1_minus_sigma2_k2_minus_alpha2_k3(head, inputs):
    head = head()
    torch.nn.init.zeros_(head.conv_out.weight)
    with torch.no_grad():
        head.conv_out.bias.copy_(torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0]))  # (k₁, k₂, k₃) × two channels
        slope = head(*inputs, alpha=0.8, sigma=0.6)
    expected = torch.tensor([2 - 0.36 * 5 - 0.64 * 11, 3 - 0.36 * 7 - 0.64 * 13], dtype=torch.float64)
    torch.testing.assert_close(slope, expected.reshape(1, 2, 1, 1).expand(2, 2, 8, 8))


def test_the_mixture_is_that_of_the_paper(head, inputs):
    """dε/dγ = −k₁/γ + γ/(1 + γ²) k₂ + k₃/(γ (1 + γ²)), and dε/dλ = −γ dε/dγ."""
    head, gamma = head(), 0.7
    alpha, sigma = 1 / (1 + gamma**2) ** 0.5, gamma / (1 + gamma**2) ** 0.5
    with torch.no_grad():
        k_1 = head(*inputs, alpha=0.0, sigma=0.0)
        k_2, k_3 = k_1 - head(*inputs, alpha=0.0, sigma=1.0), k_1 - head(*inputs, alpha=1.0, sigma=0.0)
        slope = head(*inputs, alpha=alpha, sigma=sigma)
    in_gamma = -k_1 / gamma + gamma / (1 + gamma**2) * k_2 + k_3 / (gamma * (1 + gamma**2))
    torch.testing.assert_close(slope, -gamma * in_gamma)


def test_noise_levels_may_differ_within_a_batch(head, inputs):
    head = head()
    alpha, sigma = torch.tensor([0.8, 0.28]).double(), torch.tensor([0.6, 0.96]).double()
    with torch.no_grad():
        together = head(*inputs, alpha.reshape(2, 1, 1, 1), sigma.reshape(2, 1, 1, 1))
        for i in range(2):
            alone = head(*(tensor[i : i + 1] for tensor in inputs), float(alpha[i]), float(sigma[i]))
            torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("position", range(4), ids=["sample", "noise prediction", "features", "time embedding"])
def test_every_input_matters(head, inputs, position):
    head, changed = head(), list(inputs)
    changed[position] = changed[position] + 1.0 * torch.linspace(0, 1, changed[position].shape[-1]).double()
    with torch.no_grad():
        assert not torch.allclose(head(*changed, 0.8, 0.6), head(*inputs, 0.8, 0.6), atol=1e-4)


def test_a_new_head_predicts_zero(unet, inputs):
    head = DerivativeHead.for_unet(unet()).double()
    assert torch.equal(head(*inputs, 0.8, 0.6), torch.zeros(2, 2, 8, 8, dtype=torch.float64))


def test_it_is_saved_and_loaded_without_its_unet(head, inputs, tmp_path):
    saved = head(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    saved.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == saved.state_dict().keys()
    loaded = DerivativeHead.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert loaded.config.process == {"beta_schedule": "scaled_linear", "beta_end": 0.012}
    assert loaded.config.prediction_type == "v_prediction"
    assert loaded.config.fingerprint == saved.config.fingerprint
    with torch.no_grad():
        assert torch.equal(loaded(*inputs, 0.8, 0.6), saved(*inputs, 0.8, 0.6))


def test_its_configuration_is_plain_json_of_all_that_the_schedule_depends_on(unet):
    config = GenieScheduler(beta_end=0.03, num_train_timesteps=500, continuous=True, time_grid="quadratic").config
    head = DerivativeHead.for_unet(unet(), config)
    process = json.loads(head.to_json_string())["process"]
    assert process == {
        "num_train_timesteps": 500,
        "beta_start": 0.0001,
        "beta_end": 0.03,
        "beta_schedule": "linear",
        "rescale_betas_zero_snr": False,
        "snr_shift_scale": 1.0,
        "continuous": True,
    }
    head.check_process(VariancePreserving.from_config(config), "epsilon")


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({}, 2),
        ({"block_out_channels": (16, 16)}, 2),
        ({"in_channels": 3, "out_channels": 3}, 3),
        ({"in_channels": 5}, 2),
        ({"out_channels": 4}, 2),
    ],
    ids=["", "wider", "three channels", "with a mask", "with variances"],
)
def test_it_fits_the_unet_it_is_made_for_and_has_the_channels_of_the_sample(unet, head, config, channels):
    model = unet(**config)
    head(model).check_fits(model)
    assert head(model).config.in_channels == channels


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"in_channels": 3, "out_channels": 3}, "in_channels 2, this one has 3"),
        ({"block_out_channels": (16, 16)}, "feature_channels 8, this one has 16"),
        ({"time_embedding_dim": 24}, "time_embedding_dim 32, this one has 24"),
    ],
)
def test_a_unet_it_cannot_read_is_refused_with_the_reason(unet, head, config, reason):
    with pytest.raises(ValueError, match=reason):
        head().check_fits(unet(**config))
    with pytest.raises(ValueError, match=reason):
        GenieUNet2DModel.from_unet(unet(**config), head())


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_end": 0.0201},
        {"num_train_timesteps": 500},
        {"rescale_betas_zero_snr": True},
        {"continuous": True},
    ],
    ids=str,
)
def test_another_noise_schedule_is_refused(head, config):
    process = VariancePreserving.from_config(config)
    with pytest.raises(ValueError, match="another noise schedule"):
        head().check_process(process, "epsilon")
    head(**config).check_process(process, "epsilon")


def test_the_same_noise_schedule_in_other_words_is_accepted(head):
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64).tolist()
    head().check_process(VariancePreserving.from_config({"trained_betas": betas}), "epsilon")


def test_another_prediction_type_is_refused(head):
    process = VariancePreserving.from_config({})
    with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*'v_prediction'"):
        head().check_process(process, "v_prediction")
    head(prediction_type="v_prediction").check_process(process, "v_prediction")


def warnings_about_weights(caplog, head, model) -> int:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        head.check_fits(model)
    return sum("other weights" in record.message for record in caplog.records)


def test_other_weights_warn(unet, head, caplog):
    assert warnings_about_weights(caplog, head(unet()), unet(seed=1)) == 1


def test_weights_that_training_moved_by_a_tenth_warn(unet, head, noise, caplog):
    model = unet()
    tuned = head(model)
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight += 0.1 * weight.norm() / weight.numel() ** 0.5 * noise(*weight.shape, seed=seed)
    assert warnings_about_weights(caplog, tuned, model) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_same_weights_in_any_precision_do_not_warn(unet, head, caplog, dtype):
    assert warnings_about_weights(caplog, head(unet()), unet().to(dtype)) == 0


def test_a_head_that_notes_no_weights_does_not_warn(unet, caplog):
    head = DerivativeHead(in_channels=2, feature_channels=8, time_embedding_dim=32)
    assert warnings_about_weights(caplog, head, unet()) == 0


def test_the_fingerprint_is_that_of_the_unet_with_or_without_a_head(unet, head):
    model = unet()
    plain = fingerprint(model)
    assert len(plain) == 8
    assert fingerprint(GenieUNet2DModel.from_unet(model, head(model))) == plain
