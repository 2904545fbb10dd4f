import numpy as np
import pytest

from genie_diffusers import RectifiedFlow, VariancePreserving
from genie_diffusers.calibration.fitting import (
    columns_of,
    ddim_weights,
    fit_row,
    joint_step,
    missed_by,
    nearest_points,
    optimal_grids,
    prediction_term,
    table_of,
    whitened,
)
from genie_diffusers.core.solvers.ddim import ddim
from genie_diffusers.core.table import Levels


def levels_of(process, timesteps) -> Levels:
    timesteps = np.asarray(timesteps, dtype=np.float64)
    return Levels(
        timesteps, np.append(process.alpha(timesteps), 1.0), np.append(process.sigma(timesteps), 0.0), process
    )


def products(*columns) -> np.ndarray:
    stacked = np.stack(columns)
    return stacked @ stacked.T


def test_rows_of_least_squares_are_the_exact_ones_where_there_are_any():
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((4, 500))
    weights = np.array([0.7, -1.3, 0.4, 2.0])
    found = fit_row(products(*columns, weights @ columns), np.zeros(4))
    np.testing.assert_allclose(found, weights, rtol=1e-5)
    assert missed_by(products(*columns, weights @ columns), weights) < 1e-12 * 500
    np.testing.assert_allclose(missed_by(products(*columns, weights @ columns), 0 * weights) ** 0.5,
                               np.linalg.norm(weights @ columns))  # fmt: skip


def test_what_the_columns_do_not_say_is_that_of_the_prior():
    rng = np.random.default_rng(0)
    column = rng.standard_normal(100)
    # two equal columns: their sum is known, and the prior says how it is shared
    found = fit_row(products(column, column, 3 * column), np.array([2.0, 0.0]))
    np.testing.assert_allclose(found, [2.5, 0.5], rtol=1e-5)


@pytest.mark.parametrize("process", [VariancePreserving(), RectifiedFlow()])
def test_the_prior_is_ddim(process):
    levels = levels_of(process, [999.0, 700.0, 300.0, 50.0])
    rng = np.random.default_rng(1)
    for index in range(4):
        sample, noise = rng.standard_normal((2, 20))
        alpha, sigma = levels.alphas[index], levels.sigmas[index]
        data = (sample - sigma * noise) / alpha
        term = prediction_term(alpha, sigma)
        weights = ddim_weights(levels, index)
        found = weights[0] * sample + weights[1] * (data if term == "data" else noise)
        terms = {"sample": sample, "data": data, "prediction": noise}
        expected = sum(weight * terms[what] for (what, _), weight in ddim(levels, index, 1).items())
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert not weights[2:].any() and len(weights) == len(columns_of(index))


@pytest.mark.parametrize("process", [VariancePreserving(), RectifiedFlow()])
def test_the_grid_by_dynamic_programming_is_the_cheapest_of_all(process):
    """Against every subset of the points of a small recording of curved paths."""
    from itertools import combinations

    levels = levels_of(process, np.linspace(process.timestep_max, process.timestep_min, 8))
    rng = np.random.default_rng(2)
    path = np.cumsum(rng.standard_normal((9, 40)) * np.linspace(0.2, 1, 9)[:, None], axis=0)
    calls = rng.standard_normal((8, 40)) + path[:8]
    gram = products(*path, *calls)
    grids = optimal_grids(gram, levels, [1, 2, 3, 4], power=0.25)
    norm = np.hypot(levels.alphas, levels.sigmas)

    def cost(points):
        total = 0.0
        for place, (here, following) in enumerate(zip(points, [*points[1:], 8], strict=True)):
            columns = [path[here], calls[here]] + ([calls[points[place - 1]]] if place else [])
            matrix = np.stack(columns, axis=1)
            missed = path[following] - matrix @ np.linalg.lstsq(matrix, path[following], rcond=None)[0]
            total += (missed @ missed) / norm[following] ** 2 * (norm[following] / levels.alphas[following]) ** 0.5
        return total

    for count, found in grids.items():
        every = [[0, *rest] for rest in combinations(range(1, 8), count - 1)]
        assert cost(found) == pytest.approx(min(map(cost, every)), rel=1e-4)


def test_grids_are_moved_to_points_of_the_recording():
    levels = levels_of(VariancePreserving(), [999, 600, 300, 100, 20])
    assert nearest_points(np.array([990.0, 320.0, 15.0]), levels, lambda t: t) == [0, 2, 4]
    assert nearest_points(np.array([990.0, 320.0, 310.0]), levels, lambda t: t) is None


def test_whitened_directions_move_the_result_by_one():
    rng = np.random.default_rng(3)
    columns = rng.standard_normal((3, 3)) @ rng.standard_normal((3, 400))
    matrix = whitened(products(*columns))
    moved = matrix.T @ columns
    np.testing.assert_allclose(moved @ moved.T, np.eye(3), atol=1e-2)


def linear_paths(count, directions, numbers, noise, seed=0):
    """Errors r = −J z + noise of paths: z is what a step should find."""
    rng = np.random.default_rng(seed)
    step = rng.standard_normal(directions)
    found = []
    for _ in range(count):
        changes = rng.standard_normal((directions, numbers))
        error = -step @ changes + noise * rng.standard_normal(numbers)
        found.append(products(*changes, error))
    return step, found


def test_a_step_of_all_numbers_is_the_damped_one_of_a_linear_problem():
    step, of_paths = linear_paths(count=8, directions=5, numbers=60, noise=0.0)
    # JᵀJ is 60 on the diagonal: the step is a sixtieth of a tenth short
    np.testing.assert_allclose(joint_step(np.stack(of_paths)), step, rtol=2e-2)
    flat = np.stack(of_paths) * 1e-6  # what hardly moves the final sample is left alone
    assert np.abs(joint_step(flat)).max() < 1e-2


def test_tables_of_weights_name_what_they_weigh():
    levels = levels_of(VariancePreserving(), [999, 600, 20])
    table = table_of(levels, [np.arange(1.0, 3 + index) for index in range(3)], {"mu": 1.0})
    assert table.rows[0] == {("sample", 0): 1.0, ("data", 0): 2.0}
    assert table.rows[2] == {("sample", 0): 1.0, ("prediction", 0): 2.0, ("data", 1): 3.0, ("data", 2): 4.0}
    assert type(table).from_dict(table.to_dict(), VariancePreserving(), 3) == table
