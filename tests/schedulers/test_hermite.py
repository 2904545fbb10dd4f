"""The rule in the place of polynomials in long steps: what it is in short and in long ones, and what it is for."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scipy.integrate import quad

from genie_diffusers import GenieScheduler
from genie_diffusers.schedulers import hermite as module
from genie_diffusers.schedulers.hermite import conditional_integral, hermite, hermite_correction
from genie_diffusers.schedulers.interpolation import exponential_moments, interpolation_weights

#: the latest conditions without and with slopes, at distances in units of the step
CONDITIONS = [
    [("value", 0.0), ("value", -1.0)],
    [("value", 0.0), ("value", -1.0), ("value", -1.8)],
    [("value", 0.0), ("value", -1.0), ("value", -1.8), ("value", -3.0)],
    [("value", 0.0), ("value", 1.0), ("value", -1.0)],
    [("value", 0.0), ("slope", 0.0)],
    [("value", 0.0), ("slope", 0.0), ("value", -1.0)],
    [("value", 0.0), ("slope", 0.0), ("value", 1.0), ("slope", 1.0)],
]
every_condition = pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
every_rate = pytest.mark.parametrize("rate", [1.0, -1.0])


def at(conditions, start: float, step: float):
    return [(what, start + step * place) for what, place in conditions]


def levels(lambdas) -> tuple[np.ndarray, np.ndarray]:
    lambdas = np.asarray(lambdas, dtype=np.float64)
    return 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))


@every_condition
@every_rate
@pytest.mark.parametrize("start", [-6.0, 0.0, 4.0])
def test_short_steps_follow_the_polynomial_through_all_conditions(conditions, rate, start):
    step = 0.01
    weights = conditional_integral(at(conditions, start, step), start, start + step, rate)
    nodes, derivatives = [step * place for _, place in conditions], [int(what == "slope") for what, _ in conditions]
    expected = interpolation_weights(nodes, derivatives, exponential_moments(step, len(nodes), rate))
    scale = np.where(derivatives, step, 1.0)  # a slope weighs as much as the change that it makes
    np.testing.assert_allclose(weights / scale, expected / scale, rtol=0.05, atol=0.02 * step)


@every_condition
@every_rate
def test_the_error_of_a_step_has_the_order_of_the_conditions(conditions, rate):
    """One more than that of the run: each condition is worth one power of the step."""

    def function(point):
        return math.sin(1.3 * point + 0.4)

    def error(step):
        start, given = -0.3, at(conditions, -0.3, step)
        values = [1.3 * math.cos(1.3 * p + 0.4) if what == "slope" else function(p) for what, p in given]
        kernel = lambda point: math.exp(rate * (point - start)) * function(point)  # noqa: E731
        exact = quad(kernel, start, start + step, epsabs=1e-15, epsrel=1e-14)[0]
        return abs(conditional_integral(given, start, start + step, rate) @ values - exact)

    order = np.log2(error(0.16) / error(0.08))
    assert order > len(conditions) + 0.6


@every_rate
def test_a_constant_is_integrated_exactly(rate):
    for step in (0.01, 1.0, 6.0, -2.0):
        weights = conditional_integral([("value", -1.0), ("value", -2.0), ("slope", -2.0)], -1.0, -1.0 + step, rate)
        assert weights[:2].sum() == pytest.approx(math.expm1(rate * step) / rate, rel=1e-12)


@every_rate
def test_the_way_back_is_the_negative_of_the_way(rate):
    conditions = [("value", 0.2), ("value", -1.0), ("value", -1.7), ("slope", 0.2)]
    forth = conditional_integral(conditions, 0.2, 1.4, rate)
    back = conditional_integral(conditions, 1.4, 0.2, rate)
    np.testing.assert_allclose(forth, -math.exp(rate * 1.2) * back, rtol=1e-8)


def test_a_slope_is_the_limit_of_two_values():
    slope = conditional_integral([("value", 0.0), ("slope", 0.0), ("value", -1.0)], 0.0, 1.0, 1.0)
    apart = 1e-3
    values = conditional_integral([("value", 0.0), ("value", -apart), ("value", -1.0)], 0.0, 1.0, 1.0)
    np.testing.assert_allclose(values[1], -slope[1] / apart, rtol=0.01)
    np.testing.assert_allclose(values[2], slope[2], rtol=0.01, atol=1e-3)


def test_long_steps_extrapolate_less_than_polynomials():
    for step, share in ((0.5, 0.95), (2.0, 0.6), (8.0, 0.1)):
        weight = conditional_integral([("value", 0.0), ("value", -step)], 0.0, step, 1.0)[1]
        polynomial = interpolation_weights([0, -step], [0, 0], exponential_moments(step, 2, 1.0))[1]
        assert 0 < weight / polynomial < share


def test_weights_change_smoothly_with_the_lengths_of_the_steps():
    """No length at which another rule begins: weights of lengths half as far apart differ half as much."""

    def weights(step, start):
        given = [("value", start - step * place) for place in (0, 1, 2, 3)]
        return conditional_integral(given, start, start + step, 1.0) / math.expm1(step)

    for start in (-5.0, -2.5, 0.0, 2.0):
        for step in np.linspace(0.2, 4.0, 39):
            near, far = (np.abs(weights(step * (1 + x), start) - weights(step, start)).max() for x in (0.001, 0.002))
            assert far < 0.02
            assert far == pytest.approx(2 * near, rel=0.05)


def test_the_last_step_is_the_data_prediction_and_the_first_one_has_no_correction():
    alphas, sigmas = levels([-5.0, -1.0, 2.0, 5.0])
    ends = np.append(alphas[:-1], 1.0), np.append(sigmas[:-1], 0.0)
    assert hermite(ends, 2, 3, order=4) == {("data", 0): 1.0}
    assert hermite_correction((alphas, sigmas), 0, 1, order=4) == {}
    assert hermite((alphas, sigmas), 0, 1, order=4).keys() == {("sample", 0), ("data", 0)}


@pytest.mark.parametrize("slopes", [False, True])
def test_a_correction_takes_back_what_the_predictor_added(slopes):
    """For a constant data prediction both are exact, so that their difference weighs values with a sum of zero."""
    correction = hermite_correction(levels([-3.0, -1.5, 0.1, 1.2, 2.0]), 3, 4, order=4, slopes=slopes)
    assert sum(weight for (what, _), weight in correction.items() if what == "data") == pytest.approx(0, abs=1e-12)
    assert correction["data", 0] > 0


# --- what the rule is for -----------------------------------------------------------------------------------------

CALLS = range(6, 31)
PEERS = [
    (DPMSolverMultistepScheduler, 2),
    (DPMSolverMultistepScheduler, 3),
    (UniPCMultistepScheduler, 2),
    (UniPCMultistepScheduler, 3),
]


@pytest.fixture(scope="module")
def ends(run, noise):
    """Where noises of the plane end with `calls` calls of a scheduler on a grid, or of a peer of diffusers on it."""

    def ends(calls: int, peer=None, **config) -> torch.Tensor:
        scheduler = GenieScheduler(**config)
        scheduler.set_timesteps(calls)
        if peer is not None:
            cls, order = peer
            other = cls(solver_order=order)
            other.set_timesteps(calls)
            other.timesteps, other.sigmas = scheduler.timesteps, scheduler.sigmas.float()
            scheduler = other
        return run(scheduler, noise(128, 2)).double()

    return ends


@pytest.fixture(scope="module")
def error_of(ends):
    end = ends(600, time_grid="uniform_lambda", denoising_step=True)

    def error_of(calls: int, peer=None, **config) -> float:
        return float(((ends(calls, peer, **config) - end).norm(dim=1) / end.norm(dim=1)).mean())

    return error_of


def test_errors_do_not_jump_up_with_one_call_more(error_of):
    """On the mixture in the plane; limits on the length of a step made them 1.4 times as large from 12 to 13 calls."""
    errors = np.array([error_of(calls, time_grid="uniform_lambda") for calls in CALLS])
    assert np.all(errors[1:] < 1.1 * errors[:-1])
    assert errors[-1] < errors[0] / 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers hands tensors to numpy
@pytest.mark.parametrize("calls, share", [(8, 0.8), (10, 0.8), (15, 0.9), (20, 0.7)])
def test_share_of_the_error_of_the_best_solver_of_diffusers(error_of, calls, share):
    """Without a slope, each solver on the better one of two grids."""
    grids = [{"time_grid": name} for name in ("uniform_lambda", "quadratic")]
    theirs = min(error_of(calls, peer, **grid) for peer in PEERS for grid in grids)
    assert min(error_of(calls, **grid) for grid in grids) < share * theirs


def test_what_is_known_near_pure_noise_counts_for_less(monkeypatch):
    """There the data prediction is wrong by the network's error over α: the change from it is not extrapolated."""
    conditions = [("value", -4.0), ("value", -6.0)]
    with_error = conditional_integral(conditions, -4.0, -2.0, 1.0)[1]
    monkeypatch.setattr(module, "NETWORK_ERROR", 0.0)
    without = conditional_integral(conditions, -4.0, -2.0, 1.0)[1]
    assert 0 < with_error / without < 0.5
