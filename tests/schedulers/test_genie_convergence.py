"""Orders of convergence on a Gaussian mixture, against an adaptive integration of the probability-flow ODE."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scipy.integrate import solve_ivp

from genie_diffusers import GenieInverseScheduler, GenieScheduler

# Continuous time, so that no rounding of timesteps comes in; a noisy end, since the last step to clean data is a DDIM
# step of a length that does not shrink.
CONFIG = {"continuous": True, "final_sigmas_type": "sigma_min"}
STEPS = (80, 160, 320)

every_grid = pytest.mark.parametrize("grid", ["quadratic", "uniform_lambda"])


class FirstOrderScheduler(GenieScheduler):
    """GENIE without derivatives and without history, which is DDIM."""

    def row(self, levels, index, known):
        return super().row(levels, index, known=1)


class Predictor(GenieScheduler):
    """GENIE without its corrector."""

    def correction(self, levels, index, known, predictor):
        return {}


class InversePredictor(GenieInverseScheduler):
    """The same from data to noise."""

    def correction(self, levels, index, known, predictor):
        return {}


@pytest.fixture(scope="module")
def exact(mixture, noise):
    """Initial samples at the noisiest time of a process, and where the ODE dx̄/d(log γ) = γ ε(x̄) takes them."""
    solved = {}

    def exact(process):
        ends = tuple(float(process.gamma(t)) for t in (process.timestep_max, process.timestep_min))
        if ends not in solved:
            solved[ends] = solve(ends)
        return solved[ends]

    def solve(ends):
        alphas = [1 / math.sqrt(1 + gamma**2) for gamma in ends]
        start = noise(16, 2)

        def velocity(log_gamma, flat):
            gamma = math.exp(log_gamma)
            alpha = 1 / math.sqrt(1 + gamma**2)
            sample = alpha * torch.from_numpy(flat).reshape(start.shape)
            return gamma * mixture.noise_prediction(sample, alpha, gamma * alpha).flatten().numpy()

        solution = solve_ivp(
            velocity, np.log(ends), start.flatten().numpy() / alphas[0], method="DOP853", rtol=1e-13, atol=1e-13
        )
        return start, alphas[1] * torch.from_numpy(solution.y[:, -1]).reshape(start.shape)

    return exact


@pytest.fixture(scope="module")
def error(run, exact):
    """The relative error of a scheduler whose timesteps are set."""

    def error(scheduler, process=None):
        start, end = exact(process or scheduler.process)
        if isinstance(scheduler, GenieInverseScheduler):
            start, end = end, start
        return float((run(scheduler, start).double() - end).norm() / end.norm())

    return error


@pytest.fixture(scope="module")
def errors(error):
    """The errors of a scheduler at several numbers of steps, attached to the slope source that is built for it."""

    @functools.cache
    def errors(scheduler_class, build_source=None, **config):
        scheduler = scheduler_class(**CONFIG, **config)
        if build_source is not None:
            scheduler.attach(build_source(scheduler))
        found = []
        for count in STEPS:
            scheduler.set_timesteps(count)
            found.append(error(scheduler))
        return np.array(found)

    return errors


def orders(errors: np.ndarray) -> np.ndarray:
    return np.log2(errors[:-1] / errors[1:])


@every_grid
@pytest.mark.parametrize("with_source", [True, False], ids=["slopes", "values"])
def test_taylor_converges_with_order_two(errors, slope_source, grid, with_source):
    found = errors(GenieScheduler, slope_source if with_source else None, method="taylor", time_grid=grid)
    np.testing.assert_allclose(orders(found), 2.0, atol=0.15)


@every_grid
def test_without_derivatives_and_history_it_converges_with_order_one(errors, grid):
    np.testing.assert_allclose(orders(errors(FirstOrderScheduler, method="taylor", time_grid=grid)), 1.0, atol=0.15)


@every_grid
@pytest.mark.parametrize(
    "order, with_source", [(1, False), (2, False), (3, False), (4, False), (2, True), (3, True), (4, True)]
)
def test_the_predictor_has_the_order_of_its_conditions(errors, slope_source, grid, order, with_source):
    """
    Even though it starts at a lower order: at the noisy end D is all but constant and its weight e^λ is small, so that
    what the first steps miss shows only far below the errors here.
    """
    found = errors(Predictor, slope_source if with_source else None, time_grid=grid, interpolation_order=order)
    if order == 4 and not with_source:  # the random function has no more derivatives than that needs
        assert np.all(orders(found) > 2.9)
        assert np.all(found < 0.3 * errors(Predictor, None, time_grid=grid, interpolation_order=3))
        return
    # in steps even in λ the errors of the higher orders change their sign on the way, and partly cancel
    np.testing.assert_allclose(orders(found), order, atol=0.15 if order < 3 else 0.45)


@pytest.mark.slow
@every_grid
@pytest.mark.parametrize(
    "order, with_source, expected",
    [(1, False, 2), (2, False, 3), (3, False, 3), (2, True, 3), (3, True, 4), (4, True, 4)],
)
def test_the_corrector_adds_an_order_up_to_its_own(errors, slope_source, grid, order, with_source, expected):
    """Its own is four with slopes at both ends of the step, three with values at both ends and one before."""
    source = slope_source if with_source else None
    corrected = errors(GenieScheduler, source, time_grid=grid, interpolation_order=order)
    if order < expected:
        np.testing.assert_allclose(orders(corrected), expected, atol=0.15 if order < 3 else 0.6)
    else:  # the corrector's own error is small beside that of the predictor, which is of a higher order after it
        assert np.all(orders(corrected) > expected)
    # a predictor of the corrector's own order is all but as good in the longest steps
    predicted = errors(Predictor, source, time_grid=grid, interpolation_order=order)
    assert np.all(corrected[1:] < 0.75 * predicted[1:]) and corrected[0] < predicted[0]


@every_grid
@pytest.mark.parametrize("with_source", [True, False], ids=["slopes", "values"])
def test_taylor_converges_with_order_two_from_data_to_noise(errors, slope_source, grid, with_source):
    found = errors(GenieInverseScheduler, slope_source if with_source else None, method="taylor", time_grid=grid)
    np.testing.assert_allclose(orders(found), 2.0, atol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("order, with_source", [(1, False), (2, False), (3, False), (2, True), (3, True), (4, True)])
def test_the_predictor_has_the_order_of_its_conditions_from_data_to_noise(errors, slope_source, order, with_source):
    source = slope_source if with_source else None
    found = errors(InversePredictor, source, time_grid="uniform_lambda", interpolation_order=order)
    np.testing.assert_allclose(orders(found), order, atol=0.45)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("with_source", [True, False], ids=["slopes", "values"])
def test_the_corrector_helps_from_data_to_noise(errors, slope_source, order, with_source):
    config = {"time_grid": "uniform_lambda", "interpolation_order": order}
    source = slope_source if with_source else None
    corrected, predicted = (errors(cls, source, **config)[1:] for cls in (GenieInverseScheduler, InversePredictor))
    assert np.all(corrected < 0.75 * predicted)


def test_a_slope_of_the_wrong_size_costs_the_order(errors, slope_source):
    """The measurements above can tell."""

    def build(scheduler):
        source = slope_source(scheduler)
        return lambda *args, **kwargs: 0.9 * source(*args, **kwargs)

    assert np.all(orders(errors(GenieScheduler, build, method="taylor", time_grid="quadratic")) < 1.5)
    assert np.all(orders(errors(GenieScheduler, build, time_grid="quadratic")) < 2.5)


@pytest.mark.parametrize("method", ["taylor", "hermite"])
def test_exact_slopes_beat_history_and_history_beats_none_at_equal_steps(errors, slope_source, method):
    config = {"time_grid": "quadratic"} | ({"method": "taylor"} if method == "taylor" else {"interpolation_order": 3})
    with_slopes, multistep = (errors(GenieScheduler, source, **config) for source in (slope_source, None))
    first_order = errors(FirstOrderScheduler, method="taylor", time_grid="quadratic")
    assert np.all(with_slopes < multistep)
    assert np.all(multistep < first_order)


#: fast samplers of diffusers, each with its final steps at full and at lower order
OF_DIFFUSERS = [
    (cls, {**options, "lower_order_final": lower_order_final})
    for cls, options in [
        (DPMSolverMultistepScheduler, {"solver_order": 1}),  # DDIM
        (DPMSolverMultistepScheduler, {"solver_order": 2}),
        (DPMSolverMultistepScheduler, {"solver_order": 3}),
        (DEISMultistepScheduler, {"solver_order": 3}),
        (UniPCMultistepScheduler, {"solver_order": 2}),
        (UniPCMultistepScheduler, {"solver_order": 3}),
    ]
    for lower_order_final in (True, False)
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers hands tensors to numpy
@pytest.mark.parametrize("steps, share", [(10, 3 / 4), (15, 2 / 5), (20, 1 / 4)])
def test_exact_slopes_leave_this_share_of_the_error_of_the_best_solver_of_diffusers(error, slope_source, steps, share):
    """With the same noise levels, each on the grid of its choice, of a model with a thousand timesteps."""
    ours, theirs = [], []
    for grid in ("uniform_lambda", "quadratic"):
        scheduler = GenieScheduler(time_grid=grid, final_sigmas_type="sigma_min")
        scheduler.attach(slope_source(scheduler))
        scheduler.set_timesteps(steps)
        ours.append(error(scheduler))
        for cls, options in OF_DIFFUSERS:
            other = cls(**options)
            other.set_timesteps(steps)
            other.timesteps, other.sigmas = scheduler.timesteps, scheduler.sigmas.float()
            theirs.append(error(other, scheduler.process))
    assert min(ours) < share * min(theirs)


@pytest.mark.parametrize("method", ["taylor", "hermite"])
@pytest.mark.parametrize("with_source", [True, False], ids=["with a source", "without a source"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("process", [{"continuous": True}, {"beta_schedule": "scaled_linear"}], ids=["continuous", ""])
def test_the_prediction_type_does_not_change_the_trajectory(
    run, noise, slope_source, process, prediction_type, with_source, method
):
    def sample(prediction_type):
        scheduler = GenieScheduler(**process, method=method, time_grid="quadratic", prediction_type=prediction_type)
        if with_source:
            scheduler.attach(slope_source(scheduler))
        scheduler.set_timesteps(8)
        return run(scheduler, noise(5, 2))

    torch.testing.assert_close(sample(prediction_type), sample("epsilon"), rtol=1e-10, atol=1e-10)


def test_a_correction_is_an_increment_to_the_sample_it_is_given(mixture, noise, slope_source):
    """An edit between steps moves the next sample as if there were no corrector: by the weight of the sample in it."""
    ends = []
    for edit in (0.0, 0.25):
        scheduler = GenieScheduler(**CONFIG, time_grid="uniform_lambda")
        scheduler.attach(lambda sample, noise_prediction, timestep, **kwargs: torch.ones_like(sample))
        scheduler.set_timesteps(4)
        sample, fixed_data = noise(5, 2), noise(5, 2, seed=1)
        for index, timestep in enumerate(scheduler.timesteps[:2]):
            sample = sample + edit * index  # before the model is called for the second time
            alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
            sample = scheduler.step((sample - alpha * fixed_data) / sigma, timestep, sample).prev_sample
        ends.append(sample)
    assert scheduler.table.corrections[1], "the second step has a corrector"
    torch.testing.assert_close(ends[1] - ends[0], torch.full((5, 2), 0.25).double() * scheduler.table[1]["sample", 0])
