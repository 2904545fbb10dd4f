"""Multistep methods of dx̄/dγ = ε in x̄ = x/α and γ = σ/α itself, without exponentials."""

from ..interpolation import interpolation_weights, polynomial_moments
from ..table import Levels, Row
from .exponential import latest

#: the weights of the last predictions at even steps
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lms(levels: Levels, index: int, known: int, order: int = 4) -> Row:
    """
    Adams–Bashforth of variable step, ∫ ε dγ by the polynomial in γ through the last `order` predictions.

    It is the linear multistep sampler of k-diffusion, with exact integrals.
    """
    points, gammas = latest(index, min(known, order)), levels.gammas
    nodes = gammas[list(points)] - gammas[index]
    moments = polynomial_moments(gammas[index + 1] - gammas[index], len(nodes))
    return _gamma_step(levels, index, interpolation_weights(nodes, [0] * len(nodes), moments))


def ipndm(levels: Levels, index: int, known: int, order: int = 4) -> Row:
    """
    iPNDM: the step of DDIM with Adams–Bashforth's weights of even steps, whatever the steps are.

    PNDM is of Liu et al. (2022, https://huggingface.co/papers/2202.09778, Eq. 9, 12 and 13), its start at lower
    orders of Zhang & Chen (2023, https://huggingface.co/papers/2204.13902). Where γ is not even, the order is two.
    """
    step = levels.gammas[index + 1] - levels.gammas[index]
    return _gamma_step(levels, index, [step * weight for weight in ADAMS_BASHFORTH[min(known, order) - 1]])


def gradient_estimation(levels: Levels, index: int, known: int, gamma: float = 2.0) -> Row:
    """
    Gradient estimation: the step of DDIM with γ ε + (1 − γ) ε_before.

    It is of Permenter & Yuan (2024, https://huggingface.co/papers/2306.04848, Section 5): ε errs in a direction that
    the difference to the last one removes. Its γ is no noise level.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    step = levels.gammas[index + 1] - levels.gammas[index]
    return _gamma_step(levels, index, [step] if known == 1 else [step * gamma, step * (1 - gamma)])


def _gamma_step(levels: Levels, index: int, weights) -> Row:
    """x̄' = x̄ + Σ w ε."""
    alpha, alpha_next = levels.alphas[index : index + 2]
    row: Row = {("sample", 0): float(alpha_next / alpha)}
    return row | {("prediction", lag): float(alpha_next * weight) for lag, weight in enumerate(weights)}
