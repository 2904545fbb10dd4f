import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genie_diffusers import GenieScheduler
from genie_diffusers.learning.operators import (
    CANDIDATES,
    feature_errors,
    fit_start,
    learning_rates,
    loss_weights,
    state_errors,
)
from genie_diffusers.learning.paths import Noises


class Gaussian(torch.nn.Module):
    """The denoiser of data N(0.7, 0.5²), and labels that mean nothing."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, sample, timestep, class_labels=None):
        alpha, sigma = float(self.process.alpha(float(timestep))), float(self.process.sigma(float(timestep)))
        output = sigma * (sample - 0.7 * alpha) / (alpha**2 * 0.25 + sigma**2)
        return SimpleNamespace(sample=output)


def test_start_is_fitted_exactly_where_the_teacher_is_linear_and_told_decreasing_timesteps(noise):
    process = GenieScheduler().process
    noises = Noises(noise(64, 3, 4, 4), None, None)
    states = torch.stack([0.7 * a + s * noises.noise for a, s in ((0.2, 0.98), (0.7, 0.75), (1.0, 0.5))], dim=1)
    timesteps, weights, missed = fit_start(Gaussian(process), process, noises, states, batch_size=20)
    assert max(missed) < 1e-3
    assert timesteps == sorted(set(timesteps), reverse=True)
    unet = Gaussian(process)
    for m, (tau, (of_noise, of_output)) in enumerate(zip(timesteps, weights, strict=True)):
        found = of_noise * noises.noise + of_output * unet(noises.noise, tau).sample
        torch.testing.assert_close(found, states[:, m], rtol=0, atol=5e-3)


def test_start_tells_the_most_useful_timestep_first_to_the_picture(noise):
    """Of a teacher that knows the answer at three timesteps, in the wrong order for two of them."""
    process, x = GenieScheduler().process, noise(16, 1, 4, 4)
    points = np.linspace(999, 0, CANDIDATES).round()
    first, second = float(points[5]), float(points[20])
    answers = {first: noise(16, 1, 4, 4, seed=1), second: noise(16, 1, 4, 4, seed=2)}

    def unet(sample, timestep, class_labels=None):
        return SimpleNamespace(sample=answers.get(float(timestep), noise(16, 1, 4, 4, seed=9) + float(timestep)))

    noises = Noises(x, None, None)
    states = torch.stack([answers[first] + x, 2 * answers[second] - x], dim=1)
    timesteps, weights, missed = fit_start(unet, process, noises, states, batch_size=16)
    assert timesteps == [first, second] and max(missed) < 1e-6
    np.testing.assert_allclose(weights, [[1, 1], [-1, 2]], atol=1e-6)
    swapped, _, missed = fit_start(unet, process, noises, states.flip(1), batch_size=16)
    assert swapped[1] == first and swapped[0] > first and missed[1] < 1e-6 < missed[0]


def test_weights_of_time_points_are_clamped_square_roots_of_the_signal_to_noise_ratio():
    process = GenieScheduler().process
    weights = loss_weights(process, [800.0, 100.0, -1.0], 1e4)
    assert weights.mean() == pytest.approx(1.0)
    ratio = float(process.alpha(100.0) / process.sigma(100.0))
    assert 1 < ratio < 10
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, ratio, 1e4]))
    assert float(loss_weights(process, [800.0, -1.0], 20.0)[1]) == pytest.approx(2 * 20 / 21)


def test_errors_of_states_are_means_over_everything_but_time():
    a, b = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    b[:, 1], b[0, 2, 0, 0, 0] = 0.5, -2.0
    torch.testing.assert_close(state_errors(a, b, "l1"), torch.tensor([0.0, 0.5, 0.25]))
    torch.testing.assert_close(state_errors(a, b, "l2"), torch.tensor([0.0, 0.25, 0.5]))


def test_errors_of_features_compare_directions_at_each_pixel():
    target = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = target.clone()
    prediction[:, 1] *= 3
    prediction[:, 2] *= -1
    errors = feature_errors(prediction, target, lambda images: [images, images[:, :, ::2, ::2]])
    # opposite unit vectors are 2 apart, in each of the two maps
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.0, 8.0]), rtol=1e-5, atol=1e-5)


def test_learning_rate_falls_at_milestones_after_the_warm_up():
    args = argparse.Namespace(lr_milestones=[6, 8], lr_gamma=0.1, lr_warmup_steps=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = learning_rates(args, optimizer), []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])
