"""Weights of solvers that predict a function from known values and slopes as the most likely one, and integrate it.

A polynomial through the last predictions is what a solver of high order extrapolates, and in long steps what ruins it.
Here the model's prediction is taken to be a random function of λ = log(α/σ), and what is integrated is its mean given
everything known of it (Gaussian-process interpolation, kriging). Where steps are short this mean is the polynomial
through all conditions, whatever the random function, so that orders of convergence are those of polynomials. In long
steps what is far away counts for less, so that the solver is of lower order there, without a threshold anywhere.

The noise prediction ε along a trajectory is modelled by

    dε/dλ = (ρ(λ) + δ) Z(λ),   ρ = α/√(α² + σ²)                                                        (prior)

where Z is stationary and has the correlation of Matérn with smoothness 5/2 and a length in λ. For normal data of
variance one, the posterior standard deviation of the data at noise level γ = σ/α is ρ γ. So much detail is left to be
found there, and it is the scale of what the data prediction D still changes by, dD/dλ = −γ dε/dλ. Near pure noise ρ
vanishes, but what the network's ε is wrong by does not: that is δ.
"""

from collections.abc import Sequence

import numpy as np

from ..table import Levels, Row, Term

#: length in λ over which the derivative of the prediction stays correlated
CORRELATION_LENGTH = 3.0
#: error of the network's ε, of which the derivative is as large near pure noise
NETWORK_ERROR = 0.02

#: Gauss–Legendre points and weights on [0, 1] of one interval between known points
_POINTS, _QUADRATURE = np.polynomial.legendre.leggauss(12)
_POINTS, _QUADRATURE = (_POINTS + 1) / 2, _QUADRATURE / 2
#: Added to covariances with unit diagonal. At rounding level, it matters only for points closer than 10⁻³ in λ.
_JITTER = 1e-14

#: (what is known, at which λ): `"value"` or `"slope"`
Condition = tuple[str, float]


def matern(distance: np.ndarray, length: float = CORRELATION_LENGTH) -> np.ndarray:
    """The Matérn correlation of smoothness 5/2: a function that it describes has two derivatives."""
    scaled = np.sqrt(5.0) / length * np.abs(distance)
    return (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)


def conditional_integral(conditions: Sequence[Condition], start: float, end: float, rate: float) -> np.ndarray:
    """
    Weights w such that Σ_k w_k y_k is the mean of ∫ e^{rate·(λ − start)} f(λ) dλ from `start` to `end`, given that the
    conditions on f have the values y_k.

    f is an unknown constant plus the integral of a derivative that follows (prior).

    Args:
        conditions (`Sequence[tuple[str, float]]`):
            What is known: `("value", λ)` is f(λ) and `("slope", λ)` is df/dλ. The first one is a value, and no value
            and no slope is known twice at one λ.
        start (`float`), end (`float`):
            The ends of the step in λ, in any order.
        rate (`float`):
            1 for the data prediction, f = D, and −1 for the noise prediction, f = ε.
    """
    values = [point for what, point in conditions if what == "value"]
    slopes = [point for what, point in conditions if what == "slope"]
    anchor = values[0]
    # Everything is a linear functional of df/dλ, at the quadrature points between all points, and where slopes are.
    edges = np.unique([start, end, *values])
    widths = np.diff(edges)[:, None]
    nodes = np.concatenate([(edges[:-1, None] + widths * _POINTS).ravel(), slopes])
    quadrature = np.concatenate([(widths * _QUADRATURE).ravel(), np.zeros(len(slopes))])

    def integral_from(first: float, last: float) -> np.ndarray:
        inside = (nodes > min(first, last)) & (nodes < max(first, last))
        return np.where(inside, np.copysign(quadrature, last - first), 0.0)

    total = np.expm1(rate * (end - start)) / rate
    # ∫ K f = (∫ K) f(anchor) + (∫ K) ∫_anchor^start f' + ∫_start^end f'(s) (∫_s^end K) ds
    remaining = (np.exp(rate * (end - start)) - np.exp(rate * (nodes - start))) / rate
    target = total * integral_from(anchor, start) + remaining * integral_from(start, end)
    others = conditions[1:]
    functionals = np.zeros((len(others), len(nodes)))
    of_slopes = iter(range(len(nodes) - len(slopes), len(nodes)))
    for row, (what, point) in zip(functionals, others, strict=True):
        if what == "value":
            row[:] = integral_from(anchor, point)
        else:
            row[next(of_slopes)] = 1.0

    amplitude = 1.0 / np.sqrt(1.0 + np.exp(-2.0 * nodes)) + NETWORK_ERROR
    if rate > 0:  # dD/dλ = −e^{−λ} dε/dλ
        amplitude = amplitude * np.exp(start - nodes)
    functionals, target = functionals * amplitude, target * amplitude
    correlation = matern(nodes[:, None] - nodes)
    covariance = functionals @ correlation @ functionals.T
    scale = 1.0 / np.sqrt(np.diag(covariance))
    covariance = covariance * scale * scale[:, None] + _JITTER * np.eye(len(others))
    weights = scale * np.linalg.solve(covariance, scale * (functionals @ correlation @ target))
    # A constant is integrated exactly: the weights of all values add up to the integral of the kernel.
    of_values = sum(weight for weight, (what, _) in zip(weights, others, strict=True) if what == "value")
    return np.concatenate([[total - of_values], weights])


def hermite(levels: Levels, index: int, known: int, order: int = 3, slopes: bool = False) -> Row:
    """
    The step x_{n+1} = (σ_{n+1}/σ_n) x_n + σ_{n+1} ∫ e^λ D(λ) dλ, with the mean of D given the latest conditions.

    Values alone give a multistep method of the family of DPM-Solver++ (Lu et al., 2022) and UniPC (Zhao et al., 2023).

    Args:
        order (`int`): How many conditions it follows, fewer while fewer are known: its order of convergence.
        slopes (`bool`): Whether dε/dλ is known beside the prediction at every point.
    """
    if levels.sigmas[index + 1] == 0:  # the step to clean data is D itself
        return {("data", 0): 1.0}
    kinds = ("data", "slope") if slopes else ("data",)
    conditions = [(kind, point) for point in range(index, index - known, -1) for kind in kinds][:order]
    row: Row = {("sample", 0): float(levels.sigmas[index + 1] / levels.sigmas[index])}
    return row | {(what, index - point): weight for (what, point), weight in _integral(levels, index, conditions)}


def hermite_correction(levels: Levels, index: int, known: int, predictor: Row, slopes: bool = False) -> Row:
    """
    What is added to the sample of step `index` once the model was called on it: the step before it, taken again.

    Now the new prediction is known too: with values and slopes at both ends of the step, or without slopes with the
    values at both ends and at the point before.
    """
    if known == 1:
        return {}
    start = index - 1
    if slopes:
        conditions = [(what, point) for point in (start, index) for what in ("data", "slope")]
    else:
        conditions = [("data", point) for point in (start, index, start - 1)[: min(known, 3)]]
    correction = {(what, index - point): weight for (what, point), weight in _integral(levels, start, conditions)}
    return less_the_predictor(correction, predictor)


def less_the_predictor(correction: Row, predictor: Row) -> Row:
    """The weights of the corrected step less those that the predictor has already added, one step ago, noise apart."""
    for (what, lag), weight in predictor.items():
        if what not in ("sample", "noise"):
            correction[what, lag + 1] = correction.get((what, lag + 1), 0.0) - weight
    return correction


def _integral(levels: Levels, start: int, conditions: list[Term]) -> list[tuple[Term, float]]:
    """The weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
    lambdas = levels.lambdas
    known = [("slope" if what == "slope" else "value", lambdas[point]) for what, point in conditions]
    weights = conditional_integral(known, lambdas[start], lambdas[start + 1], rate=1.0)
    weights = weights * levels.alphas[start] * levels.sigmas[start + 1] / levels.sigmas[start]
    # what is known is dε/dλ, and dD/dλ = −(σ/α) dε/dλ
    factors = [-levels.gammas[point] if what == "slope" else 1.0 for what, point in conditions]
    return [(term, float(weight * factor)) for term, weight, factor in zip(conditions, weights, factors, strict=True)]
