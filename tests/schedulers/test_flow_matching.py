"""`GenieScheduler` on flow-matching models, whose path x_t = (1 − σ) x_0 + σ z is another linear diffusion."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.integrate import solve_ivp

from genie_diffusers import GenieScheduler, LinearDiffusion, RectifiedFlow
from genie_diffusers.core.time_grids import TIME_GRIDS

FLOW = {"prediction_type": "flow_prediction"}
STEPS = (80, 160, 320)


# --- the process -----------------------------------------------------------------------------------------------------


class Integrated(RectifiedFlow):
    """The path that follows from drift and diffusion alone, from almost clean data on."""

    initial_covariance = np.array([[1e-12]])
    mean, covariance, root = LinearDiffusion.mean, LinearDiffusion.covariance, LinearDiffusion.root

    def drift(self, timesteps):
        return np.array([[-1.0 / (1000.0 - timesteps)]])

    def diffusion(self, timesteps):
        return np.array([[2.0 * timesteps / 1000.0 / (1000.0 - timesteps)]])


def test_drift_and_diffusion_are_those_of_the_straight_path():
    process, integrated = RectifiedFlow(), Integrated()
    t = np.array([5.0, 300.0, 700.0, 950.0])
    for ours, theirs in ((process.drift, integrated.drift), (process.diffusion, integrated.diffusion)):
        np.testing.assert_allclose(ours(t)[:, 0, 0], [theirs(time)[0, 0] for time in t])
    integrated.timestep_max = 960.0  # the drift is infinite at the end
    np.testing.assert_allclose(integrated.mean(t), process.mean(t), rtol=1e-8)
    np.testing.assert_allclose(integrated.covariance(t), process.covariance(t), rtol=1e-6)


def test_noise_levels_and_their_inverse():
    process = RectifiedFlow()
    t = np.array([1.0, 250.0, 999.0])
    np.testing.assert_allclose(process.sigma(t), t / 1000)
    np.testing.assert_allclose(process.alpha(t), 1 - t / 1000)
    np.testing.assert_allclose(process.timestep(process.log_snr(t)), t)
    difference = (process.log_snr(t + 1e-3) - process.log_snr(t - 1e-3)) / 2e-3
    np.testing.assert_allclose(process.log_snr_derivative(t), difference, rtol=1e-5)
    np.testing.assert_allclose(process.log_snr(process.shifted(t, 3.0)), process.log_snr(t) - math.log(3.0))
    assert (process.sigma(1000.0), process.alpha(1000.0)) == (1.0 - 2.0**-12, 2.0**-12)
    x, z = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = GenieScheduler(**FLOW).scale_noise(x, torch.tensor([250.0, 250.0]), z)
    torch.testing.assert_close(noisy, 0.75 * x + 0.25 * z)


# --- the solver ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solution(mixture, noise):
    """Initial samples at σ = 0.999 and where the ODE takes them at σ = 0.001."""
    start, process = noise(16, 2), RectifiedFlow()

    def velocity(log_snr, flat):
        sigma, alpha = 1 / (1 + math.exp(log_snr)), 1 / (1 + math.exp(-log_snr))
        sample = torch.from_numpy(flat).reshape(start.shape)
        noise_prediction = mixture.noise_prediction(sample, alpha, sigma)
        return (sigma * (sample - noise_prediction)).flatten().numpy()

    ends = float(process.log_snr(999.0)), float(process.log_snr(1.0))
    solved = solve_ivp(velocity, ends, start.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return start, torch.from_numpy(solved.y[:, -1]).reshape(start.shape)


def draw(scheduler, sample, mixture) -> torch.Tensor:
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = float(scheduler.alphas[index]), float(scheduler.noise_stds[index])
        noise = mixture.noise_prediction(sample, alpha, sigma)
        sample = scheduler.step((noise - sample) / alpha, timestep, sample).prev_sample
    return sample


def slope_source(scheduler, mixture):
    """dε/dλ along dx/dλ = σ (x − ε), by forward mode."""

    def source(sample, noise_prediction, timestep, **kwargs):
        log_snr = torch.tensor(float(scheduler.lambdas[scheduler.step_index]), dtype=torch.float64)

        def noise_at(x, log_snr):
            return mixture.noise_prediction(x, torch.sigmoid(log_snr), torch.sigmoid(-log_snr))

        velocity = torch.sigmoid(-log_snr) * (sample - noise_prediction)
        return torch.func.jvp(noise_at, (sample, log_snr), (velocity, torch.ones_like(log_snr)))[1]

    return source


@pytest.mark.parametrize("with_source", [False, True], ids=["values", "slopes"])
@pytest.mark.parametrize(("method", "order"), [("taylor", 2), ("hermite", 3)])
def test_order_of_convergence(mixture, solution, method, order, with_source):
    start, end = solution
    scheduler = GenieScheduler(**FLOW, method=method, time_grid="uniform_lambda", final_sigmas_type="sigma_min")
    if with_source:
        scheduler.attach(slope_source(scheduler, mixture))
    errors = []
    for steps in STEPS:
        log_snrs = np.linspace(-math.log(999), math.log(999), steps + 1)
        scheduler.set_timesteps(timesteps=scheduler.process.timestep(log_snrs[:-1]))
        errors.append(float((draw(scheduler, start, mixture) - end).norm() / end.norm()))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders.mean() > order - 0.25 and orders.min() > order - 0.8 and errors[-1] < 1e-3


def test_few_steps_from_pure_noise_beat_euler(mixture, solution):
    """The straight steps of the scheduler that flow-matching models come with."""
    start, end = solution
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config

    def error(cls, steps, **options):
        scheduler, sample = cls.from_config(config, **options), start
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            sigma = float(timestep) / 1000
            alpha = max(1 - sigma, 2.0**-12)
            noise = mixture.noise_prediction(sample, alpha, sigma)
            sample = scheduler.step((noise - sample) / alpha, timestep, sample).prev_sample
        return float((sample - end).norm() / end.norm())

    assert error(GenieScheduler, 20) < 0.85 * error(FlowMatchEulerDiscreteScheduler, 20)
    on_our_grid = error(GenieScheduler, 40, time_grid="uniform_lambda")
    assert on_our_grid < 0.1 * error(FlowMatchEulerDiscreteScheduler, 40)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_configs_of_flow_matching_schedulers_become_flows_and_survive_the_way_back(cls, tmp_path):
    theirs = cls(shift=3.0)
    ours = GenieScheduler.from_config(theirs.config)
    assert (ours.config.prediction_type, ours.config.flow_shift) == ("flow_prediction", 3.0)
    ours.save_pretrained(tmp_path)
    ours = GenieScheduler.from_pretrained(tmp_path)
    assert isinstance(ours.process, RectifiedFlow)
    ours.set_timesteps(4)
    sigmas = np.linspace(0.001, 1.0, 5)[:0:-1]
    np.testing.assert_allclose(ours.timesteps, 1000 * 3 * sigmas / (1 + 2 * sigmas), rtol=1e-5)
    back = cls.from_config(ours.config)
    public = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert {key: back.config[key] for key in public} == public
    assert GenieScheduler.from_config(back.config).config.flow_shift == 3.0


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_configs_of_solvers_on_flows_keep_their_shift(cls):
    theirs = cls(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    ours = GenieScheduler.from_config(theirs.config)
    assert isinstance(ours.process, RectifiedFlow) and ours.config.flow_shift == 5.0


def test_custom_sigmas_and_mu_give_the_timesteps_of_the_stock_scheduler():
    for options, mu in (({"shift": 3.0}, {}), ({"use_dynamic_shifting": True}, {"mu": 0.8})):
        theirs = FlowMatchEulerDiscreteScheduler(**options)
        ours = GenieScheduler.from_config(theirs.config)
        sigmas = np.linspace(1.0, 0.2, 5).tolist()
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(sigmas=sigmas, **mu)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps)
        # pure noise is 1 − 2⁻¹² here
        torch.testing.assert_close(torch.from_numpy(ours.noise_stds).float(), theirs.sigmas, rtol=0, atol=2.5e-4)


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({"shift": 3.0, "shift_terminal": 0.1}, {}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 0.8}),  # Qwen-Image
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1, "base_shift": 0.95}, {"mu": 1.4}),  # LTX-Video
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1}, {"mu": 1.5}),
    ],
)
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_a_terminal_noise_level_gives_the_timesteps_of_the_stock_scheduler(config, mu, steps):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = GenieScheduler.from_config(theirs.config)
    sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=sigmas, **mu)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(ours.noise_stds).float(), theirs.sigmas, rtol=0, atol=2.5e-4)
    assert ours.noise_stds[-2] == pytest.approx(config["shift_terminal"], rel=1e-12)
    assert GenieScheduler.from_config(ours.config).config.shift_terminal == config["shift_terminal"]


@pytest.mark.parametrize("flag", [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_grids_of_diffusers_end_at_the_terminal_noise_level(flag):
    theirs = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1, **({flag: True} if flag else {}))
    ours = GenieScheduler.from_config(theirs.config)
    for steps in (2, 7):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        # theirs ends at σ = 0.001 before it is stretched, ours a step before that
        tolerance = {"rtol": 1e-5, "atol": 1e-3} if flag else {"rtol": 1e-2, "atol": 0}
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, **tolerance)


def test_configs_of_multistep_solvers_keep_their_terminal_noise_level():
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, shift_terminal=0.1
    )
    ours = GenieScheduler.from_config(theirs.config)
    for steps in (2, 9):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=0, atol=1.0)  # theirs are integers


@pytest.mark.parametrize("time_grid", TIME_GRIDS)
@pytest.mark.parametrize("options", [{}, {"denoising_step": True}, {"final_sigmas_type": "sigma_min"}], ids=str)
def test_every_grid_calls_the_model_at_the_terminal_noise_level_last(time_grid, options):
    scheduler = GenieScheduler(**FLOW, flow_shift=3.0, shift_terminal=0.1, time_grid=time_grid, **options)
    for steps in (2, 3, 10):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and (scheduler.timesteps.diff() < 0).all()
        assert float(scheduler.timesteps[0]) == 1000.0
        assert float(scheduler.timesteps[-1]) == pytest.approx(100.0)
    scheduler.set_timesteps(timesteps=[900.0, 300.0])
    assert scheduler.timesteps.tolist() == [900.0, 300.0]
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]  # where that of diffusers is NaN


def test_ramps_that_mean_a_number_of_calls():
    scheduler = GenieScheduler(**FLOW)
    indices = np.linspace(0, 999, 7).astype(int)  # BRIA's
    for ramp in (np.linspace(1, 1 / 7, 7), torch.linspace(1, 1 / 7, 7).tolist(), 1 - indices / 1000):
        assert scheduler.is_default_ramp(ramp)
    for other in (np.linspace(1, 0.1, 7), np.linspace(1, 1 / 7, 7) ** 2, np.linspace(0.9, 1 / 7, 7)):
        assert not scheduler.is_default_ramp(other)


def test_what_is_not_meant_is_refused():
    dynamic = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    with pytest.raises(ValueError, match="`mu` must be given if `use_dynamic_shifting` is set"):
        dynamic.set_timesteps(4)
    for static in (GenieScheduler(), GenieScheduler(**FLOW)):
        static.set_timesteps(4)
        timesteps = static.timesteps
        static.set_timesteps(4, mu=0.5)  # as pipelines of FLUX pass it whatever the configuration
        assert torch.equal(static.timesteps, timesteps)
    for sigmas in ([1.2, 0.5], [0.5, 0.7], [0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="`sigmas` must strictly decrease and lie between 0 and 1"):
            GenieScheduler(**FLOW).set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="`shift_terminal` must be between 0 and 1, got"):
        GenieScheduler(**FLOW, shift_terminal=1.5).set_timesteps(4)
    for key in ("invert_sigmas", "stochastic_sampling"):
        with pytest.raises(ValueError, match=f"`{key}=True` of `config` is not supported"):
            GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(**{key: True}).config)
