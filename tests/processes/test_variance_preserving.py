import math

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from genie_diffusers import VariancePreserving

ROUGH_BETAS = np.random.default_rng(0).uniform(1e-4, 0.08, 100).tolist()
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "short": {"num_train_timesteps": 20, "beta_end": 0.5},
    "trained_betas": {"trained_betas": ROUGH_BETAS, "num_train_timesteps": 100},
    "linear, zero SNR": {"rescale_betas_zero_snr": True},
    "scaled_linear, zero SNR": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
    "squaredcos_cap_v2, zero SNR": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    "shifted": {"snr_shift_scale": 3.0},
    "scaled_linear, shifted, zero SNR": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "snr_shift_scale": 3.0,
        "rescale_betas_zero_snr": True,
    },
    "continuous": {"continuous": True},
}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02}
DISCRETE = [name for name in SCHEDULES if name != "continuous"]
betas_lists = st.lists(st.floats(1e-5, 0.9), min_size=2, max_size=40)


def process_of(name: str) -> VariancePreserving:
    return VariancePreserving.from_config(SCHEDULES[name])


def inner_timesteps(process: VariancePreserving, count: int = 200) -> np.ndarray:
    """Real timesteps between the integers, away from the ends."""
    low, high = process.timestep_min, process.timestep_max
    return np.sort(np.random.default_rng(1).uniform(low + 0.01 * (high - low), high - 0.001 * (high - low), count))


def product_formula(config: dict) -> list[float]:
    """√ᾱ_t = Π √(1 − β_s) from the definitions of the schedules, in Python floats."""
    count = config.get("num_train_timesteps", 1000)
    first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    fractions = [i / (count - 1) for i in range(count)]

    def cosine(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = {
        "linear": [first + (last - first) * f for f in fractions],
        "scaled_linear": [(first**0.5 + (last**0.5 - first**0.5) * f) ** 2 for f in fractions],
        "squaredcos_cap_v2": [min(1 - cosine((i + 1) / count) / cosine(i / count), 0.999) for i in range(count)],
        "sigmoid": [first + (last - first) / (1 + math.exp(6 - 12 * f)) for f in fractions],
    }[config.get("beta_schedule", "linear")]
    roots, product = [], 1.0
    for beta in config.get("trained_betas", betas):
        product *= 1 - beta
        scale = config.get("snr_shift_scale", 1.0)
        roots.append(math.sqrt(product / (scale + (1 - scale) * product)))
    if config.get("rescale_betas_zero_snr"):  # Lin et al. (2023), Algorithm 1
        roots = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
        roots[-1] = min(2.0**-12, roots[-2] / 4)
    return roots


@pytest.mark.parametrize("name", DISCRETE)
def test_alphas_at_integer_timesteps_are_the_float64_product_of_the_betas(name):
    process, expected = process_of(name), product_formula(SCHEDULES[name])
    np.testing.assert_allclose(process.alpha(np.arange(len(expected))), expected, rtol=1e-10)
    assert process.num_train_timesteps == len(expected)
    assert (process.timestep_min, process.timestep_max) == (0, len(expected) - 1)


@pytest.mark.parametrize("name", DISCRETE)
def test_alphas_at_integer_timesteps_are_those_of_diffusers(name):
    config = SCHEDULES[name]
    # Only the multistep solver keeps the last α of zero terminal SNR above zero; only DDPM knows "sigmoid".
    theirs = DPMSolverMultistepScheduler if config.get("rescale_betas_zero_snr") else DDPMScheduler
    if "snr_shift_scale" in config:
        theirs, config = CogVideoXDDIMScheduler, {"beta_schedule": "linear", **LINEAR, **config}
    alphas_cumprod = theirs(**config).alphas_cumprod.double().numpy()
    ours = process_of(name).alpha(np.arange(len(alphas_cumprod))) ** 2
    np.testing.assert_allclose(ours, alphas_cumprod, rtol=5e-4, atol=3e-7)


@pytest.mark.parametrize("name", [name for name in DISCRETE if "zero SNR" in name])
def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_strictly_above_zero(name):
    plain = VariancePreserving.from_config({**SCHEDULES[name], "rescale_betas_zero_snr": False})
    rescaled = process_of(name)
    last = rescaled.timestep_max
    assert rescaled.alpha(0) == pytest.approx(float(plain.alpha(0)), rel=1e-12)
    # diffusers' own 2⁻¹² is above the α before it in some schedules, which would not decrease.
    assert 0 < rescaled.alpha(last) <= min(2.0**-12, rescaled.alpha(last - 1) / 4) * (1 + 1e-9)


@pytest.mark.parametrize("name", DISCRETE)
def test_one_step_before_the_first_timestep_is_clean_data(name):
    process = process_of(name)
    assert process.alpha(-1) == pytest.approx(1, abs=1e-15)
    assert process.sigma(-1) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_and_gamma_and_log_snr_are_ratios_of_its_parts(name):
    process = process_of(name)
    t = inner_timesteps(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
    np.testing.assert_allclose(process.gamma(t), sigma / alpha, rtol=1e-14)
    np.testing.assert_allclose(process.log_snr(t), np.log(alpha / sigma), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_timestep_inverts_log_snr(name):
    process = process_of(name)
    t = np.concatenate([[process.timestep_min], inner_timesteps(process), [process.timestep_max]])
    np.testing.assert_allclose(process.timestep(process.log_snr(t)), t, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", DISCRETE)
def test_timestep_inverts_log_snr_below_the_first_timestep(name):
    t = np.linspace(-0.99, 0, 12)
    process = process_of(name)
    np.testing.assert_allclose(process.timestep(process.log_snr(t)), t, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_is_minus_the_derivative_of_log_alpha_squared(name):
    process = process_of(name)
    t, h = inner_timesteps(process), 1e-4
    difference = -(np.log(process.alpha(t + h) ** 2) - np.log(process.alpha(t - h) ** 2)) / (2 * h)
    np.testing.assert_allclose(process.beta(t), difference, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("derivative", [1, 2])
def test_derivatives_of_beta_are_those_of_beta(name, derivative):
    process = process_of(name)
    t, h = inner_timesteps(process), 5e-3
    t = t[np.abs(t - np.round(t)) > 2 * h]  # at the timesteps a schedule with jumps has a derivative on each side
    below = derivative - 1
    difference = (process.beta(t + h, below) - process.beta(t - h, below)) / (2 * h)
    exact = process.beta(t, derivative)
    np.testing.assert_allclose(exact, difference, rtol=1e-3, atol=1e-6 * np.abs(exact).max())


def test_derivatives_of_beta_at_a_jump_are_those_on_the_side_of_the_data():
    process, t = process_of("trained_betas"), np.arange(10.0, 90.0)
    for derivative in (1, 2):
        exact, left, right = (process.beta(t + shift, derivative) for shift in (0, -1e-7, 1e-7))
        np.testing.assert_allclose(exact, left, rtol=1e-3, atol=1e-6)
        assert np.max(np.abs(exact - right)) > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_derivative_is_the_derivative_of_log_snr(name):
    process = process_of(name)
    t, h = inner_timesteps(process), 1e-4
    difference = (process.log_snr(t + h) - process.log_snr(t - h)) / (2 * h)
    np.testing.assert_allclose(process.log_snr_derivative(t), difference, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_beta_is_as_smooth_as_the_schedule_up_to_the_first_timestep(name):
    """Between timesteps its slope is that of the discrete betas: −log(1 − β_t) is the integral of β up to t."""
    process, t, h = process_of(name), np.arange(950) + 0.25, 1e-3
    integrals = -2 * np.diff(np.log(process.alpha(np.arange(-1, 951))))
    expected = np.interp(t, np.arange(950), np.diff(integrals))
    slope = (process.beta(t + h) - process.beta(t - h)) / (2 * h)
    np.testing.assert_allclose(slope[:-1], expected[:-1], rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_decreases_strictly_between_the_integers(name):
    process = process_of(name)
    low = -1 if process.is_discrete else process.timestep_min
    fine = np.linspace(low, process.timestep_max, 37 * process.num_train_timesteps)
    assert np.all(np.diff(process.alpha(fine)) < 0)
    assert np.all(process.beta(inner_timesteps(process)) > 0)


@settings(max_examples=150)
@given(betas=betas_lists, zero_snr=st.booleans())
def test_any_betas_give_a_monotone_process_that_is_exact_at_the_integers_and_invertible(betas, zero_snr):
    process = VariancePreserving.from_betas(np.array(betas), rescale_zero_terminal_snr=zero_snr)
    expected = product_formula({"trained_betas": betas, "rescale_betas_zero_snr": zero_snr})
    np.testing.assert_allclose(process.alpha(np.arange(len(betas))), expected, rtol=1e-8)
    fine = np.linspace(-1, len(betas) - 1, 61 * len(betas) + 1)
    alphas = process.alpha(fine)
    assert np.all(np.diff(alphas) <= 1e-15)
    t = fine[fine > -0.9]
    np.testing.assert_allclose(process.alpha(process.timestep(process.log_snr(t))), process.alpha(t), rtol=1e-9)


def test_continuous_process_is_the_integral_of_its_beta_with_network_time_999_tau():
    process = process_of("continuous")
    for tau in (1e-3, 0.05, 0.37, 1.0):
        integral = quad(lambda s: 0.1 + 19.9 * s, 0, tau)[0]
        assert process.alpha(999 * tau) == pytest.approx(math.exp(-integral / 2), rel=1e-12)
        assert process.sigma(999 * tau) == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-10)
        assert process.beta(999 * tau) == pytest.approx((0.1 + 19.9 * tau) / 999, rel=1e-12)
    assert (process.timestep_min, process.timestep_max) == pytest.approx((0.999, 999))


def test_add_noise_is_that_of_diffusers_and_takes_real_timesteps(noise):
    x, z = noise(4, 3, 2, 2), noise(4, 3, 2, 2, seed=1)
    t = torch.tensor([0, 10, 500, 999])
    process = process_of("linear")
    torch.testing.assert_close(process.add_noise(x, z, t), DDPMScheduler().add_noise(x, z, t), rtol=1e-4, atol=1e-4)
    halfway = process.add_noise(x, z, t[:1].double().expand(4) + 0.5)
    torch.testing.assert_close(halfway, float(process.alpha(0.5)) * x + float(process.sigma(0.5)) * z)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"continuous": True, "beta_schedule": "scaled_linear"}, "continuous=True"),
        ({"continuous": True, "rescale_betas_zero_snr": True}, "continuous=True"),
        ({"continuous": True, "snr_shift_scale": 3.0}, "continuous=True"),
        ({"snr_shift_scale": 0.0}, "`snr_shift_scale` must be positive"),
        ({"continuous": True, "trained_betas": ROUGH_BETAS}, "continuous=True"),
        ({"trained_betas": ROUGH_BETAS}, "num_train_timesteps"),
        ({"beta_schedule": "laplace"}, "beta_schedule"),
        ({"beta_end": 1.5}, "betas"),
        ({"beta_start": 0.0}, "betas"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        VariancePreserving.from_config(config)


@pytest.mark.parametrize("alphas", [[0.5, 0.9], [0.9, 0.9], [1.0, 0.5], [0.5, 0.0], [[0.9, 0.5]]])
def test_alphas_that_do_not_decrease_inside_zero_and_one_are_refused(alphas):
    with pytest.raises(ValueError, match="strictly decreasing"):
        VariancePreserving(np.array(alphas))


@pytest.mark.parametrize("name", ["linear", "continuous"])
def test_a_log_snr_below_the_noisiest_timestep_is_refused(name):
    process = process_of(name)
    with pytest.raises(ValueError, match="noisiest timestep"):
        process.timestep(process.log_snr(process.timestep_max) - 0.1)
