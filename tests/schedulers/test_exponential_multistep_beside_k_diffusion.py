"""LMS and iPNDM of diffusers, whose samples are x/α or whose path is its own, are ours to rounding."""

import numpy as np
import pytest
import torch
from diffusers import IPNDMScheduler, LMSDiscreteScheduler

from genie_diffusers import ExponentialMultistepScheduler
from genie_diffusers.core import Parametrisation, run
from genie_diffusers.core.solvers.adams_bashforth import ipndm
from genie_diffusers.core.table import Levels, build

# diffusers hands tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("steps", [4, 10, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_pictures_are_those_of_the_linear_multistep_method_of_diffusers(order, prediction_type, steps, mixture, noise):
    config = {"beta_schedule": "scaled_linear", "prediction_type": prediction_type, "timestep_spacing": "leading"}
    peer = LMSDiscreteScheduler(**config)
    ours = ExponentialMultistepScheduler.from_config(peer.config, solver=f"lms_{order}")
    peer.set_timesteps(steps)
    ours.set_timesteps(timesteps=peer.timesteps.tolist())
    np.testing.assert_allclose(peer.sigmas, ours.levels.gammas, rtol=2e-4)
    peer.sigmas = torch.from_numpy(ours.levels.gammas.copy())  # without its rounding to float32
    conversion, sample = Parametrisation(prediction_type), noise(3, 2)
    scaled = sample / ours.alphas[0]
    for index, timestep in enumerate(ours.timesteps):
        alpha, sigma = ours.alphas[index], ours.noise_stds[index]
        for scheduler in (ours, peer):
            at = sample if scheduler is ours else peer.scale_model_input(scaled, timestep)
            output = conversion.output(mixture.noise_prediction(at, alpha, sigma), at, alpha, sigma)
            if scheduler is ours:
                sample = ours.step(output, timestep, sample).prev_sample
            else:
                scaled = peer.step(output, timestep, scaled, order=order).prev_sample
    torch.testing.assert_close(sample, scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_the_rows_of_ipndm_are_those_of_diffusers(steps, noise):
    """On its own α and σ, of which no other scheduler has the path, and after the start, where its α is zero."""
    peer = IPNDMScheduler()
    peer.set_timesteps(steps + 1)
    alphas, sigmas = (values[1:].double().numpy() for values in (peer.alphas, peer.betas))
    peer.set_begin_index(1)
    peer.alphas, peer.betas = (torch.from_numpy(np.append(0.0, values)) for values in (alphas, sigmas))
    levels = Levels(np.arange(steps, 0, -1), alphas, sigmas)

    def model(sample, index):
        return torch.tanh(sample) + 0.1 * np.cos(index)

    start = noise(3, 2)
    sample, indices = start, iter(range(steps))
    for index in range(steps):
        sample = peer.step(model(sample, index), peer.timesteps[index + 1], sample).prev_sample

    def prediction(sample, timestep):
        index = next(indices)
        return sigmas[index] * sample + alphas[index] * model(sample, index)

    found = run(build(levels, ipndm), prediction, start)
    torch.testing.assert_close(found, sample, rtol=1e-9, atol=1e-9)
