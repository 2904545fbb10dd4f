"""DEIS: diffusion exponential integrator sampler (Zhang & Chen, 2023, https://huggingface.co/papers/2204.13902)."""

from ..interpolation import exponential_moments, interpolation_weights
from ..table import Levels, Row
from .exponential import latest


def deis(levels: Levels, index: int, known: int, order: int = 3) -> Row:
    """
    x̄' = x̄ + ∫ ε dγ in x̄ = x/α and γ = σ/α, with a polynomial in log γ through the last predictions (Eq. 14 and 15).

    Args:
        order (`int`): How many of them.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    points, lambdas = latest(index, min(known, order)), levels.lambdas
    step, nodes = lambdas[index + 1] - lambdas[index], lambdas[list(points)] - lambdas[index]
    weights = interpolation_weights(nodes, [0] * len(nodes), exponential_moments(step, len(nodes), rate=-1.0))
    weights *= -levels.alphas[index + 1] * levels.gammas[index]  # dγ = −γ dλ
    row: Row = {("sample", 0): float(levels.alphas[index + 1] / levels.alphas[index])}
    return row | {("prediction", lag): float(weight) for lag, weight in enumerate(weights)}
