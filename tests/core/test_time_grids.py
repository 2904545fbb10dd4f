import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from scipy.stats import beta

from genie_diffusers import GenieScheduler, VariancePreserving
from genie_diffusers.core.time_grids import (
    TIME_GRIDS,
    TIMESTEP_SPACINGS,
    beta_quantiles,
    distinct_integers,
    spaced_timesteps,
    time_grid,
)

# diffusers calls `np.array` on a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:`algorithm_types:FutureWarning")

GRIDS = (*TIME_GRIDS, *TIMESTEP_SPACINGS)
SCHEDULES = {
    "linear": {"num_train_timesteps": 40, "beta_end": 0.3},
    "squaredcos_cap_v2": {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"},
    "zero SNR": {"num_train_timesteps": 40, "beta_end": 0.3, "rescale_betas_zero_snr": True},
}


def assert_is_a_grid(scheduler: GenieScheduler, count: int):
    timesteps = scheduler.timesteps.numpy()
    process = scheduler.process
    assert len(timesteps) == scheduler.num_inference_steps == count
    assert np.all(np.diff(timesteps) < 0)
    assert timesteps[-1] >= np.float32(process.timestep_min)
    assert timesteps[0] <= np.float32(process.timestep_max)
    sigmas = scheduler.sigmas.numpy()
    assert len(sigmas) == count + 1
    assert np.all(np.diff(sigmas) <= 0)
    # The noise levels are those of the timesteps that the model is told.
    np.testing.assert_allclose(sigmas[:-1], process.gamma(timesteps.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_number_of_steps_gives_that_many_distinct_decreasing_timesteps(grid, schedule):
    scheduler = GenieScheduler(**SCHEDULES[schedule], time_grid=grid)
    for count in range(1, 41):
        scheduler.set_timesteps(count)
        assert_is_a_grid(scheduler, count)
        assert np.all(np.diff(scheduler.sigmas.numpy()) < 0)
        assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_a_noisy_end_is_the_smallest_noise_level(grid):
    scheduler = GenieScheduler(**SCHEDULES["linear"], time_grid=grid, final_sigmas_type="sigma_min")
    for count in range(1, 41):
        scheduler.set_timesteps(count)
        assert_is_a_grid(scheduler, count)
        assert float(scheduler.sigmas[-1]) == pytest.approx(float(scheduler.process.gamma(0)), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_analytical_first_step_takes_one_more_point_at_the_noisy_end(grid):
    plain = GenieScheduler(**SCHEDULES["linear"], time_grid=grid)
    free = GenieScheduler(**SCHEDULES["linear"], time_grid=grid, analytical_first_step=True)
    for count in range(1, 40):
        plain.set_timesteps(count + 1)
        free.set_timesteps(count)
        assert_is_a_grid(free, count)
        assert free.timesteps.tolist() == plain.timesteps.tolist()[1:]
    with pytest.raises(ValueError, match="between 1 and 39"):
        free.set_timesteps(40)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 333, 499, 500, 501, 667, 998, 999, 1000])
def test_a_thousand_training_timesteps_leave_room_for_every_number_of_steps(grid, count):
    scheduler = GenieScheduler(time_grid=grid, steps_offset=1)
    scheduler.set_timesteps(count)
    assert_is_a_grid(scheduler, count)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "leading"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_continuous_time_takes_every_number_of_steps(grid, final_sigmas_type):
    scheduler = GenieScheduler(continuous=True, time_grid=grid, final_sigmas_type=final_sigmas_type)
    for count in (1, 2, 3, 10, 100, 1000):
        scheduler.set_timesteps(count)
        assert scheduler.timesteps.dtype == torch.float32
        assert_is_a_grid(scheduler, count)


@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_grids_reach_both_ends_of_the_process(grid):
    for process in (VariancePreserving.from_config({}), VariancePreserving.from_config({"continuous": True})):
        points = time_grid(process, grid, 9)
        assert (points[0], points[-1]) == pytest.approx((process.timestep_max, process.timestep_min), rel=1e-12)
        assert time_grid(process, grid, 1) == pytest.approx([process.timestep_max], rel=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 10, 25])
@pytest.mark.parametrize("grid", ["linear", "quadratic"])
def test_striding_on_the_analytic_process_is_that_of_the_paper(grid, steps):
    """τ runs from 1 to 10⁻³, evenly in τ or in √τ, and the network is told 999 τ."""
    process = VariancePreserving.from_config({"continuous": True})
    fractions = [step / steps for step in range(steps + 1)]
    tau = {
        "linear": [1 - 0.999 * f for f in fractions],
        "quadratic": [(1 - f * (1 - math.sqrt(1e-3))) ** 2 for f in fractions],
    }[grid]
    np.testing.assert_allclose(time_grid(process, grid, steps + 1), 999 * np.array(tau), rtol=1e-12)


def test_grids_in_noise_level_are_even_in_what_their_name_says():
    process = VariancePreserving.from_config({})
    grids = ("uniform_lambda", "power_lambda", "karras", "beta")
    gammas = {grid: process.gamma(time_grid(process, grid, 12)) for grid in grids}
    from_noise = np.log(gammas["power_lambda"][0] / gammas["power_lambda"])
    even = {
        "uniform_lambda": np.log(gammas["uniform_lambda"]),
        "power_lambda": np.maximum(from_noise, 0.0) ** (2 / 3),
        "karras": gammas["karras"] ** (1 / 7),
    }
    for values in even.values():
        np.testing.assert_allclose(np.diff(values), (values[-1] - values[0]) / 11, rtol=1e-6)
    assert np.all(np.diff(gammas["beta"]) < 0)


@pytest.mark.parametrize("config", [{}, {"steps_offset": 1}], ids=["", "steps_offset=1"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_spacings_are_those_of_diffusers(spacing, config):
    """
    Where diffusers' are right. Its "trailing" has 62 timesteps for 61 steps, the last of them −1, and likewise for 61
    other numbers of steps; at 48 and more multiples of 16 its accumulated float rounds a tie the other way. "linspace"
    and "leading" repeat timesteps at 1000 steps, and "leading" with an offset leaves the range from 999 steps on.
    """
    ours = GenieScheduler(timestep_spacing=spacing, **config)
    theirs = DPMSolverMultistepScheduler(timestep_spacing=spacing, **config)
    for count in [*range(1, 48), 50, 100]:
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), count


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas"])
def test_grids_in_noise_level_are_those_of_diffusers(flag):
    """Up to its truncation of timesteps to integers, where ours are rounded."""
    ours, theirs = GenieScheduler(**{flag: True}), DPMSolverMultistepScheduler(**{flag: True})
    for count in (2, 5, 10, 20):
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        assert (ours.timesteps - theirs.timesteps).abs().max() <= 1, count


def test_time_grid_takes_precedence_over_flags_and_flags_over_spacing():
    def timesteps(**config):
        scheduler = GenieScheduler(**config)
        scheduler.set_timesteps(10)
        return scheduler.timesteps.tolist()

    spacing = {"timestep_spacing": "trailing"}
    karras = {"use_karras_sigmas": True, **spacing}
    assert timesteps(**karras) == timesteps(time_grid="karras", denoising_step=True) != timesteps(**spacing)
    assert timesteps(time_grid="quadratic", **karras) == timesteps(time_grid="quadratic") != timesteps(**karras)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("process", [{}, {"continuous": True}], ids=["discrete", "continuous"])
def test_the_last_model_call_is_at_the_smallest_timestep_only_for_a_denoising_step(grid, process):
    def timesteps(count, **config):
        scheduler = GenieScheduler(time_grid=grid, **process, **config)
        scheduler.set_timesteps(count)
        assert scheduler.sigmas[-1] == (0 if "final_sigmas_type" not in config else scheduler.sigmas.min())
        return scheduler.timesteps.tolist()

    with_step = timesteps(8, denoising_step=True)
    assert with_step[-1] == pytest.approx(VariancePreserving.from_config(process).timestep_min, rel=1e-6)
    assert timesteps(7) == with_step[:-1]
    # a noisy end is where the denoising step would be
    assert timesteps(7, final_sigmas_type="sigma_min") == with_step[:-1]
    assert timesteps(7, final_sigmas_type="sigma_min", denoising_step=True) == with_step[:-1]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([9.4, 4.6, 0.2], [9, 5, 0]),
        ([5.0, 5.0, 5.0], [7, 6, 5]),
        ([9.0, 9.0, 9.0], [9, 8, 7]),
        ([9.0, 0.3, 0.2, 0.1], [9, 2, 1, 0]),
        ([11.0, 10.0, -3.0], [9, 8, 0]),
        ([9.0, 9.0, 8.0, 8.0, 3.0], [9, 8, 7, 6, 3]),
    ],
)
def test_colliding_timesteps_move_to_the_nearest_free_integers(wanted, expected):
    assert distinct_integers(np.array(wanted), 9).tolist() == expected


def test_unknown_and_impossible_grids_are_refused():
    process, continuous = VariancePreserving.from_config({}), VariancePreserving.from_config({"continuous": True})
    with pytest.raises(ValueError, match="'cubic'"):
        time_grid(process, "cubic", 5)
    with pytest.raises(ValueError, match="'cubic'"):
        spaced_timesteps(process, "cubic", 5)
    with pytest.raises(ValueError, match="leading"):
        spaced_timesteps(continuous, "leading", 5)
    with pytest.raises(ValueError, match="'cubic'"):
        GenieScheduler(time_grid="cubic").set_timesteps(5)


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, True])
def test_impossible_numbers_of_steps_are_refused(count):
    with pytest.raises(ValueError, match="num_inference_steps"):
        GenieScheduler().set_timesteps(count)


@pytest.mark.parametrize("shape", [0.3, 0.6, 1.0, 2.5])
def test_quantiles_of_the_beta_distribution_are_those_of_scipy(shape):
    shares = np.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(beta_quantiles(shares, shape), beta.ppf(shares, shape, shape), rtol=0, atol=1e-13)
