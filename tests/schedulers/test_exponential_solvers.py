"""RES and ER-SDE: orders of convergence, and the law of what the stochastic one draws."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from genie_diffusers import ERSDEScheduler, GDDIMScheduler, RESScheduler

CONFIG = {"continuous": True, "final_sigmas_type": "sigma_min", "time_grid": "uniform_lambda"}


@pytest.fixture(scope="module")
def exact(mixture, noise):
    """Where the ODE takes 16 samples, by adaptive integration in log γ."""
    process, start = RESScheduler(**CONFIG).process, noise(16, 2)
    ends = [float(process.gamma(t)) for t in (process.timestep_max, process.timestep_min)]

    def velocity(log_gamma, flat):
        gamma = math.exp(log_gamma)
        alpha = 1 / math.sqrt(1 + gamma**2)
        sample = alpha * torch.from_numpy(flat).reshape(start.shape)
        return gamma * mixture.noise_prediction(sample, alpha, gamma * alpha).flatten().numpy()

    first = start.flatten().numpy() * math.sqrt(1 + ends[0] ** 2)
    solution = solve_ivp(velocity, np.log(ends), first, method="DOP853", rtol=1e-12, atol=1e-12)
    return start, torch.from_numpy(solution.y[:, -1]).reshape(start.shape) / math.sqrt(1 + ends[1] ** 2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_res_converges_with_the_order_of_its_name(order, exact, run):
    errors = []
    for count in (80, 160, 320):
        scheduler = RESScheduler(**CONFIG, multistep_order=order)
        scheduler.set_timesteps(count)
        errors.append(float((run(scheduler, exact[0]) - exact[1]).norm()))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.35)


def test_res_of_order_one_is_ddim(run, noise):
    res, ddim = RESScheduler(multistep_order=1), GDDIMScheduler(multistep_order=1)
    for scheduler in (res, ddim):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(run(res, noise(3, 2)), run(ddim, noise(3, 2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scheduler_class", [RESScheduler, ERSDEScheduler])
@pytest.mark.parametrize("flow", [{}, {"prediction_type": "flow_prediction"}], ids=["diffusion", "flow"])
def test_a_single_data_point_is_reached_from_anywhere(scheduler_class, flow, noise):
    scheduler = scheduler_class(**flow)
    scheduler.set_timesteps(6)
    sample, generator = noise(4, 3), torch.Generator().manual_seed(0)
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
        epsilon = (sample - 0.7 * alpha) / sigma
        output = epsilon - 0.7 if flow else epsilon
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    torch.testing.assert_close(sample, torch.full_like(sample, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_er_sde_keeps_the_marginals_of_a_single_data_point(order):
    """With x̂_0 = x_0 every state has the mean α x_0 and the variance σ² of the diffusion, exactly."""
    scheduler = ERSDEScheduler(multistep_order=order)
    scheduler.set_timesteps(8)
    alphas, sigmas = scheduler.table.marginals()
    np.testing.assert_allclose(alphas, scheduler.alphas, rtol=1e-10)
    np.testing.assert_allclose(sigmas, scheduler.noise_stds, rtol=1e-10, atol=1e-12)


def test_er_sde_draws_from_the_data(mixture, run, noise):
    """Mean and covariance of the mixture, within the errors of 4,096 samples."""
    scheduler = ERSDEScheduler(**CONFIG)
    scheduler.set_timesteps(60)
    torch.manual_seed(0)
    drawn = run(scheduler, noise(4096, 2))
    mean = mixture.probabilities @ mixture.means
    offsets = mixture.means - mean
    covariance = offsets.T @ (mixture.probabilities[:, None] * offsets) + mixture.std**2 * torch.eye(2)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.1, atol=0.05)


def test_the_second_order_of_er_sde_is_closer_to_fine_steps_of_the_same_noise(mixture, noise):
    """The mean over the noise, from one start: the drift is what the order improves."""
    ends = {}
    for order, count in ((2, 160), (1, 12), (2, 12)):
        scheduler = ERSDEScheduler(**CONFIG, multistep_order=order)
        scheduler.set_timesteps(count)
        sample = noise(1, 2).repeat(20_000, 1)
        generator = torch.Generator().manual_seed(0)
        for index, timestep in enumerate(scheduler.timesteps):
            output = mixture.noise_prediction(sample, scheduler.alphas[index], scheduler.noise_stds[index])
            sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        ends[order, count] = torch.cat([sample.mean(0), sample.std(0)])
    reference = ends[2, 160]
    assert (ends[2, 12] - reference).norm() < 0.7 * (ends[1, 12] - reference).norm()
