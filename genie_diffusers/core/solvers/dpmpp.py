"""DPM-Solver++ multistep (Lu et al., 2022, https://huggingface.co/papers/2211.01095)."""

import numpy as np

from ..interpolation import exponential_moments
from ..table import Levels, Row
from .exponential import exponential_step, halved_weights, latest, polynomial_weights


def dpmpp(levels: Levels, index: int, known: int, order: int = 2, variant: str = "midpoint", tau: float = 0.0) -> Row:
    """
    A step of DPM-Solver++(2M) (Algorithm 2), of its third-order sibling, or of SDE-DPM-Solver++ (Section 5).

    Args:
        order (`int`): 1 to 3; the third one is [`dpmpp_third_weights`].
        variant (`str`): How the second order weighs the difference: `"midpoint"`, or `"heun"`, a line in λ.
        tau (`float`): 0 for the ODE, 1 for the SDE.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    order = min(order, known)
    if order == 3:
        weights = dpmpp_third_weights(levels, index, tau)
    elif order == 2 and variant == "midpoint":
        weights = halved_weights(levels, index, index - 1, "bh2", tau)
    else:
        weights = polynomial_weights(levels, index, latest(index, order), tau)
    return exponential_step(levels, index, weights, tau)


def dpmpp_third_weights(levels: Levels, index: int, tau: float) -> dict[int, float]:
    """
    φ_1 D + φ_2 h D' + φ_3 h² [D, D, D] with divided differences D' and [D, D, D] at the last three points.

    That is the published rule: the quadratic term of Newton's polynomial has the integral 2 φ_3, so that the order of
    convergence stays two ([`res`] is of order three). diffusers has −½ for the ½ of φ_3 where there is noise.
    """
    step, gap, before = levels.lambdas[index + 1 - np.arange(3)] - levels.lambdas[index - np.arange(3)]
    scaled = (1 + tau**2) * step
    phis = scaled * np.exp(-scaled) * exponential_moments(1.0, 3, scaled) / (1, 1, 2)
    second = (phis[1] * step * gap + phis[2] * step**2) / (gap + before)
    first = phis[1] * step + second  # of (D − D_1)/gap; −second of (D_1 − D_2)/before
    weights = phis[0] + first / gap, -first / gap - second / before, second / before
    return dict(zip(latest(index, 3), levels.alphas[index + 1] * np.array(weights), strict=True))
