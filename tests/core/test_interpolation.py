import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad

from genie_diffusers.core.interpolation import exponential_moments, interpolation_weights, polynomial_moments

# diffusers calls `np.array` on a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:`algorithm_types:FutureWarning")

STEPS = (1e-6, 1e-3, 0.1, 1.0, 4.0, 12.0, 40.0)


@st.composite
def conditions(draw):
    """Up to six known values and derivatives at distinct points that determine a polynomial."""
    known = draw(
        st.lists(
            st.tuples(st.integers(-8, 4).map(lambda i: i / 4), st.integers(0, 2)), min_size=1, max_size=6, unique=True
        )
    )
    # Conditions on derivatives alone may leave the polynomial open (any constant has the same derivatives).
    rows = [[math.perm(m, d) * u ** (m - d) if m >= d else 0.0 for m in range(len(known))] for u, d in known]
    assume(np.linalg.cond(np.array(rows)) < 1e6)
    return [u for u, _ in known], [d for _, d in known]


coefficients = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


@given(conditions=conditions(), coefficients=coefficients, step=st.floats(0.05, 2), rate=st.sampled_from([0, 1, -1]))
def test_weights_integrate_every_polynomial_of_their_degree_exactly(conditions, coefficients, step, rate):
    nodes, derivatives = conditions
    polynomial = np.polynomial.Polynomial(coefficients[: len(nodes)])
    known = [polynomial.deriv(d)(u) if d else polynomial(u) for u, d in zip(nodes, derivatives, strict=True)]
    moments = exponential_moments(step, len(nodes), rate) if rate else polynomial_moments(step, len(nodes))
    expected = quad(lambda u: math.exp(rate * u) * polynomial(u), 0, step, epsabs=1e-12)[0]
    assert interpolation_weights(nodes, derivatives, moments) @ known == pytest.approx(expected, rel=1e-7, abs=1e-7)


@given(conditions=conditions(), scale=st.sampled_from([1e-6, 1e-3, 50.0]))
def test_weights_scale_with_the_unit_of_the_step(conditions, scale):
    nodes, derivatives = conditions
    weights = interpolation_weights(nodes, derivatives, polynomial_moments(1.0, len(nodes)))
    moments = polynomial_moments(scale, len(nodes))
    scaled = interpolation_weights([scale * u for u in nodes], derivatives, moments)
    in_steps = scaled / scale ** (1.0 + np.array(derivatives))
    np.testing.assert_allclose(in_steps, weights, rtol=0, atol=1e-9 * np.abs(weights).max())


@pytest.mark.parametrize("step", [0.3, -0.3])
def test_value_and_derivative_give_the_second_taylor_method(step):
    weights = interpolation_weights([0, 0], [0, 1], polynomial_moments(step, 2))
    np.testing.assert_allclose(weights, [step, step**2 / 2], rtol=1e-13)


@pytest.mark.parametrize(("step", "previous"), [(0.3, 0.3), (0.3, 0.7), (-0.2, -0.05)])
def test_two_values_give_the_adams_bashforth_method_of_variable_step(step, previous):
    weights = interpolation_weights([0, -previous], [0, 0], polynomial_moments(step, 2))
    ratio = step / previous
    np.testing.assert_allclose(weights, [step * (1 + ratio / 2), -step * ratio / 2], rtol=1e-13)


def test_values_at_both_ends_give_the_trapezoidal_rule_and_with_derivatives_its_fourth_order_correction():
    np.testing.assert_allclose(interpolation_weights([0, 0.4], [0, 0], polynomial_moments(0.4, 2)), [0.2, 0.2])
    hermite = interpolation_weights([0, 0.4, 0, 0.4], [0, 0, 1, 1], polynomial_moments(0.4, 4))
    np.testing.assert_allclose(hermite, [0.2, 0.2, 0.4**2 / 12, -(0.4**2) / 12], rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_two_values_against_the_exponential_kernel_are_dpm_solver_2m_as_diffusers_runs_it(algorithm):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_type="heun", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(5)
    scheduler._step_index = 2
    sigmas = scheduler.sigmas.double().numpy()
    (alpha, alpha_next), gammas = 1 / np.sqrt(1 + sigmas[2:4] ** 2), sigmas[1:4]
    lambdas = -np.log(gammas)
    step, previous = lambdas[2] - lambdas[1], lambdas[0] - lambdas[1]

    def theirs(*unit):
        """The weight of one of (sample, current, previous): their update is linear, so feed it ones and zeros."""
        sample, current, old = (torch.tensor([float(value)]) for value in unit)
        return float(scheduler.multistep_dpm_solver_second_order_update([old, current], sample=sample))

    if algorithm == "dpmsolver++":  # Eq. (4): data form
        of_sample = gammas[2] * alpha_next / (gammas[1] * alpha)
        kernel, rate = gammas[2] * alpha_next / gammas[1], 1.0
    else:  # Eq. (5): noise form
        of_sample = alpha_next / alpha
        kernel, rate = -alpha_next * gammas[1], -1.0
    weights = kernel * interpolation_weights([0, previous], [0, 0], exponential_moments(step, 2, rate))
    expected = [theirs(1, 0, 0), theirs(0, 1, 0), theirs(0, 0, 1)]
    np.testing.assert_allclose([of_sample, *weights], expected, rtol=2e-4)


@pytest.mark.parametrize("rate", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("step", STEPS)
def test_exponential_moments_are_their_integrals(step, rate):
    expected = [quad(lambda u, m=m: math.exp(rate * u) * u**m, 0, step, epsrel=1e-12)[0] for m in range(6)]
    np.testing.assert_allclose(exponential_moments(step, 6, rate), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("step", [*STEPS, -0.5])
def test_polynomial_moments_are_their_integrals(step):
    expected = [quad(lambda u, m=m: u**m, 0, step)[0] for m in range(6)]
    np.testing.assert_allclose(polynomial_moments(step, 6), expected, rtol=1e-12, atol=0)


def test_exponential_moments_of_rate_zero_are_polynomial_moments():
    np.testing.assert_allclose(exponential_moments(0.7, 5, 0.0), polynomial_moments(0.7, 5), rtol=1e-14)


@pytest.mark.parametrize(("nodes", "derivatives"), [([0, 0], [0, 0]), ([0, -1], [1, 1])])
def test_conditions_that_do_not_determine_the_polynomial_are_refused(nodes, derivatives):
    with pytest.raises(np.linalg.LinAlgError):
        interpolation_weights(nodes, derivatives, polynomial_moments(0.5, 2))


def test_every_condition_needs_a_node_and_a_derivative():
    with pytest.raises(ValueError, match="zip"):
        interpolation_weights([0, -1], [0], polynomial_moments(0.5, 2))
