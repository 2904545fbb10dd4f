"""UniPC: a predictor and its corrector (Zhao et al., 2023, https://huggingface.co/papers/2302.04867)."""

from ..table import Levels, Row
from .exponential import data_terms, exponential_step, halved_weights, latest, polynomial_weights
from .hermite import less_the_predictor


def unipc(levels: Levels, index: int, known: int, order: int = 2, variant: str = "bh2") -> Row:
    """
    A step of UniP (Algorithm 2) in the data prediction.

    The system that determines its weights has the polynomial through the last predictions as solution, for any B(h).
    Only the second order differs with `variant`, `"bh1"` or `"bh2"`, whose single weight is set to ½.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    order = min(order, known)
    if order == 2:
        weights = halved_weights(levels, index, index - 1, variant)
    else:
        weights = polynomial_weights(levels, index, latest(index, order))
    return exponential_step(levels, index, weights)


def unipc_correction(
    levels: Levels, index: int, known: int, predictor: Row, order: int = 2, variant: str = "bh2"
) -> Row:
    """
    What UniC (Algorithm 1) adds once the model was called: the step before again, with the new prediction too.

    Args:
        order (`int`): That of the step which led to point `index`.
    """
    order = min(order, known - 1)
    if order == 0:
        return {}
    if order == 1:
        weights = halved_weights(levels, index - 1, index, variant)
    else:
        weights = polynomial_weights(levels, index - 1, latest(index, order + 1))
    return less_the_predictor(data_terms(weights, index), predictor)
