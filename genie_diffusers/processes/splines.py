"""Smooth functions through the values of a noise schedule, by numpy alone: a sampler needs nothing more of scipy."""

import math

import numpy as np


class PiecewisePolynomial:
    """
    A polynomial between any two `edges`, continued beyond the first and the last one.

    Args:
        edges (`np.ndarray` of shape `(pieces + 1,)`): Strictly increasing.
        coefficients (`np.ndarray` of shape `(degree + 1, pieces)`): Those of (x − left edge)^m, m = 0 … degree.
    """

    def __init__(self, edges: np.ndarray, coefficients: np.ndarray):
        self.edges, self.coefficients = edges, coefficients

    def __call__(self, x, nu: int = 0) -> np.ndarray:
        """The derivative of order `nu` at `x`, of any shape."""
        x = np.asarray(x, dtype=np.float64)
        piece = np.searchsorted(self.edges[1:-1], x, side="right")
        offset, total = x - self.edges[piece], np.zeros(x.shape)
        for power in range(len(self.coefficients) - 1, nu - 1, -1):
            total = total * offset + math.perm(power, nu) * self.coefficients[power, piece]
        return total


class InterpolatingSpline(PiecewisePolynomial):
    """
    The spline of degree 5 through `values` at `points`, which is one polynomial across the points next to its ends.

    It is the not-a-knot spline of `scipy.interpolate.make_interp_spline(points, values, k=5)`, or of the degree
    `len(points) − 1` through fewer than six points.

    Attributes:
        weights (`np.ndarray` of shape `(len(points),)`): Those of its B-splines, between which it lies.
    """

    def __init__(self, points: np.ndarray, values: np.ndarray):
        degree = min(5, len(points) - 1)
        inner = points[3:-3] if degree == 5 else points[:0]
        knots = np.concatenate([[points[0]] * (degree + 1), inner, [points[-1]] * (degree + 1)])
        edges = np.concatenate([points[:1], inner, points[-1:]])
        first, collocation = _bsplines(knots, degree, points)
        self.weights = _solve_banded(first, collocation, values)
        # the value and the derivatives at the left end of every piece, from splines of ever lower degree
        coefficients, weights = [], self.weights
        for order in range(degree + 1):
            lower = degree - order
            first, basis = _bsplines(knots, lower, edges[:-1])
            derivatives = (weights[first[:, None] + np.arange(lower + 1)] * basis).sum(1)
            coefficients.append(derivatives / math.factorial(order))
            if lower > 0:
                weights = lower * np.diff(weights) / (knots[lower + 1 : -1] - knots[1 : -lower - 1])
                knots = knots[1:-1]
        super().__init__(edges, np.array(coefficients))


class MonotoneCubic(PiecewisePolynomial):
    """
    The cubic that is monotone where the values are (Fritsch & Butland, 1984), at integer distances.

    It is that of `scipy.interpolate.PchipInterpolator(points, values)` for strictly monotone values, at least three.
    """

    def __init__(self, points: np.ndarray, values: np.ndarray):
        rise = np.diff(values)
        inner = 2.0 / (1.0 / rise[1:] + 1.0 / rise[:-1])
        ends = [(3.0 * near - far) / 2.0 for near, far in ((rise[0], rise[1]), (rise[-1], rise[-2]))]
        ends = [end if end * near > 0 else 0.0 for end, near in zip(ends, rise[[0, -1]], strict=True)]
        slopes = np.concatenate([ends[:1], inner, ends[1:]])
        left, right = slopes[:-1], slopes[1:]
        super().__init__(points, np.array([values[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise]))


def _bsplines(knots: np.ndarray, degree: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the first B-spline that is not zero at `x`, and the values of that one and the next `degree`."""
    interval = np.clip(np.searchsorted(knots, x, side="right") - 1, degree, len(knots) - degree - 2)
    basis = np.ones((len(x), 1))
    for d in range(1, degree + 1):  # Cox–de Boor
        ends = interval[:, None] + np.arange(1, d + 1)
        right, left = knots[ends], knots[ends - d]
        share = basis / (right - left)
        basis = np.zeros((len(x), d + 1))
        basis[:, :-1] += share * (right - x[:, None])
        basis[:, 1:] += share * (x[:, None] - left)
    return interval - degree, basis


def _solve_banded(first: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Solve for w where Σ_k rows[i, k] w[first[i] + k] = values[i]: collocation, which needs no pivoting."""
    # Python's own numbers: thousands of operations on a few numbers each
    equations = [dict(enumerate(row, start)) for start, row in zip(first.tolist(), rows.tolist(), strict=True)]
    solution = values.tolist()
    for i, pivots in enumerate(equations):
        for j in range(i + 1, min(i + rows.shape[1], len(equations))):
            factor = equations[j].get(i, 0.0) / pivots[i]
            if factor:
                solution[j] -= factor * solution[i]
                for column, weight in pivots.items():
                    if column > i:
                        equations[j][column] = equations[j].get(column, 0.0) - factor * weight
    for i in range(len(equations) - 1, -1, -1):
        known = sum(weight * solution[column] for column, weight in equations[i].items() if column > i)
        solution[i] = (solution[i] - known) / equations[i][i]
    return np.array(solution)
