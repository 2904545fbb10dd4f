"""What is learned of a recorded run: where to call the model, and the rows of weights, from products of tensors alone.

Nothing in here calls a model. Products are of float64, one matrix for each path, so that they can be added up over
batches and processes in one order, and a path be left out of the sum.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..core.solvers.ddim import ddim
from ..core.table import Levels, Row, Table

#: predictions that a row weighs, this one and earlier ones
HISTORY = 4
#: of the products of columns that are scaled to one: keeps collinear columns from large opposite weights
RIDGE = 1e-7
#: μ of [`joint_step`]: what a number moves the final sample by counts from a third of the next sample on. Without it
#: the step is too long to be taken on mixtures with known solutions; `benchmarks/calibration.py --curves damping`
#: compares values on the packaged models
DAMPING = 0.1


def prediction_term(alpha: float, sigma: float) -> str:
    """
    In what a call's prediction is weighed: x_0 where noise is most of the sample, ε where data are.

    The other one is nearly the sample itself there: what the model has said would be the small difference of two
    columns of a regression, on flows from pure noise one part in 4096.
    """
    return "data" if alpha < sigma else "prediction"


def columns_of(index: int) -> list[tuple[str, int]]:
    """What row `index` weighs: the sample, and the predictions of this call and up to three earlier ones."""
    return [("sample", 0), *(("call", lag) for lag in range(min(index + 1, HISTORY)))]


def ddim_weights(levels: Levels, index: int) -> np.ndarray:
    """The weights of DDIM for the columns of row `index`: what rows are pulled towards."""
    weights, row = np.zeros(len(columns_of(index))), ddim(levels, index)
    weights[:2] = row.get(("sample", 0), 0.0), row["data", 0]
    alpha, sigma = levels.alphas[index], levels.sigmas[index]
    if prediction_term(alpha, sigma) == "prediction":  # x_0 = (x − σ ε)/α
        weights[:2] = weights[0] + weights[1] / alpha, -weights[1] * sigma / alpha
    return weights


def fit_row(products: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """
    The weights w for which Σ_k w_k c_k is nearest to a target, in the sum of squares over all paths.

    Args:
        products (`np.ndarray` of shape `(columns + 1, columns + 1)`):
            Of the columns c_k and the target, which is the last one.
        prior (`np.ndarray` of shape `(columns,)`): What the weights are where the columns do not say.
    """
    gram, of_target = products[:-1, :-1], products[:-1, -1]
    scale = np.sqrt(gram.diagonal())
    scale = np.where(scale > 0, scale, 1.0)
    missed = (of_target - gram @ prior) / scale
    return prior + np.linalg.solve(gram / np.outer(scale, scale) + RIDGE * np.eye(len(gram)), missed) / scale


def missed_by(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """‖Σ_k w_k c_k − target‖² for `products` of shape `(..., columns + 1, columns + 1)`."""
    signed = np.append(weights, -1.0)
    return np.maximum(np.einsum("i,...ij,j->...", signed, products, signed), 0.0)


# --- where the model is called ---------------------------------------------------------------------------------------


def optimal_grids(products: np.ndarray, levels: Levels, counts: Sequence[int], power: float = 0.25) -> dict[int, list]:
    """
    For each number of calls the points of a recorded run whose rows miss it least.

    Dynamic programming over the points of a fine run is that of GITS (Chen et al., 2024,
    https://huggingface.co/papers/2405.11326); here a step costs what the best row of weights misses, not what Euler's
    does.

    A row from the points p and c to n is taken to be the best [x_c, c_c, c_p] → x_n, from the state of the recording.
    The sum of squares that it misses, of states scaled to α² + σ² = 1 and times α_n^{−2·power}, is what a step costs,
    and the grid is the cheapest path of `counts` steps, by dynamic programming over (p, c).

    Args:
        products (`np.ndarray` of shape `(2 M + 1, 2 M + 1)`):
            Of the M + 1 states and the M predictions of the recording, each as [`prediction_term`] says.
        levels ([`Levels`]): The points of the recording.
        counts (sequence of `int`): Numbers of calls, each at most M.
        power (`float`, defaults to 0.25): By how much an error near the data counts for more than one near the noise.

    Returns:
        `dict[int, list[int]]`: The points at which the model is called, the first one always.
    """
    points = len(levels)
    norm = np.hypot(levels.alphas, levels.sigmas)
    importance = norm**-2 * (levels.alphas / norm) ** (-2 * power)
    scale = np.sqrt(np.maximum(products.diagonal(), np.finfo(np.float64).tiny))
    scaled = products / np.outer(scale, scale)
    cost = np.full((points + 1, points, points + 1), np.inf)  # of (p, c, n); p = `points` where nothing was before
    for here in range(points):
        later = np.arange(here + 1, points + 1)
        for before in range(here) if here else [points]:
            columns = [here, points + 1 + here] + ([points + 1 + before] if here else [])
            gram = scaled[columns][:, columns] + RIDGE * np.eye(len(columns))
            of_target = scaled[columns][:, later]
            explained = np.einsum("in,in->n", of_target, np.linalg.solve(gram, of_target))
            cost[before, here, later] = np.maximum(1.0 - explained, 0.0) * scale[later] ** 2 * importance[later]
    spent = np.full((points + 1, points), np.inf)  # up to the call at c, with p before it
    spent[points, 0] = 0.0
    came_from: list[np.ndarray] = []
    grids: dict[int, list[int]] = {}
    for calls in range(1, max(counts) + 1):
        if calls in counts:
            last = int(np.argmin(spent + cost[:, :, points]))
            before, here = divmod(last, points)
            grid = [here]
            for earlier in reversed(came_from):
                before, here = int(earlier[before, here]), before
                grid.append(here)
            grids[calls] = grid[::-1]
        onward = spent[:, :, None] + cost[:, :, :points]
        came_from.append(onward.argmin(axis=0))
        spent = np.vstack([onward.min(axis=0), np.full((1, points), np.inf)])
    return grids


def nearest_points(timesteps: np.ndarray, levels: Levels, position) -> list[int] | None:
    """The points of a recording nearest to a grid's, by `position`, increasing in time; `None` if two are the same."""
    recorded = position(levels.timesteps)
    found = [int(np.abs(recorded - place).argmin()) for place in position(np.asarray(timesteps))]
    found[0] = 0
    return found if len(set(found)) == len(found) else None


# --- rows learned together -------------------------------------------------------------------------------------------


def whitened(products: np.ndarray) -> np.ndarray:
    """
    Directions in the weights of a row, as columns, each of which moves its result by a root mean square of one.

    Args:
        products (`np.ndarray` of shape `(columns, columns)`):
            Of the row's columns with each other, divided by the square of the norm of the final sample.

    Returns:
        `np.ndarray` of shape `(columns, columns)`: The directions.
    """
    values, vectors = np.linalg.eigh(products)
    values = np.maximum(values, 0.0)
    # 1/√value, but what the columns hardly span is left alone instead of being blown up
    return vectors * (np.sqrt(values) / (values + 1e-6 * products.diagonal().sum()))


def joint_step(products: np.ndarray) -> np.ndarray:
    """
    A damped step of Gauss and Newton for all numbers of a sampler together: −(Σ JᵀJ + n μ)⁻¹ Σ Jᵀ r.

    Args:
        products (`np.ndarray` of shape `(paths, directions + 1, directions + 1)`):
            For each of n paths the products of the columns of J, how its final sample changes with each number, and,
            last, of r, its error, both divided by the norm of the final sample.

    Returns:
        `np.ndarray` of shape `(directions,)`: What to add to each number.
    """
    total = products.sum(axis=0)
    return -np.linalg.solve(total[:-1, :-1] + len(products) * DAMPING * np.eye(len(total) - 1), total[:-1, -1])


# --- tables ----------------------------------------------------------------------------------------------------------


def table_of(levels: Levels, weights: Sequence[np.ndarray], learned_for: Mapping | None = None) -> Table:
    """The table of rows of weights for [`columns_of`]."""
    terms = [prediction_term(*pair) for pair in zip(levels.alphas[:-1], levels.sigmas[:-1], strict=True)]
    rows: list[Row] = []
    for index, row in enumerate(weights):
        names = [(terms[index - lag] if what == "call" else what, lag) for what, lag in columns_of(index)]
        rows.append({name: float(f"{weight:.9g}") for name, weight in zip(names, row, strict=True)})
    return Table(levels.timesteps, levels.alphas, levels.sigmas, tuple(rows), learned_for=learned_for)
