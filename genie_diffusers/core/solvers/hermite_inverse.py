"""The Hermite predictor-corrector from data to noise, where ε is what changes little."""

import numpy as np

from ..table import Levels, Row, Term
from .hermite import conditional_integral, less_the_predictor


def hermite_inverse(levels: Levels, index: int, known: int, order: int = 3, slopes: bool = False) -> Row:
    """
    The step x̄_{n+1} = x̄_n − ∫ e^{−λ} ε(λ) dλ in x̄ = x/α, with the mean of ε given what is known of it.

    Args:
        order (`int`): Number of conditions, lower while less is known.
        slopes (`bool`): Whether dε/dλ is known at every point.
    """
    kinds = ("prediction", "slope") if slopes else ("prediction",)
    conditions = [(what, point) for point in range(index, index - known, -1) for what in kinds]
    conditions = _usable(levels, conditions)[:order]
    conditions = conditions or [("prediction", index)]  # that of clean data, where there is no other
    row: Row = {("sample", 0): float(levels.alphas[index + 1] / levels.alphas[index])}
    return row | {
        (what, index - point): weight for (what, point), weight in _noise_integral(levels, index, conditions)
    }


def hermite_inverse_correction(levels: Levels, index: int, known: int, predictor: Row, slopes: bool = False) -> Row:
    """As [`hermite_correction`]; the step from clean data is the adjoint of the decoder's last one."""
    if known == 1:
        return {}
    start = index - 1
    if levels.sigmas[start] == 0:
        conditions = [("prediction", index)]  # x_0 = x̄_1 − γ_1 ε_1
    elif slopes:
        conditions = _usable(levels, [(what, point) for point in (index, start) for what in ("prediction", "slope")])
    else:
        earlier = [] if known == 2 else [("prediction", start - 1)]
        conditions = _usable(levels, [("prediction", index), ("prediction", start), *earlier])
    correction = {
        (what, index - point): weight for (what, point), weight in _noise_integral(levels, start, conditions)
    }
    return less_the_predictor(correction, predictor)


def _usable(levels: Levels, conditions: list[Term]) -> list[Term]:
    """Without those at clean data, and at a point that is visited again at once (a noisy end at a timestep)."""
    newest = max(point for _, point in conditions)
    return [
        (what, point)
        for what, point in conditions
        if levels.sigmas[point] > 0 and (point == newest or levels.lambdas[point] > levels.lambdas[point + 1])
    ]


def _noise_integral(levels: Levels, start: int, conditions: list[Term]) -> list[tuple[Term, float]]:
    """The weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
    if levels.sigmas[start] == 0:
        return [(conditions[0], float(levels.sigmas[start + 1]))]
    lambdas = levels.lambdas
    known = [("slope" if what == "slope" else "value", lambdas[point]) for what, point in conditions]
    weights = conditional_integral(known, lambdas[start], lambdas[start + 1], rate=-1.0)
    weights = -levels.alphas[start + 1] * np.exp(-lambdas[start]) * weights
    return [(condition, float(weight)) for condition, weight in zip(conditions, weights, strict=True)]
