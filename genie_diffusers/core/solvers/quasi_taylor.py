"""Weights of the quasi-Taylor samplers: one step x(t − h) = ρ x + w ε + s z, z standard normal, as a polynomial in h.

Quasi-Taylor samplers (Tachibana et al., 2021, https://huggingface.co/papers/2112.13339) expand the probability-flow
ODE or the reverse SDE in the step, with the derivatives of ε replaced by those it has when the data are one point:
∂ε/∂x = 1/σ and ∂ε/∂t = (β/2σ)(x − ε/σ). With them the exact solutions are DDIM and the DDPM posterior, whose
coefficients are known, and the scheme of order p is their Taylor polynomial of degree p. docs/quasi_taylor.md has the
derivation.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..table import Levels, Row

METHODS = ("ode", "sde")


class StepWeights(NamedTuple):
    """ρ, w and s of one step or, as arrays, of many."""

    sample: np.ndarray
    prediction: np.ndarray
    noise: np.ndarray


def quasi_taylor(levels: Levels, index: int, known: int = 1, method: str = "ode", order: int = 2) -> Row:
    """
    The step x(t − h) = ρ x + w ε + s z of order p, or its limit where that is the better of the two.

    Args:
        method (`str`): `"ode"` or `"sde"`.
        order (`int`): p, from 1 to 3.
    """
    weights, _ = quasi_taylor_weights(levels, method, order)
    row = {(name, 0): float(values[index]) for name, values in weights._asdict().items()}
    return {term: weight for term, weight in row.items() if weight != 0.0}


@lru_cache(maxsize=8)
def quasi_taylor_weights(levels: Levels, method: str, order: int) -> tuple[StepWeights, np.ndarray]:
    """
    The weights of all steps of a run, and their [`departure`] from the limit, 0 for the step to clean data.

    The step to clean data is the limit, and so are steps with a departure above 1. A path that does not preserve
    variance is the variance-preserving one of the same noise levels in x/√(α² + σ²), and is expanded there.
    """
    path, norm = levels.path, np.hypot(levels.alphas, levels.sigmas)
    alphas, sigmas = levels.alphas / norm, levels.sigmas / norm
    times = path.inside(np.append(levels.timesteps, path.timestep_min))
    (alpha, alpha_next), (sigma, sigma_next) = ((values[:-1], values[1:]) for values in (alphas, sigmas))
    betas = [path.beta(times[:-1], derivative) for derivative in range(order)]
    limit = limit_weights(method, alpha, sigma, alpha_next, sigma_next)
    # β = 0 in a schedule with jumps, and the division by σ = 0 at clean data
    with np.errstate(divide="ignore", invalid="ignore"):
        expanded = taylor_weights(method, order, -np.diff(times), betas, sigma**2)
        departures = departure(expanded, limit, sigma, alpha_next, sigma_next)
    departures = np.where(sigma_next > 0, np.nan_to_num(departures, nan=np.inf, posinf=np.inf), 0.0)
    takes_limit = (sigma_next == 0) | (departures > 1)
    chosen = StepWeights(*(np.where(takes_limit, *pair) for pair in zip(limit, expanded, strict=True)))
    norm, norm_next = norm[:-1], norm[1:]
    weights = StepWeights(chosen.sample * norm_next / norm, chosen.prediction * norm_next, chosen.noise * norm_next)
    return weights, departures


def taylor_weights(
    method: str, order: int, step: np.ndarray, betas: Sequence[np.ndarray], variance: np.ndarray
) -> StepWeights:
    """
    The weights of order p, polynomials in h but for the standard deviation s, whose square is one.

    Args:
        method (`str`): `"ode"` or `"sde"`.
        order (`int`): p, from 1 to 3.
        step (`np.ndarray`): h > 0 in timesteps, towards the data.
        betas (`Sequence[np.ndarray]`): β, dβ/dt, d²β/dt² at t; the first `order` are used.
        variance (`np.ndarray`): ν = σ² at t.
    """
    # L = ∫_{t−h}^{t} β = βh − β̇h²/2 + β̈h³/6, term by term
    integral = np.zeros((order + 1, *step.shape))
    for k in range(order):
        integral[k + 1] = (-1) ** k * betas[k] * step ** (k + 1) / math.factorial(k + 1)
    exponential = [1 / math.factorial(k) for k in range(order + 1)]
    rho = _compose(exponential, integral / 2).sum(0)  # e^{L/2} = α(t−h)/α
    if method == "ode":
        # w = σ(t−h) − ρσ with σ(t−h) = σ √(1 − y), y = (e^L − 1)(1−ν)/ν
        y = (1 - variance) / variance * _compose([0, *exponential[1:]], integral)
        ratio = _compose([1, -1 / 2, -1 / 8, -1 / 16][: order + 1], y).sum(0)
        return StepWeights(rho, np.sqrt(variance) * (ratio - rho), np.zeros_like(step))
    # w = −(1 − e^{−L}) e^{L/2}/σ
    inverse = _compose(exponential, -integral / 2).sum(0)
    return StepWeights(rho, (inverse - rho) / np.sqrt(variance), _noise_std(order, step, betas, variance))


def limit_weights(
    method: str, alpha: np.ndarray, sigma: np.ndarray, alpha_next: np.ndarray, sigma_next: np.ndarray
) -> StepWeights:
    """What `taylor_weights` converges to with its order: DDIM (`"ode"`) or the DDPM posterior (`"sde"`)."""
    rho = alpha_next / alpha
    if method == "ode":
        return StepWeights(rho, sigma_next - rho * sigma, np.zeros_like(rho))
    return StepWeights(rho, (1 / rho - rho) / sigma, sigma_next / sigma * np.sqrt((1 - 1 / rho) * (1 + 1 / rho)))


def departure(
    weights: StepWeights, limit: StepWeights, sigma: np.ndarray, alpha_next: np.ndarray, sigma_next: np.ndarray
) -> np.ndarray:
    """
    How far a step lies from its limit, as the largest relative error of what it makes of one data point x_0.

    From x = α x_0 + σ ε a step makes ρα x_0 + (ρσ + w) ε + s z. The first weight is compared with α(t−h), the other
    two with σ(t−h), the noise level they make up: 1 means that the error is as large as what is computed.
    """
    of_data = np.abs(weights.sample / limit.sample - 1)
    of_noise = np.abs((weights.sample - limit.sample) * sigma + weights.prediction - limit.prediction) / sigma_next
    of_fresh_noise = np.abs(weights.noise - limit.noise) / sigma_next
    return np.maximum(np.maximum(of_data, of_noise), of_fresh_noise)


def _noise_std(order: int, step: np.ndarray, betas: Sequence[np.ndarray], variance: np.ndarray) -> np.ndarray:
    """
    Standard deviation of the sum of the scheme's stochastic integrals, from their joint covariance.

    With u the time since the start of the step, n = ∫_0^h K(h, u) dW_u, where K is Φ(h, u) √β(t−u) expanded to degree
    p − 1 in (h, u) together, and Φ the propagator of the drift, ∂Φ/∂h = a(t−h) Φ, a = β(1/2 − 1/ν). The integrals of
    the Itô–Taylor scheme are its terms: ∫dW, ∫u dW, ∫W du = ∫(h−u) dW, … Hence Var n = ∫_0^h K² du, and p Gauss points
    integrate this square of degree 2p − 2 exactly: a sum of squares.
    """
    points, quadrature = np.polynomial.legendre.leggauss(order)
    u = step[:, None] * (1 + points) / 2
    rest = step[:, None] - u
    beta, *derivatives = (values[:, None] for values in betas[:order])
    nu, root = variance[:, None], np.sqrt(beta)
    a = beta * (0.5 - 1 / nu)
    kernel = root * np.ones_like(u)
    if order >= 2:
        root_dot = derivatives[0] / (2 * root)
        kernel += -root_dot * u + root * a * rest
    if order >= 3:
        root_ddot = derivatives[1] / (2 * root) - derivatives[0] ** 2 / (4 * root**3)
        a_dot = derivatives[0] * (0.5 - 1 / nu) + beta**2 * (1 - nu) / nu**2  # dν/dt = β(1 − ν)
        kernel += root_ddot * u**2 / 2 - root_dot * a * u * rest
        kernel += root * (a**2 * rest**2 - a_dot * rest * (step[:, None] + u)) / 2  # ∫a = a·(h−u) − ȧ·(h²−u²)/2
    return np.sqrt(step * np.sum(quadrature / 2 * kernel**2, axis=1))


def _compose(outer: Sequence[float], inner: np.ndarray) -> np.ndarray:
    """Terms of Σ_k outer_k inner^k up to the degree of `inner`, whose row j is ∝ h^j and row 0 is zero (Horner)."""
    result = np.zeros_like(inner)
    for coefficient in reversed(outer):
        result = np.stack([np.sum(result[:k] * inner[k:0:-1], axis=0) for k in range(len(inner))])
        result[0] += coefficient
    return result
