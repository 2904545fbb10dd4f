"""What solvers in the data prediction share: steps that are exact but for what D is taken to be between known values.

For the reverse SDE with τ times its noise, τ = 0 being the probability-flow ODE, a step of length h = λ' − λ is

    x' = (σ'/σ) e^{−τ²h} x + (1 + τ²) α' ∫_0^h e^{−(1 + τ²)(h − u)} D(λ + u) du + σ' √(1 − e^{−2τ²h}) z

(SA-Solver, Xue et al., 2023, https://huggingface.co/papers/2309.05019, Section 4, for a constant τ; DPM-Solver++, Lu
et al., 2022, https://huggingface.co/papers/2211.01095, has τ = 0 and 1). It is the same on every path α x_0 + σ z.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..interpolation import exponential_moments, interpolation_weights
from ..table import Levels, Row


def exponential_step(levels: Levels, index: int, of_data: Mapping[int, float], tau: float = 0.0) -> Row:
    """The step from point `index`, with the weights `of_data` of the data predictions at some points."""
    decay = (levels.gammas[index + 1] / levels.gammas[index]) ** tau**2  # e^{−τ²h}
    row: Row = {("sample", 0): float(levels.sigmas[index + 1] / levels.sigmas[index] * decay)}
    if tau > 0:
        row["noise", 0] = float(levels.sigmas[index + 1] * np.sqrt((1 - decay) * (1 + decay)))
    return row | data_terms(of_data, index)


def data_terms(of_data: Mapping[int, float], now: int) -> Row:
    """Weights of data predictions by point as terms of step `now`."""
    return {("data", now - point): float(weight) for point, weight in of_data.items()}


def latest(index: int, count: int) -> range:
    """The last `count` points, `index` first."""
    return range(index, index - count, -1)


def polynomial_weights(levels: Levels, start: int, points: Sequence[int], tau: float = 0.0) -> dict[int, float]:
    """The weights of D at `points` in the step from point `start`, with the polynomial in λ through them for D."""
    rate, step = 1 + tau**2, levels.lambdas[start + 1] - levels.lambdas[start]
    nodes = levels.lambdas[list(points)] - levels.lambdas[start]
    weights = interpolation_weights(nodes, [0] * len(nodes), exponential_moments(step, len(nodes), rate))
    weights *= rate * levels.alphas[start + 1] * np.exp(-rate * step)
    return dict(zip(points, weights, strict=True))


def halved_weights(levels: Levels, start: int, other: int, scale: str, tau: float = 0.0) -> dict[int, float]:
    """
    The weights of D at the points `start` and `other` in the step from `start`, where that of h dD/dλ is ½ B.

    In leading order it is the weight of a line, whichever B(h) of UniPC is taken (Zhao et al., 2023,
    https://huggingface.co/papers/2302.04867, Section 3).

    Args:
        scale (`str`): `"bh2"`, B = 1 − e^{−H}, or `"bh1"`, B = H, where H = (1 + τ²) h.
    """
    step, gap = (levels.lambdas[point] - levels.lambdas[start] for point in (start + 1, other))
    scaled = (1 + tau**2) * step
    constant, alpha = -np.expm1(-scaled), levels.alphas[start + 1]
    slope = 0.5 * {"bh1": scaled, "bh2": constant}[scale] * step / gap
    return {start: alpha * (constant - slope), other: alpha * slope}
