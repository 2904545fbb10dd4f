"""Path and prediction are two choices: every solver samples flow-matching models, and draws one picture there."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genie_diffusers import (
    ExponentialMultistepScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    QuasiTaylorScheduler,
    RectifiedFlow,
    VariancePreserving,
)
from genie_diffusers.core import Parametrisation
from genie_diffusers.core.parametrisation import PREDICTION_TYPES

SOLVERS = {
    "hermite": (GenieScheduler, {}),
    "taylor": (GenieScheduler, {"method": "taylor"}),
    "gDDIM": (GDDIMScheduler, {"multistep_order": 3}),
    "gDDIM with corrector": (GDDIMScheduler, {"multistep_order": 2, "corrector": True}),
    "gDDIM, stochastic": (GDDIMScheduler, {"multistep_order": 1, "eta": 1.0}),
    **{name: (ExponentialMultistepScheduler, {"solver": name}) for name in ("unipc_3", "deis_3", "lms_4", "er_sde_3")},
    "RES-3M, stochastic": (ExponentialMultistepScheduler, {"solver": "res_3m", "eta": 0.7}),
    # where it adds noise is a matter of timesteps
    "SA-Solver": (ExponentialMultistepScheduler, {"solver": "sa_solver_3", "eta": 0.0}),
}
FLOW = {"prediction_type": "flow_prediction"}


def draw(scheduler, start, mixture, prediction_type=None):
    """From x̄ = x/α at the noisiest point, with the exact denoiser in the scheduler's own parametrisation."""
    parametrisation = Parametrisation(prediction_type or scheduler.config.prediction_type)
    generator, sample = torch.Generator().manual_seed(0), scheduler.alphas[0] * start
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.table.model_level(index)
        noise = mixture.noise_prediction(sample, alpha, sigma)
        output = parametrisation.output(noise, sample, alpha, sigma)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    return sample


@pytest.fixture
def start(noise):
    return 40.0 * noise(6, 2)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_network_as_a_model_of_noise_and_as_a_model_of_flows_draws_one_picture(name, mixture, start):
    """x̄ = x/α follows the same equation on every path; only the names of the noise levels differ."""
    solver, options = SOLVERS[name]
    diffusion = solver(continuous=True, **options)
    diffusion.set_timesteps(timesteps=diffusion.process.timestep(-np.log(np.geomspace(40.0, 0.05, 9))))
    flow = solver(num_train_timesteps=100_000, **FLOW, **options)  # so fine that rounding of times does not matter
    flow.set_timesteps(timesteps=flow.process.timestep(diffusion.lambdas[:-1]))
    assert isinstance(flow.process, RectifiedFlow) and isinstance(diffusion.process, VariancePreserving)
    np.testing.assert_allclose(flow.sigmas, diffusion.sigmas, rtol=1e-9)
    torch.testing.assert_close(draw(flow, start, mixture), draw(diffusion, start, mixture), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("use_flow_sigmas", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_prediction_is_served_on_every_path(name, use_flow_sigmas, prediction_type, mixture, start):
    solver, options = SOLVERS[name]
    ends = []
    for kind in (prediction_type, "epsilon"):
        scheduler = solver(
            prediction_type=kind, use_flow_sigmas=use_flow_sigmas, time_grid="uniform_lambda", **options
        )
        scheduler.set_timesteps(8)
        ends.append(draw(scheduler, start, mixture))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("taylor_order", [1, 2, 3])
def test_quasi_taylor_steps_on_a_flow_depart_from_their_limit_as_the_order_and_one(method, taylor_order):
    scheduler = QuasiTaylorScheduler(method=method, taylor_order=taylor_order, **FLOW)
    largest = []
    for step in (40.0, 20.0, 10.0):
        scheduler.set_timesteps(timesteps=[500.0, 500.0 - step])
        largest.append(scheduler.departures[0])
    # a standard deviation is a root, which takes half an order away
    expected = taylor_order + (1 if method == "ode" else 0.5)
    np.testing.assert_allclose(np.log2(np.divide(largest[:-1], largest[1:])), expected, atol=0.3)


def test_the_quasi_taylor_ode_converges_on_a_flow(mixture, start):
    reference = GenieScheduler(**FLOW, time_grid="uniform_lambda", final_sigmas_type="sigma_min")
    reference.set_timesteps(400)
    errors, exact = [], draw(reference, start / 100, mixture)
    for count in (100, 200, 400):
        scheduler = QuasiTaylorScheduler(**FLOW, time_grid="uniform_lambda", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(count)
        errors.append(float((draw(scheduler, start / 100, mixture) - exact).norm()))
    # the ideal derivatives are those of a single point, so that the order is that of DDIM
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.25)


def test_a_single_data_point_is_sampled_exactly_on_a_flow(noise):
    scheduler = QuasiTaylorScheduler(taylor_order=3, **FLOW)
    scheduler.set_timesteps(50)
    sample = noise(4, 3)
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
        epsilon = (sample - 0.7 * alpha) / sigma
        sample = scheduler.step(epsilon - 0.7, timestep, sample).prev_sample
    torch.testing.assert_close(sample, torch.full_like(sample, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_tables_of_a_flow_are_learned_samplers_too(eta, mixture, start):
    origin = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = GGDMScheduler.from_ddim(origin, 6, eta)
    origin.set_timesteps(6)
    scheduler.set_timesteps(6)
    torch.testing.assert_close(scheduler.timesteps, origin.timesteps)
    np.testing.assert_allclose(scheduler.marginals()[1], scheduler.noise_stds, rtol=1e-9, atol=1e-12)
    solver = GenieScheduler.from_config(origin.config)
    learned = GGDMScheduler.from_scheduler(solver, 6)
    ends = []
    for either in (solver, learned):
        either.set_timesteps(6)
        ends.append(draw(either, start, mixture))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_euler_of_diffusers_is_ddim_on_a_flow(noise):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = ExponentialMultistepScheduler.from_config(theirs.config, solver="ddim")
    theirs.set_timesteps(8)
    ours.set_timesteps(timesteps=theirs.timesteps)
    ends = []
    for scheduler in (theirs, ours):
        sample = noise(3, 4).float()
        for timestep in scheduler.timesteps:
            output = torch.sin(2 * sample + float(timestep) / 300)
            sample = scheduler.step(output, timestep, sample).prev_sample
        ends.append(sample)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=2e-3)  # pure noise is α = 2⁻¹² here, and 0 there


def test_the_path_of_a_configuration_is_that_of_its_keys():
    assert GenieScheduler(prediction_type="flow_prediction")._process_class() is RectifiedFlow
    assert (
        GenieScheduler(prediction_type="flow_prediction", use_flow_sigmas=False)._process_class() is not RectifiedFlow
    )
    assert GDDIMScheduler(use_flow_sigmas=True)._process_class() is RectifiedFlow
    from_euler = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert from_euler.config.use_flow_sigmas and from_euler.config.flow_shift == 3.0
    assert not GenieScheduler.from_config(DDIMScheduler().config).config.use_flow_sigmas


def test_an_override_of_the_shift_counts():
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    assert GenieScheduler.from_config(config, shift=7.0).config.flow_shift == 7.0
    assert GenieScheduler.from_config(config, flow_shift=5.0).config.flow_shift == 5.0


@pytest.mark.parametrize("key", ["shift", "flow_shift"])
@pytest.mark.parametrize("generations", [0, 1, 2])
def test_an_override_of_the_shift_counts_on_the_way_back_too(key, generations):
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    for _ in range(generations):
        config = GenieScheduler.from_config(config).config
    config = GenieScheduler.from_config(config, **{key: 5.0}).config
    assert config.flow_shift == 5.0
    assert FlowMatchEulerDiscreteScheduler.from_config(config).config.shift == 5.0


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_is_positive(shift):
    with pytest.raises(ValueError, match="`flow_shift` must be positive"):
        GenieScheduler(**FLOW, flow_shift=shift).set_timesteps(3)


def test_the_velocity_of_flows_is_that_of_the_path(noise):
    scheduler = GenieScheduler(**FLOW)
    data, z, timesteps = noise(3, 4), noise(3, 4, seed=1), torch.tensor([200.0, 500.0, 900.0])
    torch.testing.assert_close(scheduler.get_velocity(data, z, timesteps), z - data)
    added = scheduler.add_noise(data, z, timesteps)
    share = (timesteps / 1000).double()[:, None]
    torch.testing.assert_close(added, (1 - share) * data + share * z)


def test_encoders_of_flows_go_the_way_back(mixture, noise):
    encoder = GenieInverseScheduler(**FLOW, time_grid="uniform_lambda", final_sigmas_type="sigma_min")
    decoder, data = GenieScheduler.from_config(encoder.config), noise(4, 2)
    encoder.set_timesteps(40)
    decoder.set_timesteps(40)
    encoded = draw(encoder, data / encoder.alphas[0], mixture)
    torch.testing.assert_close(draw(decoder, encoded / decoder.alphas[0], mixture), data, rtol=0.05, atol=0.05)
