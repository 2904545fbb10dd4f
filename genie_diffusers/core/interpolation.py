"""Weights of solvers that interpolate what they know of a function by a polynomial and integrate that exactly.

Every deterministic solver of this package is one: known values and derivatives of the model's prediction at a few
points define a polynomial (Hermite–Birkhoff interpolation), and the step is its integral against the kernel of the
ODE. Values alone give the Lagrange multistep methods (Adams–Bashforth, DEIS, DPM-Solver++ multistep, UniPC); one
value and its derivative give the second truncated Taylor method of GENIE.
"""

import math
from collections.abc import Sequence

import numpy as np

#: Gauss–Legendre points and weights on [0, 1]
_INSIDE, _SHARES = np.polynomial.legendre.leggauss(40)
_INSIDE, _SHARES = (_INSIDE + 1) / 2, _SHARES / 2


def interpolation_weights(
    nodes: Sequence[float], derivatives: Sequence[int], moments: Sequence[float] | np.ndarray
) -> np.ndarray:
    """
    Weights w such that ∫ K(u) p(u) du = Σ_k w_k y_k, with p the polynomial that meets p^(d_k)(u_k) = y_k for every k.

    Args:
        nodes (`Sequence[float]`): The points u_k.
        derivatives (`Sequence[int]`): The order d_k of the derivative known there; 0 is the value.
        moments (`Sequence[float]` or `np.ndarray`): ∫ K(u) u^m du for m = 0 … number of conditions − 1.

    Raises:
        numpy.linalg.LinAlgError: If the conditions do not determine the polynomial (a condition given twice).
    """
    count = len(nodes)
    conditions = np.zeros((count, count))
    for row, (node, derivative) in enumerate(zip(nodes, derivatives, strict=True)):
        for power in range(derivative, count):
            conditions[row, power] = math.perm(power, derivative) * node ** (power - derivative)
    return np.linalg.solve(conditions.T, np.asarray(moments, dtype=np.float64))


def polynomial_moments(step: float, count: int) -> np.ndarray:
    """∫_0^step u^m du for m = 0 … count − 1."""
    powers = np.arange(1, count + 1)
    return step**powers / powers


def exponential_moments(step: float, count: int, rate: float) -> np.ndarray:
    """
    ∫_0^step e^{rate·u} u^m du for m = 0 … count − 1, without cancellation at small steps.

    By quadrature, which is exact to rounding for |rate·step| up to 80; the longest step there is, from pure noise to
    the last timestep of a flow, has 16.
    """
    powers = np.arange(count)
    return step ** (powers + 1) * (_INSIDE ** powers[:, None] @ (_SHARES * np.exp(rate * step * _INSIDE)))
