"""Hermite predictor-corrector in the log signal-to-noise ratio, with slopes or as a multistep method."""

import numpy as np

from ..interpolation import exponential_moments, interpolation_weights, polynomial_moments
from ..table import Levels, Row, Term

#: Steps in λ from this length on are long: a polynomial through several points no longer follows the prediction.
LONG_STEP = 0.75
#: Near pure noise, below this λ, predictions change least predictably, and steps of this length are straight.
NEARLY_NOISE, VERY_LONG_STEP = -2.5, 1.5


def hermite(levels: Levels, index: int, known: int, order: int = 3, slopes: bool = False) -> Row:
    """
    The step x_{n+1} = (σ_{n+1}/σ_n) x_n + σ_{n+1} ∫ e^λ D(λ) dλ with D interpolated through what is known of it.

    Values alone give the multistep methods of the family of DPM-Solver++ (Lu et al., 2022) and UniPC (Zhao et al.,
    2023). With slopes dD/dλ = −(σ/α) dε/dλ the latest points count twice.

    Args:
        order (`int`): Number of conditions, lower while less is known.
        slopes (`bool`): Whether dε/dλ is known at every point.
    """
    if levels.sigmas[index + 1] == 0:  # the step to clean data is D itself
        return {("data", 0): 1.0}
    order = min(order, 2 if _is_long(levels, index) else 4)
    if levels.lambdas[index] < NEARLY_NOISE and levels.lambdas[index + 1] - levels.lambdas[index] >= VERY_LONG_STEP:
        order = 1
    kinds = ("data", "slope") if slopes else ("data",)
    conditions = [(what, point) for point in range(index, index - known, -1) for what in kinds][:order]
    row: Row = {("sample", 0): float(levels.sigmas[index + 1] / levels.sigmas[index])}
    return row | {(what, index - point): weight for (what, point), weight in _integral(levels, index, conditions)}


def hermite_correction(levels: Levels, index: int, known: int, predictor: Row, slopes: bool = False) -> Row:
    """
    What is added to the sample of step `index` once the model was called on it: the step before it, taken again.

    Now the new prediction is known too: the cubic through values and slopes at both ends of the step, or without
    slopes the parabola through both ends and the point before.
    """
    if known == 1:
        return {}
    start = index - 1
    if slopes:
        conditions = [(what, point) for what in ("data", "slope") for point in (start, index)]
    else:
        earlier = [] if known == 2 or _is_long(levels, start) else [("data", start - 1)]
        conditions = [("data", index), ("data", start), *earlier]
    correction = {(what, index - point): weight for (what, point), weight in _integral(levels, start, conditions)}
    return less_the_predictor(correction, predictor)


def less_the_predictor(correction: Row, predictor: Row) -> Row:
    """The weights of the corrected step less those that the predictor has already added, one step ago."""
    for (what, lag), weight in predictor.items():
        if what != "sample":
            correction[what, lag + 1] = correction.get((what, lag + 1), 0.0) - weight
    return correction


def _is_long(levels: Levels, index: int) -> bool:
    return levels.lambdas[index + 1] - levels.lambdas[index] >= LONG_STEP


def _integral(levels: Levels, start: int, conditions: list[Term]) -> list[tuple[Term, float]]:
    """The weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
    lambdas = levels.lambdas
    nodes = [lambdas[point] - lambdas[start] for _, point in conditions]
    step = lambdas[start + 1] - lambdas[start]
    moments = exponential_moments(step, len(nodes), rate=1.0)
    if _is_long(levels, start) and lambdas[start] < 0:
        # The kernel's mean, as B₂(h) of UniPC: what is extrapolated to the end of the step counts for less.
        moments = moments[0] / step * polynomial_moments(step, len(nodes))
    weights = interpolation_weights(nodes, [int(what == "slope") for what, _ in conditions], moments)
    weights *= levels.sigmas[start + 1] * np.exp(lambdas[start])
    # the source gives dε/dλ, and dD/dλ = −(σ/α) dε/dλ
    factors = [-np.exp(-lambdas[point]) if what == "slope" else 1.0 for what, point in conditions]
    return [(condition, float(w * f)) for condition, w, f in zip(conditions, weights, factors, strict=True)]
