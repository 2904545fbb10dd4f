"""The analytic multistep solvers: orders of convergence on a problem with a known answer, and what they reduce to."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from genie_diffusers.core import run
from genie_diffusers.core.solvers.adams_bashforth import gradient_estimation, ipndm, lms
from genie_diffusers.core.solvers.ddim import ddim
from genie_diffusers.core.solvers.deis import deis
from genie_diffusers.core.solvers.dpmpp import dpmpp
from genie_diffusers.core.solvers.er_sde import er_sde, noise_scale
from genie_diffusers.core.solvers.res import res
from genie_diffusers.core.solvers.sa_solver import sa_solver, sa_solver_correction
from genie_diffusers.core.solvers.unipc import unipc, unipc_correction
from genie_diffusers.core.table import Levels, Table, build

#: γ where runs begin and end
BEGIN, END = 8.0, 0.25
STEPS = (80, 160)


def levels_of(gammas, path: str) -> Levels:
    """Noise levels on the variance-preserving path or that of flows; the mixture is told α and σ, not timesteps."""
    alphas = 1 / np.sqrt(1 + gammas**2) if path == "vp" else 1 / (1 + gammas)
    return Levels(np.arange(len(gammas) - 1, 0, -1), alphas, gammas * alphas)


def cubic(steps: int) -> np.ndarray:
    """
    Even neither in γ nor in λ, after three steps of the square of the others' length.

    In these, a multistep method knows less than its order needs, and they would be what is measured.
    """
    first = BEGIN * np.exp(-np.arange(3) / steps**2)
    return np.append(first, np.linspace((first[-1] ** 2 / first[-2]) ** (1 / 3), END ** (1 / 3), steps - 2) ** 3)


def noise_of_sde(tau: float):
    """d log of what multiplies x̄ − D, in log γ: dx̄ = (1 + τ²)(x̄ − D) d log γ without the noise."""
    return lambda log_gamma: 1 + tau**2


def noise_of_er_sde(log_gamma: float) -> float:
    """d log φ / d log γ."""
    step = 1e-5
    return float(np.diff(np.log(noise_scale(np.exp(log_gamma + np.array([-step, step])))))[0] / (2 * step))


#: name → row, correction, options, order, and the rate of the drift; the order is what is measured on every grid
SOLVERS = {
    "ddim": (ddim, None, {}, 1, noise_of_sde(0)),
    "ddim, η = 1": (ddim, None, {"eta": 1.0}, 1, noise_of_sde(1)),
    "dpmpp_2m": (dpmpp, None, {"order": 2}, 2, noise_of_sde(0)),
    "dpmpp_2m_heun": (dpmpp, None, {"order": 2, "variant": "heun"}, 2, noise_of_sde(0)),
    "dpmpp_3m": (dpmpp, None, {"order": 3}, 2, noise_of_sde(0)),  # as published, see `dpmpp_third_weights`
    "dpmpp_2m_sde": (dpmpp, None, {"order": 2, "tau": 1.0}, 2, noise_of_sde(1)),
    "dpmpp_3m_sde": (dpmpp, None, {"order": 3, "tau": 1.0}, 2, noise_of_sde(1)),
    "unip_2": (unipc, None, {"order": 2}, 2, noise_of_sde(0)),
    "unip_2_bh1": (unipc, None, {"order": 2, "variant": "bh1"}, 2, noise_of_sde(0)),
    "unip_3": (unipc, None, {"order": 3}, 3, noise_of_sde(0)),
    "unipc_1": (unipc, unipc_correction, {"order": 1}, 2, noise_of_sde(0)),
    "unipc_1_bh1": (unipc, unipc_correction, {"order": 1, "variant": "bh1"}, 2, noise_of_sde(0)),
    "unipc_2": (unipc, unipc_correction, {"order": 2}, 3, noise_of_sde(0)),
    "unipc_2_bh1": (unipc, unipc_correction, {"order": 2, "variant": "bh1"}, 3, noise_of_sde(0)),
    "unipc_3": (unipc, unipc_correction, {"order": 3}, 4, noise_of_sde(0)),
    "unipc_3_bh1": (unipc, unipc_correction, {"order": 3, "variant": "bh1"}, 4, noise_of_sde(0)),
    "deis_2": (deis, None, {"order": 2}, 2, noise_of_sde(0)),
    "deis_3": (deis, None, {"order": 3}, 3, noise_of_sde(0)),
    "ipndm_2": (ipndm, None, {"order": 2}, 2, noise_of_sde(0)),
    "ipndm_3": (ipndm, None, {"order": 3}, 2, noise_of_sde(0)),
    "ipndm_4": (ipndm, None, {"order": 4}, 2, noise_of_sde(0)),
    "lms_2": (lms, None, {"order": 2}, 2, noise_of_sde(0)),
    "lms_3": (lms, None, {"order": 3}, 3, noise_of_sde(0)),
    "lms_4": (lms, None, {"order": 4}, 4, noise_of_sde(0)),
    "res_2m": (res, None, {"order": 2}, 2, noise_of_sde(0)),
    "res_3m": (res, None, {"order": 3}, 3, noise_of_sde(0)),
    "res_2m, η = 0.7": (res, None, {"order": 2, "tau": 0.7}, 2, noise_of_sde(0.7)),
    "res_3m, η = 0.7": (res, None, {"order": 3, "tau": 0.7}, 3, noise_of_sde(0.7)),
    "er_sde_1": (er_sde, None, {"order": 1}, 1, noise_of_er_sde),
    "er_sde_2": (er_sde, None, {"order": 2}, 2, noise_of_er_sde),
    "er_sde_3": (er_sde, None, {"order": 3}, 2, noise_of_er_sde),  # its D' is that of the middle of the last step
    "sa_solver_2": (sa_solver, sa_solver_correction, {"order": 2, "tau": 1.0}, 2, noise_of_sde(1)),
    "sa_solver_3": (sa_solver, sa_solver_correction, {"order": 3, "tau": 1.0}, 3, noise_of_sde(1)),
    "sa_solver_3, τ = 0": (sa_solver, sa_solver_correction, {"order": 3}, 3, noise_of_sde(0)),
    "gradient_estimation": (gradient_estimation, None, {}, 1, noise_of_sde(0)),
}


def table_of(name: str, levels: Levels, noisy: bool = True) -> Table:
    row, correction, options, _, _ = SOLVERS[name]

    def without_noise(levels, index, known):
        found = row(levels, index, known, **options)
        return found if noisy else {term: weight for term, weight in found.items() if term[0] != "noise"}

    def corrects(levels, index, known, predictor):
        return {} if correction is None else correction(levels, index, known, predictor, **options)

    return build(levels, without_noise, corrects)


@pytest.fixture(scope="module")
def exact(mixture, noise):
    """Where the drift of a solver takes 16 samples from x̄, in x̄, by adaptive integration in log γ."""
    start, solved = BEGIN * noise(16, 2), {}

    def exact(rate):
        key = tuple(rate(np.log(gamma)) for gamma in (END, 1.0, BEGIN))
        if key not in solved:

            def velocity(log_gamma, flat):
                gamma = math.exp(log_gamma)
                alpha = 1 / math.sqrt(1 + gamma**2)
                sample = alpha * torch.from_numpy(flat).reshape(start.shape)
                prediction = mixture.noise_prediction(sample, alpha, gamma * alpha)
                return rate(log_gamma) * gamma * prediction.flatten().numpy()

            span, first = np.log([BEGIN, END]), start.flatten().numpy()
            solution = solve_ivp(velocity, span, first, method="DOP853", rtol=1e-12, atol=1e-12)
            solved[key] = torch.from_numpy(solution.y[:, -1]).reshape(start.shape)
        return start, solved[key]

    return exact


def error(name, mixture, exact, points, path="vp", change=lambda table: table) -> float:
    levels = levels_of(points, path)
    start, end = exact(SOLVERS[name][4])
    indices = iter(range(len(levels)))

    def model(sample, timestep):
        index = next(indices)
        return mixture.noise_prediction(sample, levels.alphas[index], levels.sigmas[index])

    table = change(table_of(name, levels, noisy=False))
    found = run(table, model, levels.alphas[0] * start) / levels.alphas[-1]
    return float((found - end).norm() / end.norm())


def order(name, mixture, exact, points=cubic, **options) -> float:
    # the error of order three of an implicit step is small, and seen in short steps
    factor = 4 if name.startswith("sa_solver_3") else 1
    errors = [error(name, mixture, exact, points(factor * steps), **options) for steps in STEPS]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_converges_with_its_order(name, path, mixture, exact):
    """The drift alone, of the stochastic ones; in steps that are even neither in γ nor in λ."""
    assert order(name, mixture, exact, path=path) == pytest.approx(SOLVERS[name][3], abs=0.35)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_wrong_weight_costs_the_order(name, mixture, exact):
    """The measurement above can tell, of a weight in the rows and of one in the corrections."""

    def change(where):
        def changed(table):
            rows = []
            for row in getattr(table, where):
                predictions = [term for term in row if term[0] != "sample"]
                furthest = max(predictions, key=lambda term: term[1], default=None)
                rows.append(row if furthest is None else {**row, furthest: 0.9 * row[furthest]})
            return dataclasses.replace(table, **{where: tuple(rows)})

        return changed

    for where in ("rows", "corrections") if SOLVERS[name][1] else ("rows",):
        assert order(name, mixture, exact, change=change(where)) < SOLVERS[name][3] - 0.4


@pytest.mark.parametrize(("name", "expected"), [("ipndm_3", 3), ("ipndm_4", 4)])
def test_ipndm_has_the_order_of_its_name_in_even_steps_of_gamma(name, expected, mixture, exact):
    def even(steps):
        return np.linspace(BEGIN, END, 2 * steps + 1)

    assert order(name, mixture, exact, even) == pytest.approx(expected, abs=0.4)
    levels = levels_of(even(8), "vp")
    ours, theirs = (table_of(other, levels) for other in (name, name.replace("ipndm", "lms")))
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["dpmpp", "res"])
def test_what_the_third_orders_integrate_exactly(kind, tau):
    """RES a polynomial of degree two, DPM-Solver++ as it is published half of it."""
    levels, index = levels_of(np.geomspace(5.0, 0.5, 6) ** 1.1, "vp"), 3
    row = {"dpmpp": dpmpp, "res": res}[kind](levels, index, known=4, order=3, tau=tau)
    h = levels.lambdas[index + 1] - levels.lambdas[index]
    known = levels.lambdas[index - np.arange(3)] - levels.lambdas[index]
    u, shares = np.polynomial.legendre.leggauss(20)
    u, shares, rate = h * (u + 1) / 2, h * shares / 2, 1 + tau**2
    kernel = rate * levels.alphas[index + 1] * np.exp(-rate * (h - u)) * shares
    for degree in range(3):
        found = sum(row["data", lag] * known[lag] ** degree for lag in range(3))
        expected = kernel @ u**degree
        if kind == "dpmpp" and degree == 2:  # u² = u (u − u_1) + u_1 u
            expected = kernel @ (known[1] * u) + kernel @ (u * (u - 2 * known[1])) / 2
        assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_single_data_point_is_kept_at_the_noise_levels_of_the_path(name):
    """With D = x_0 every state has the mean α x_0 and the variance σ² of the diffusion, exactly."""
    alphas, sigmas = table_of(name, levels := levels_of(np.append(cubic(8), 0.0), "flow")).marginals()
    np.testing.assert_allclose(alphas, levels.alphas, rtol=1e-9)
    np.testing.assert_allclose(sigmas, levels.sigmas, rtol=1e-9, atol=1e-8)


def moments(name: str, steps: int, path: str) -> np.ndarray:
    """
    Mean and standard deviation, exact, of what a solver draws in x̄ from data N(0.7, 0.4²).

    D is linear in x, so that x is linear in 1, the start, and the noise of each step; these weights are what runs.
    """
    levels, mean, std = levels_of(np.geomspace(BEGIN, END, steps + 1), path), 0.7, 0.4
    sample, indices = torch.zeros(1, steps + 2, dtype=torch.float64), iter(range(steps))
    sample[0, 0], sample[0, 1] = levels.alphas[0] * mean, levels.alphas[0] * math.hypot(std, BEGIN)

    def model(sample, timestep):
        index = next(indices)
        alpha, sigma = levels.alphas[index], levels.sigmas[index]
        offset = sample.clone()
        offset[0, 0] -= alpha * mean
        return sigma * offset / (alpha**2 * std**2 + sigma**2)

    def draw(index, sample):
        return torch.eye(steps + 2, dtype=torch.float64)[None, index + 2]

    weights = run(table_of(name, levels), model, sample, noise=draw)[0].numpy() / levels.alphas[-1]
    return np.array([weights[0], np.linalg.norm(weights[1:])])


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_drawn_has_the_moments_of_gaussian_data(name, path):
    exact = np.array([0.7, math.hypot(0.4, END)])
    errors = [np.abs(moments(name, steps, path) - exact) for steps in (50, 100)]
    assert np.all(errors[1] < 0.02)
    assert np.all(errors[1] < 0.6 * errors[0] + 1e-5)


def in_data(row, levels, index):
    """A row of the last ε, ε = (x − α x_0)/σ, as one of x and x_0."""
    alpha, sigma = levels.alphas[index], levels.sigmas[index]
    weight = row["prediction", 0] / sigma
    return {("sample", 0): row["sample", 0] + weight, ("data", 0): -alpha * weight}


@pytest.mark.parametrize("row", [deis, ipndm, lms])
def test_first_orders_in_the_noise_prediction_are_ddim(row):
    levels = levels_of(cubic(9), "vp")
    assert in_data(row(levels, 4, 5, order=1), levels, 4) == pytest.approx(ddim(levels, 4), rel=1e-9)


def test_solvers_that_are_one_in_their_lower_orders():
    levels = levels_of(cubic(9), "vp")
    pairs = [
        (ddim(levels, 4), dpmpp(levels, 4, 5, order=1)),
        (ddim(levels, 4, eta=1.0), res(levels, 4, 5, order=1, tau=1.0)),
        (dpmpp(levels, 4, 5, order=2), unipc(levels, 4, 5, order=2)),
        (dpmpp(levels, 4, 5, order=2, variant="heun"), res(levels, 4, 5, order=2)),
        (res(levels, 4, 5, order=3), unipc(levels, 4, 5, order=3)),
        (sa_solver(levels, 4, 5, order=2), unipc(levels, 4, 5, order=2, variant="bh1")),
    ]
    for one, other in pairs:
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_er_sde_is_the_published_rule(known):
    """x̄' = r x̄ + (1 − r) D + (δ + φ' ∫ du/φ) D' + (δ²/2 + φ' ∫ (u − γ) du/φ) D'' on some values of D."""
    levels, index, data = levels_of(np.array([5.0, 3.5, 2.0, 1.4, 0.6]), "flow"), 3, np.array([0.3, 0.9, -0.4])
    gammas, (gamma, following) = levels.gammas[index - np.arange(3)], levels.gammas[index : index + 2]
    ratio, delta = noise_scale(following) / noise_scale(gamma), following - gamma
    expected = (1 - ratio) * data[0]
    first, before = np.diff(data)[:2] / np.diff(gammas)[:2]
    if known > 1:
        integral = quad(lambda u: 1 / noise_scale(u), following, gamma)[0]
        expected += (delta + noise_scale(following) * integral) * first
    if known > 2:
        integral = quad(lambda u: (u - gamma) / noise_scale(u), following, gamma)[0]
        second = (first - before) / ((gammas[0] - gammas[2]) / 2)
        expected += (delta**2 / 2 + noise_scale(following) * integral) * second
    row, (alpha, alpha_next) = er_sde(levels, index, known), levels.alphas[index : index + 2]
    found = sum(weight * data[lag] for (what, lag), weight in row.items() if what == "data")
    assert found == pytest.approx(alpha_next * expected, rel=1e-9)
    assert row["sample", 0] == pytest.approx(alpha_next / alpha * ratio)
    assert row["noise", 0] == pytest.approx(alpha_next * math.sqrt(following**2 - (ratio * gamma) ** 2))


def test_gradient_estimation_is_ddim_with_twice_the_last_prediction_less_the_one_before():
    levels = levels_of(np.array([5.0, 3.5, 2.0]), "vp")
    step = levels.sigmas[2] - levels.alphas[2] / levels.alphas[1] * levels.sigmas[1]
    expected = {("sample", 0): levels.alphas[2] / levels.alphas[1], ("prediction", 0): 2 * step}
    assert gradient_estimation(levels, 1, 2) == pytest.approx(expected | {("prediction", 1): -step})
