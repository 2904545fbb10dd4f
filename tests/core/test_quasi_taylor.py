"""The weights of quasi-Taylor steps: against symbolic (Itô–)Taylor expansions, and their rates of convergence."""

import math

import numpy as np
import pytest
import sympy as sp

from genie_diffusers.core.solvers.quasi_taylor import METHODS, departure, limit_weights, taylor_weights

t, x, score, h, u = sp.symbols("t x S h u", positive=True)
#: ᾱ(t) of the linear, squared-cosine and quadratic-β (`"scaled_linear"`) schedules, in continuous time
ALPHAS_CUMPROD = {
    "linear": sp.exp(-(t / 10 + sp.Rational(199, 20) * t**2)),
    "cosine": sp.cos((t + sp.Rational(1, 125)) / sp.Rational(126, 125) * sp.pi / 2) ** 2,
    "scaled_linear": sp.exp(-sp.integrate((sp.Rational(9, 10) + sp.Rational(5, 2) * t) ** 2, t)),
}
STEPS = {sp.Rational(1, 2): sp.Rational(1, 50), sp.Rational(9, 10): sp.Rational(1, 10)}  # at a time, and its length
every_schedule = pytest.mark.parametrize("schedule", ALPHAS_CUMPROD)
every_order = pytest.mark.parametrize("order", [1, 2, 3])
every_method = pytest.mark.parametrize("method", METHODS)


class Symbolic:
    """The schedule in symbols, and the expansions of the paper by repeated application of its operators."""

    def __init__(self, schedule: str):
        self.alpha_cumprod = ALPHAS_CUMPROD[schedule]
        self.beta = sp.simplify(-sp.diff(sp.log(self.alpha_cumprod), t))
        self.nu = 1 - self.alpha_cumprod

    def at(self, time) -> tuple[list[np.ndarray], np.ndarray]:
        """β and its derivatives, and ν, in float64."""
        betas = [np.array([float(sp.diff(self.beta, t, k).subs(t, time).evalf(30))]) for k in range(3)]
        return betas, np.array([float(self.nu.subs(t, time).evalf(30))])

    def along(self, f, method: str):
        """df/dh of f(x, S, t) along a step back in time, ideal derivatives ∂S/∂x and ∂S/∂t put in."""
        root = sp.sqrt(self.nu)
        share = sp.Rational(1, 2) if method == "ode" else 1
        drift = self.beta / 2 * x - share * self.beta * score / root
        in_x, in_t = 1 / root, self.beta / (2 * root) * (x - score / root)
        of_score = in_x * drift - in_t  # all are linear in x and S: no second derivatives
        return sp.diff(f, x) * drift + sp.diff(f, score) * of_score - sp.diff(f, t)

    def diffused(self, f):
        """The coefficient of dW in df."""
        return sp.sqrt(self.beta) * (sp.diff(f, x) + sp.diff(f, score) / sp.sqrt(self.nu))

    def mean(self, method: str, order: int):
        f = total = x
        for k in range(1, order + 1):
            f = self.along(f, method)
            total += f * h**k / sp.factorial(k)
        return total

    def noise_kernel(self, order: int):
        """Σ c_{ab} u^a/a! (h−u)^b/b!, c_{ab} the coefficient of the integral over a times, then dW_u, then b times."""
        kernel = 0
        for a in range(order):
            for b in range(order - a):
                coefficient = x
                for _ in range(b):
                    coefficient = self.along(coefficient, "sde")
                coefficient = self.diffused(coefficient)
                for _ in range(a):
                    coefficient = self.along(coefficient, "sde")
                kernel += coefficient * u**a / sp.factorial(a) * (h - u) ** b / sp.factorial(b)
        return kernel


def exactly(expression, time, step) -> float:
    return float(expression.subs({t: time, h: step}).evalf(30))


@every_method
@every_order
@every_schedule
def test_weights_are_those_of_the_expansion_with_ideal_derivatives(schedule, order, method):
    symbolic = Symbolic(schedule)
    mean = symbolic.mean(method, order)
    rho, w = sp.diff(mean, x), sp.diff(mean, score)
    kernel = symbolic.noise_kernel(order) if method == "sde" else sp.Integer(0)
    for time, step in STEPS.items():
        weights = taylor_weights(method, order, np.array([float(step)]), *symbolic.at(time))
        assert weights.sample[0] == pytest.approx(exactly(rho, time, step), rel=1e-12)
        assert weights.prediction[0] == pytest.approx(exactly(w, time, step), rel=1e-12)
        variance = float(sp.integrate(sp.expand(kernel.subs({t: time, h: step}).evalf(30) ** 2), (u, 0, step)))
        assert weights.noise[0] ** 2 == pytest.approx(variance, rel=1e-12, abs=0)


@every_order
@every_schedule
def test_the_ode_scheme_is_ddim_with_taylor_polynomials_for_the_next_alpha_and_sigma(schedule, order):
    symbolic = Symbolic(schedule)
    time, step = sp.Rational(9, 10), sp.Rational(1, 10)
    alpha, sigma = sp.sqrt(symbolic.alpha_cumprod), sp.sqrt(symbolic.nu)
    polynomials = [
        sum(sp.diff(level, t, k) * (-h) ** k / sp.factorial(k) for k in range(order + 1)) for level in (alpha, sigma)
    ]
    weights = taylor_weights("ode", order, np.array([float(step)]), *symbolic.at(time))
    alpha, sigma, alpha_next, sigma_next = (exactly(f, time, step) for f in (alpha, sigma, *polynomials))
    assert weights.sample[0] == pytest.approx(alpha_next / alpha, rel=1e-12)
    assert weights.prediction[0] == pytest.approx(sigma_next - alpha_next / alpha * sigma, rel=1e-12)


def levels(schedule: str, time: float, steps: np.ndarray) -> list[np.ndarray]:
    alpha_cumprod = sp.lambdify(t, ALPHAS_CUMPROD[schedule])
    now, then = np.full_like(steps, alpha_cumprod(time)), alpha_cumprod(time - steps)
    return [np.sqrt(now), np.sqrt(1 - now), np.sqrt(then), np.sqrt(1 - then)]


@every_method
@every_order
@every_schedule
def test_a_step_departs_from_its_limit_as_the_order_and_one(schedule, order, method):
    """From DDIM, or from the mean and the variance of the DDPM posterior."""
    steps, time = 0.02 * 2.0 ** -np.arange(4), sp.Rational(2, 5)
    betas, nu = Symbolic(schedule).at(time)
    weights = taylor_weights(method, order, steps, [beta.repeat(4) for beta in betas], nu.repeat(4))
    limit = limit_weights(method, *levels(schedule, float(time), steps))
    of_mean = np.hypot(weights.sample - limit.sample, weights.prediction - limit.prediction)
    of_variance = np.abs(weights.noise**2 - limit.noise**2)
    for error in [of_mean, of_variance] if method == "sde" else [of_mean]:
        np.testing.assert_allclose(np.log2(error[:-1] / error[1:]), order + 1, atol=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_limits_are_ddim_and_the_ddpm_posterior(method):
    alpha, sigma, alpha_next, sigma_next = levels("linear", 0.5, np.array([0.1]))
    limit = limit_weights(method, alpha, sigma, alpha_next, sigma_next)
    data, noise = 0.7, -1.3
    sample = alpha * data + sigma * noise
    mean = limit.sample * sample + limit.prediction * noise
    if method == "ode":
        np.testing.assert_allclose(mean, alpha_next * data + sigma_next * noise, rtol=1e-14)
        assert limit.noise == 0
        return
    # Ho et al. (2020), Eqs. (6) and (7), with 1 − β of the step = ᾱ_t/ᾱ_{t−1}
    beta = 1 - alpha**2 / alpha_next**2
    expected = alpha_next * beta / sigma**2 * data + np.sqrt(1 - beta) * sigma_next**2 / sigma**2 * sample
    np.testing.assert_allclose(mean, expected, rtol=1e-13)
    np.testing.assert_allclose(limit.noise**2, sigma_next**2 / sigma**2 * beta, rtol=1e-13)


def test_the_noise_of_order_two_has_the_covariance_of_its_three_integrals():
    """n = √β w − β̇/(2√β) u + β^{3/2}(ν−2)/(2ν) z, by the covariance of (w, u, z)."""
    step, beta, beta_dot, nu = 0.3, 0.8, 1.7, 0.4
    covariance = np.array(
        [
            [step, step**2 / 2, step**2 / 2],
            [step**2 / 2, step**3 / 3, step**3 / 6],
            [step**2 / 2, step**3 / 6, step**3 / 3],
        ]
    )
    weights = np.array([math.sqrt(beta), -beta_dot / (2 * math.sqrt(beta)), beta**1.5 * (nu - 2) / (2 * nu)])
    arguments = [np.array([value]) for value in (step, beta, beta_dot, nu)]
    noise = taylor_weights("sde", 2, arguments[0], arguments[1:3], arguments[3]).noise
    np.testing.assert_allclose(noise**2, weights @ covariance @ weights, rtol=1e-14)


@every_order
def test_the_variance_of_the_noise_is_never_negative(order):
    generator = np.random.default_rng(0)
    step, beta, nu = 10.0 ** generator.uniform([-3, -3, -4], [3, 3, 0], (10_000, 3)).T
    derivatives = generator.normal(size=(2, 10_000)) * 10.0 ** generator.uniform(-3, 3, 10_000)
    noise = taylor_weights("sde", order, step, [beta, *derivatives], nu).noise
    assert np.isfinite(noise).all() and (noise >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_departure_is_the_relative_error_for_a_single_data_point(method):
    alpha, sigma, alpha_next, sigma_next = levels("linear", 0.5, np.array([0.1]))
    limit = limit_weights(method, alpha, sigma, alpha_next, sigma_next)
    arguments = (limit, sigma, alpha_next, sigma_next)
    np.testing.assert_allclose(departure(limit, *arguments), 0, atol=1e-15)
    more_data = limit._replace(sample=1.5 * limit.sample, prediction=limit.prediction - 0.5 * limit.sample * sigma)
    np.testing.assert_allclose(departure(more_data, *arguments), 0.5)
    more_noise = limit._replace(prediction=limit.prediction + 0.2 * sigma_next)
    np.testing.assert_allclose(departure(more_noise, *arguments), 0.2)
    more_fresh_noise = limit._replace(noise=limit.noise + 0.3 * sigma_next)
    np.testing.assert_allclose(departure(more_fresh_noise, *arguments), 0.3)
