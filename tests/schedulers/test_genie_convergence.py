"""Orders of convergence on a Gaussian mixture, against an adaptive integration of the probability-flow ODE."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from genie_diffusers import GenieScheduler
from genie_diffusers.schedulers.interpolation import exponential_moments, interpolation_weights
from genie_diffusers.schedulers.scheduling_utils import TableScheduler

# Continuous time, so that no rounding of timesteps comes in; a noisy end, since the last step to clean data is a DDIM
# step of a length that does not shrink.
CONFIG = {"continuous": True, "final_sigmas_type": "sigma_min"}
STEPS = (80, 160, 320)


class FirstOrderScheduler(GenieScheduler):
    """GENIE without derivatives and without history, which is DDIM."""

    def row(self, index, known):
        return super().row(index, known=1)


@pytest.fixture
def exact(mixture, noise):
    """Initial samples at the noisiest time, and where the ODE dx̄/d(log γ) = γ ε(x̄) takes them."""
    process = GenieScheduler(**CONFIG).process
    ends = [float(process.gamma(t)) for t in (process.timestep_max, process.timestep_min)]
    alphas = [1 / math.sqrt(1 + gamma**2) for gamma in ends]
    start = noise(6, 2)

    def velocity(log_gamma, flat):
        gamma = math.exp(log_gamma)
        alpha = 1 / math.sqrt(1 + gamma**2)
        sample = alpha * torch.from_numpy(flat).reshape(start.shape)
        return gamma * mixture.noise_prediction(sample, alpha, gamma * alpha).flatten().numpy()

    solution = solve_ivp(
        velocity, np.log(ends), start.flatten().numpy() / alphas[0], method="DOP853", rtol=1e-12, atol=1e-12
    )
    return start, alphas[1] * torch.from_numpy(solution.y[:, -1]).reshape(start.shape)


@pytest.fixture
def errors(run, exact):
    """The errors of a scheduler at several numbers of steps, attached to the slope source that is built for it."""

    def errors(scheduler, build_source=None):
        start, end = exact
        if build_source is not None:
            scheduler.attach(build_source(scheduler))
        found = []
        for count in STEPS:
            scheduler.set_timesteps(count)
            found.append(float((run(scheduler, start) - end).norm() / end.norm()))
        return np.array(found)

    return errors


def orders(errors: np.ndarray) -> np.ndarray:
    return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize("grid", ["quadratic", "uniform_lambda"])
def test_taylor_with_exact_slopes_converges_with_order_two(errors, slope_source, grid):
    found = errors(GenieScheduler(**CONFIG, time_grid=grid), slope_source)
    np.testing.assert_allclose(orders(found), 2.0, atol=0.15)


@pytest.mark.parametrize("grid", ["quadratic", "uniform_lambda"])
def test_multistep_fallback_without_a_source_converges_with_order_two(errors, grid):
    np.testing.assert_allclose(orders(errors(GenieScheduler(**CONFIG, time_grid=grid))), 2.0, atol=0.15)


@pytest.mark.parametrize("grid", ["quadratic", "uniform_lambda"])
def test_without_derivatives_and_history_it_converges_with_order_one(errors, grid):
    np.testing.assert_allclose(orders(errors(FirstOrderScheduler(**CONFIG, time_grid=grid))), 1.0, atol=0.15)


def test_a_slope_of_the_wrong_size_costs_the_second_order(errors, slope_source):
    """The measurement above can tell."""

    def build(scheduler):
        source = slope_source(scheduler)
        return lambda *args, **kwargs: 0.9 * source(*args, **kwargs)

    assert np.all(orders(errors(GenieScheduler(**CONFIG, time_grid="quadratic"), build)) < 1.5)


def test_exact_slopes_beat_history_and_history_beats_none_at_equal_steps(errors, slope_source):
    taylor = errors(GenieScheduler(**CONFIG, time_grid="quadratic"), slope_source)
    multistep = errors(GenieScheduler(**CONFIG, time_grid="quadratic"))
    first_order = errors(FirstOrderScheduler(**CONFIG, time_grid="quadratic"))
    assert np.all(taylor < multistep)
    assert np.all(multistep < first_order)


@pytest.mark.parametrize("with_source", [True, False], ids=["with a source", "without a source"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("process", [{"continuous": True}, {"beta_schedule": "scaled_linear"}], ids=["continuous", ""])
def test_the_prediction_type_does_not_change_the_trajectory(
    run, noise, slope_source, process, prediction_type, with_source
):
    def sample(prediction_type):
        scheduler = GenieScheduler(**process, time_grid="quadratic", prediction_type=prediction_type)
        if with_source:
            scheduler.attach(slope_source(scheduler))
        scheduler.set_timesteps(8)
        return run(scheduler, noise(5, 2))

    torch.testing.assert_close(sample(prediction_type), sample("epsilon"), rtol=1e-10, atol=1e-10)


class DataFormPredictorCorrector(GenieScheduler):
    """
    What a later solver would define: order 2 on the data prediction with exact derivatives, and a cubic corrector.

    x' = (σ'/σ) x + σ' ∫ e^λ D dλ, D interpolated from values and derivatives dD/dλ = −(σ/α) dε/dλ.
    """

    data_form = True

    def integral(self, start: int, conditions: list[tuple[str, int]]) -> dict:
        """Weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
        nodes = [self.lambdas[point] - self.lambdas[start] for _, point in conditions]
        derivatives = [int(what == "slope") for what, _ in conditions]
        step = self.lambdas[start + 1] - self.lambdas[start]
        weights = interpolation_weights(nodes, derivatives, exponential_moments(step, len(nodes), rate=1.0))
        weights *= self.noise_stds[start + 1] * np.exp(self.lambdas[start])
        return {
            (what, point): weight * (-self.noise_stds[point] / self.alphas[point] if what == "slope" else 1.0)
            for (what, point), weight in zip(conditions, weights, strict=True)
        }

    def row(self, index, known):
        known_here = self.integral(index, [("prediction", index), ("slope", index)])
        return {("sample", 0): self.noise_stds[index + 1] / self.noise_stds[index]} | {
            (what, index - point): weight for (what, point), weight in known_here.items()
        }

    def correction(self, index, known):
        if known == 1:
            return {}
        predicted = self.integral(index - 1, [(what, index - 1) for what in ("prediction", "slope")])
        both_ends = [(what, point) for what in ("prediction", "slope") for point in (index - 1, index)]
        return {
            (what, index - point): weight - predicted.get((what, point), 0.0)
            for (what, point), weight in self.integral(index - 1, both_ends).items()
        }


def test_engine_runs_a_predictor_corrector_on_the_data_prediction_with_its_order(errors, slope_source):
    """The corrector lifts a predictor of order 2 to order 3; without it the same rows have order 2."""
    config = {**CONFIG, "time_grid": "uniform_lambda"}
    corrected = errors(DataFormPredictorCorrector(**config), slope_source)
    predictor = type("Predictor", (DataFormPredictorCorrector,), {"correction": TableScheduler.correction})
    plain = errors(predictor(**config), slope_source)
    np.testing.assert_allclose(orders(corrected), 3.0, atol=0.2)
    np.testing.assert_allclose(orders(plain), 2.0, atol=0.2)
    assert (corrected < 0.1 * plain).all()


def test_a_correction_is_an_increment_to_the_sample_it_is_given(mixture, noise, slope_source):
    """An edit between steps moves the next sample as if there were no corrector: by the weight of the sample in it."""
    ends = []
    for edit in (0.0, 0.25):
        scheduler = DataFormPredictorCorrector(**CONFIG, time_grid="uniform_lambda")
        scheduler.attach(lambda sample, noise_prediction, timestep, **kwargs: torch.ones_like(sample))
        scheduler.set_timesteps(4)
        sample, fixed_data = noise(5, 2), noise(5, 2, seed=1)
        for index, timestep in enumerate(scheduler.timesteps[:2]):
            sample = sample + edit * index  # before the model is called for the second time
            alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
            sample = scheduler.step((sample - alpha * fixed_data) / sigma, timestep, sample).prev_sample
        ends.append(sample)
    assert scheduler.corrections[1], "the second step has a corrector"
    torch.testing.assert_close(ends[1] - ends[0], torch.full((5, 2), 0.25).double() * scheduler.table[1]["sample", 0])
