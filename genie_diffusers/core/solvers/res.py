"""RES: refined exponential solver (Zhang et al., 2023, https://huggingface.co/papers/2308.02157)."""

import numpy as np

from ..interpolation import exponential_moments, interpolation_weights
from ..table import Levels, Row


def res_multistep(levels: Levels, index: int, known: int, order: int = 2) -> Row:
    """
    The exponential Adams–Bashforth step of RES (Algorithm 2): ∫ e^λ D(λ) dλ with exact φ-functions.

    Args:
        order (`int`): How many of the latest data predictions are interpolated, 2 for RES-2M and 3 for RES-3M.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    nodes = levels.lambdas[index] - levels.lambdas[index - np.arange(min(known, order))]
    step = levels.lambdas[index + 1] - levels.lambdas[index]
    weights = interpolation_weights(-nodes, [0] * len(nodes), exponential_moments(step, len(nodes), rate=1.0))
    weights *= levels.sigmas[index + 1] * np.exp(levels.lambdas[index])
    row: Row = {("sample", 0): float(levels.sigmas[index + 1] / levels.sigmas[index])}
    return row | {("data", lag): float(weight) for lag, weight in enumerate(weights)}
