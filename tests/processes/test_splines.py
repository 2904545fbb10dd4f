"""The functions that carry a noise schedule between its timesteps, against those of scipy."""

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator, make_interp_spline

from genie_diffusers.processes.splines import InterpolatingSpline, MonotoneCubic


def cosine(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, decreasing values, and where to look: between the points, on them, and a little beyond."""
    points = np.arange(-1.0, count - 1)
    return points, np.cos((points + 1) / count), np.linspace(-1.2, count - 1.8, 301).reshape(7, 43)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 30, 1001])
def test_spline_and_its_derivatives_are_those_of_scipy(count):
    points, values, between = cosine(count)
    theirs, spline = make_interp_spline(points, values, k=min(5, count - 1)), InterpolatingSpline(points, values)
    for nu in range(4):
        np.testing.assert_allclose(spline(between, nu), theirs(between, nu=nu), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(spline.weights, theirs.c, rtol=1e-13)
    np.testing.assert_allclose(spline(points), values, rtol=1e-15)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.95])
def test_monotone_cubic_is_that_of_scipy(ratio):
    points = np.arange(-1.0, 20)
    values = np.cumprod(np.where(points % 5 == 2, ratio, 0.99))
    theirs, cubic, between = PchipInterpolator(points, values), MonotoneCubic(points, values), np.linspace(-1, 19, 500)
    for nu in range(3):
        np.testing.assert_allclose(cubic(between, nu), theirs(between, nu=nu), rtol=1e-10, atol=1e-13)
    assert np.all(np.diff(cubic(between)) < 0)


def test_a_number_gives_a_number():
    points, values, _ = cosine(9)
    assert InterpolatingSpline(points, values)(0.5).shape == ()
