"""RES: refined exponential solver (Zhang et al., 2023, https://huggingface.co/papers/2308.02157)."""

from ..table import Levels, Row
from .exponential import exponential_step, latest, polynomial_weights


def res(levels: Levels, index: int, known: int, order: int = 2, tau: float = 0.0) -> Row:
    """
    The exponential Adams–Bashforth step of RES (Algorithm 2): ∫ e^λ D(λ) dλ with exact φ-functions.

    Args:
        order (`int`): How many of the latest data predictions are interpolated, 2 for RES-2M and 3 for RES-3M.
        tau (`float`): How much of the reverse SDE's noise is added, by its exact solution.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    weights = polynomial_weights(levels, index, latest(index, min(known, order)), tau)
    return exponential_step(levels, index, weights, tau)
