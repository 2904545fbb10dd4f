"""SA-Solver: stochastic Adams (Xue et al., 2023, https://huggingface.co/papers/2309.05019)."""

from ..table import Levels, Row
from .exponential import data_terms, exponential_step, halved_weights, latest, polynomial_weights
from .hermite import less_the_predictor


def sa_solver(levels: Levels, index: int, known: int, order: int = 2, tau: float = 0.0) -> Row:
    """
    A step of SA-Predictor (Section 5.1), whose second order has half a step of the difference, as UniPC with `"bh1"`.

    Args:
        order (`int`): How many of the latest data predictions are interpolated.
        tau (`float`): τ of this step.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    order = min(order, known)
    if order == 2:
        weights = halved_weights(levels, index, index - 1, "bh1", tau)
    else:
        weights = polynomial_weights(levels, index, latest(index, order), tau)
    return exponential_step(levels, index, weights, tau)


def sa_solver_correction(
    levels: Levels, index: int, known: int, predictor: Row, order: int = 2, tau: float = 0.0
) -> Row:
    """
    What SA-Corrector (Section 5.2) adds once the model was called: the step before again, with the same noise.

    Args:
        order (`int`): How many data predictions are interpolated, the new one included.
        tau (`float`): τ of the step that led to point `index`.
    """
    if known == 1:
        return {}
    order = min(order, known)
    if order == 2:
        weights = halved_weights(levels, index - 1, index, "bh1", tau)
    else:
        weights = polynomial_weights(levels, index - 1, latest(index, order), tau)
    return less_the_predictor(data_terms(weights, index), predictor)
