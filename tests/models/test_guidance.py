import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from genie_diffusers.models.guidance import RunCheck, branch_weights, count_branches


@pytest.fixture
def outputs(noise):
    """Outputs of branches that differ by a tenth of their size, as under guidance: (branches, batch, C, H, W)."""

    def build(branches: int, difference: float = 0.1) -> torch.Tensor:
        common = noise(1, 3, 2, 8, 8)
        return common + difference * noise(branches, 3, 2, 8, 8, seed=1)

    return build


def combined(weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    return (weights * outputs).sum(0)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 3.0, 15.0])
@pytest.mark.parametrize("difference", [1.0, 0.1, 1e-3])
def test_weights_of_classifier_free_guidance_are_recovered(outputs, scale, difference):
    parts = outputs(2, difference)
    null, conditional = parts
    weights = branch_weights(parts, null + scale * (conditional - null), check_residual=True)
    assert weights.shape == (2, 3, 1, 1, 1)
    expected = torch.tensor([1 - scale, scale], dtype=torch.float64).reshape(2, 1, 1, 1, 1).expand_as(weights)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6 * (1 + abs(scale)) / difference)


def test_weights_of_three_branches_are_recovered(outputs):
    """Image editing: ε₀ + 1.5 (ε_image − ε₀) + 7 (ε_text − ε_image)."""
    parts = outputs(3)
    text, image, null = parts
    weights = branch_weights(parts, null + 1.5 * (image - null) + 7 * (text - image), check_residual=True)
    expected = torch.tensor([7, 1.5 - 7, 1 - 1.5], dtype=torch.float64).reshape(3, 1, 1, 1, 1).expand_as(weights)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)


def test_each_sample_has_weights_of_its_own(outputs):
    parts = outputs(2)
    scales = torch.tensor([1.0, 2.0, 8.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    weights = branch_weights(parts, parts[0] + scales * (parts[1] - parts[0]), check_residual=True)
    torch.testing.assert_close(weights[1], scales, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_rescale", [0.7, 1.0])
def test_rescaled_guidance_of_diffusers_is_linear_with_a_factor_per_sample(outputs, guidance_rescale):
    parts = outputs(2)
    null, conditional = parts
    guided = null + 7.5 * (conditional - null)
    rescaled = rescale_noise_cfg(guided, conditional, guidance_rescale=guidance_rescale)
    weights = branch_weights(parts, rescaled, check_residual=True)
    factor = (rescaled / guided).mean(dim=(1, 2, 3), keepdim=True)
    assert torch.all((factor - 1).abs() > 0.01)
    torch.testing.assert_close(weights, torch.stack([-6.5 * factor, 7.5 * factor]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_reproduce_the_guided_prediction(outputs, dtype):
    parts = outputs(2).to(dtype)
    guided = parts[0] + 5 * (parts[1] - parts[0])
    weights = branch_weights(parts, guided, check_residual=True)
    assert weights.dtype == dtype
    error = combined(weights.double(), parts.double()) - guided.double()
    assert error.norm() / guided.double().norm() < 0.02


def test_branches_that_agree_still_reproduce_the_guided_prediction(outputs):
    parts = outputs(2, difference=0.0)
    weights = branch_weights(parts, parts[0], check_residual=True)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(combined(weights, parts), parts[0], rtol=1e-5, atol=1e-5)


def test_a_prediction_that_no_weights_produce_is_refused(outputs):
    parts = outputs(2)
    guided = parts[0] + 5 * (parts[1] - parts[0])
    nonlinear = [guided.clamp(-1, 1), guided.sign() * guided.abs() ** 1.2, guided * torch.linspace(1, 1.2, 8)]
    for prediction in nonlinear:
        with pytest.raises(ValueError, match="not a linear combination"):
            branch_weights(parts, prediction, check_residual=True)
        assert torch.isfinite(branch_weights(parts, prediction, check_residual=False)).all()


def test_one_bad_sample_of_a_batch_is_enough(outputs):
    parts = outputs(2)
    guided = parts[0] + 5 * (parts[1] - parts[0])
    guided[1] = guided[1].clamp(-1, 1)
    with pytest.raises(ValueError, match="not a linear combination"):
        branch_weights(parts, guided, check_residual=True)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("extra_channels", [0, 4])
def test_branches_are_counted_in_the_batch_of_the_model(noise, branches, extra_channels):
    sample = noise(2, 3, 4, 4)
    model_input = torch.cat([sample, noise(2, extra_channels, 4, 4, seed=1)], dim=1).repeat(branches, 1, 1, 1)
    assert count_branches(model_input, sample, check_values=True) == branches


def test_branches_in_lower_precision_are_the_sample(noise):
    sample = noise(2, 3, 4, 4)
    assert count_branches(torch.cat([sample, sample]).half(), sample, check_values=True) == 2


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (1, 3, 4, 4), (2, 2, 4, 4), (2, 3, 8, 4)])
def test_a_batch_that_does_not_hold_the_sample_is_refused(noise, shape):
    with pytest.raises(ValueError, match="no batch of branches"):
        count_branches(noise(*shape), noise(2, 3, 4, 4), check_values=False)


def test_every_branch_must_hold_the_sample(noise):
    sample = noise(2, 3, 4, 4)
    for wrong in (torch.cat([sample, sample + 1]), sample.flip(0), sample.repeat_interleave(2, dim=0)):
        with pytest.raises(ValueError, match="another sample"):
            count_branches(wrong, sample, check_values=True)
        count_branches(wrong, sample, check_values=False)


def test_values_are_compared_always_on_the_cpu_and_once_a_run_on_an_accelerator():
    """In whatever direction the timesteps go, and wherever the next run starts."""
    cpu, accelerator = RunCheck(), RunCheck()
    assert [cpu(torch.device("cpu")) for _ in range(3)] == [True] * 3
    for device in ("cuda", "mps", "meta"):
        accelerator.begin()
        assert [accelerator(torch.device(device)) for _ in range(3)] == [True, False, False]
