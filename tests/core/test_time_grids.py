import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.schedulers import AysSchedules
from scipy.stats import beta

from genie_diffusers import GDDIMCLDScheduler, GDDIMScheduler, GenieScheduler, VariancePreserving
from genie_diffusers.core.time_grids import (
    NOISE_LEVEL_GRIDS,
    SIGMA_GRIDS,
    TIME_GRIDS,
    TIMESTEP_SPACINGS,
    beta_quantiles,
    distinct_integers,
    spaced_timesteps,
    time_grid,
)

# diffusers calls `np.array` on a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:`algorithm_types:FutureWarning")

GRIDS = (*TIME_GRIDS, "beta(2,0.5)", *TIMESTEP_SPACINGS)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
#: flags of diffusers, and our names of the grids that they are
FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",
    "use_beta_sigmas": "beta",
}
SCHEDULES = {
    "linear": {"num_train_timesteps": 40, "beta_end": 0.3},
    "squaredcos_cap_v2": {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"},
    "zero SNR": {"num_train_timesteps": 40, "beta_end": 0.3, "rescale_betas_zero_snr": True},
}


#: of 40 timesteps: few, many, and all
COUNTS = (1, 2, 3, 4, 5, 7, 10, 19, 20, 21, 30, 38, 39, 40)


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
    for count in COUNTS:
        scheduler.set_timesteps(count)
        assert_is_a_grid(scheduler, count)
        assert np.all(np.diff(scheduler.sigmas.numpy()) < 0)
        assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_a_noisy_end_is_the_smallest_noise_level(grid):
    scheduler = GenieScheduler(**SCHEDULES["linear"], time_grid=grid, final_sigmas_type="sigma_min")
    for count in COUNTS:
        scheduler.set_timesteps(count)
        assert_is_a_grid(scheduler, count)
        assert float(scheduler.sigmas[-1]) == pytest.approx(float(scheduler.process.gamma(0)), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_analytical_first_step_takes_one_more_point_at_the_noisy_end(grid):
    plain = GenieScheduler(**SCHEDULES["linear"], time_grid=grid)
    free = GenieScheduler(**SCHEDULES["linear"], time_grid=grid, analytical_first_step=True)
    for count in COUNTS[:-1]:
        plain.set_timesteps(count + 1)
        free.set_timesteps(count)
        assert_is_a_grid(free, count)
        assert free.timesteps.tolist() == plain.timesteps.tolist()[1:]
    with pytest.raises(ValueError, match="between 1 and 39"):
        free.set_timesteps(40)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 7, 333, 500, 501, 999, 1000])
def test_a_thousand_training_timesteps_leave_room_for_every_number_of_steps(grid, count):
    scheduler = GenieScheduler(time_grid=grid, steps_offset=1)
    scheduler.set_timesteps(count)
    assert_is_a_grid(scheduler, count)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "leading"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_continuous_time_takes_every_number_of_steps(grid, final_sigmas_type):
    scheduler = GenieScheduler(continuous=True, time_grid=grid, final_sigmas_type=final_sigmas_type)
    for count in (1, 2, 10, 1000):
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


@pytest.mark.parametrize("flag", FLAGS)
def test_grids_in_noise_level_are_those_of_diffusers_by_flag_and_by_name(flag):
    """Its noise levels are between timesteps, ours those of the timesteps nearest to them."""
    theirs = DPMSolverMultistepScheduler(**{flag: True}, **STABLE_DIFFUSION)
    by_flag = GenieScheduler(**{flag: True}, **STABLE_DIFFUSION)
    by_name = GenieScheduler(time_grid=FLAGS[flag], **STABLE_DIFFUSION)
    process = by_name.process
    for count in (2, 5, 10, 20):
        for scheduler in (theirs, by_flag, by_name):
            scheduler.set_timesteps(count)
        points = time_grid(process, FLAGS[flag], count)
        np.testing.assert_allclose(process.gamma(points), theirs.sigmas[:-1], rtol=2e-5)
        assert by_flag.timesteps.tolist() == by_name.timesteps.tolist() == np.round(points).tolist()


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != "use_lu_lambdas"])
def test_grids_of_flows_are_those_of_diffusers_by_flag_and_by_name(flag, options):
    theirs = FlowMatchEulerDiscreteScheduler(**options, **{flag: True})
    by_flag = GenieScheduler.from_config(theirs.config)
    by_name = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(**options).config, time_grid=FLAGS[flag])
    for count in (2, 5, 10, 20):
        for scheduler in (theirs, by_flag, by_name):
            scheduler.set_timesteps(count, mu=0.8 if "use_dynamic_shifting" in options else None)
        for ours in (by_flag, by_name):
            torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)


def test_the_grid_of_mochi_is_that_of_its_pipeline_in_diffusers():
    scheduler = GenieScheduler(prediction_type="flow_prediction", time_grid="linear_quadratic")
    for count in (2, 3, 8, 64):
        scheduler.set_timesteps(count)
        theirs = linear_quadratic_schedule(count, 0.025)
        np.testing.assert_allclose(scheduler.timesteps / 1000, theirs, rtol=1e-6)


#: σ of a flow with shift 3, and timesteps or γ of Stable Diffusion, that ComfyUI and RES4LYF give: computed in float64
#: by the formulas of `comfy/samplers.py` and of RES4LYF's `sigmas.py` (at 022c873)
OF_COMFYUI = {
    ("sgm_uniform", 5): ([1.0, 0.923343, 0.818923, 0.668327, 0.432225], [999, 799.2, 599.4, 399.6, 199.8]),
    ("simple", 7): (
        [1.0, 0.947717, 0.882716, 0.800373, 0.69268, 0.545802, 0.333593],
        [999, 857, 714, 571, 428, 285, 142],
    ),
    ("beta57", 8): (
        [1.0, 0.960432, 0.885246, 0.776062, 0.62993, 0.446629, 0.243719, 0.071429],
        [999, 889, 719, 535, 361, 211, 96, 24],
    ),
    ("beta_timesteps(0.6,0.6)", 8): (
        [1.0, 0.980249, 0.933535, 0.859522, 0.750749, 0.596386, 0.392171, 0.155914],
        [999, 942, 823, 670, 500, 329, 176, 57],
    ),
    ("kl_optimal", 6): (
        [1.0, 0.727458, 0.511035, 0.326907, 0.160841, 0.002994],
        [14.614641, 2.632888, 1.294767, 0.711627, 0.335637, 0.029167],
    ),
    ("linear_quadratic", 5): ([1.0, 0.9875, 0.975, 0.858333, 0.533333], None),
    ("bong_tangent", 8): ([1.0, 0.971344, 0.929423, 0.862888, 0.7443, 0.5, 0.213122, 0.069646], None),
    ("bong_tangent", 5): ([1.0, 0.932036, 0.804306, 0.5, 0.132261], None),
    ("bong_tangent", 2): ([1.0, 0.5], None),
}


@pytest.mark.parametrize(("grid", "count"), OF_COMFYUI)
def test_grids_of_comfyui_are_what_it_gives(grid, count):
    of_flow, of_diffusion = OF_COMFYUI[grid, count]
    flow = GenieScheduler(prediction_type="flow_prediction", flow_shift=3.0, time_grid=grid)
    flow.set_timesteps(count)
    np.testing.assert_allclose(flow.timesteps / 1000, of_flow, atol=1e-6)
    diffusion = GenieScheduler(**STABLE_DIFFUSION, time_grid=grid)
    diffusion.set_timesteps(count)
    largest = float(diffusion.process.gamma(999))
    if of_diffusion is None:  # shares of the largest noise level
        of_diffusion = largest * np.array(of_flow)
    if grid in NOISE_LEVEL_GRIDS:
        of_diffusion = diffusion.process.timestep(-np.log(np.minimum(of_diffusion, largest)))
    assert diffusion.timesteps.tolist() == np.round(of_diffusion).tolist()


@pytest.mark.parametrize(("grid", "model"), [("ays", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")])
def test_align_your_steps_is_the_list_of_diffusers_log_linearly_resampled(grid, model):
    sigmas, timesteps = AysSchedules[f"{model}Sigmas"], AysSchedules[f"{model}Timesteps"]
    scheduler = GenieScheduler(**STABLE_DIFFUSION, time_grid=grid)
    scheduler.set_timesteps(10)
    np.testing.assert_allclose(scheduler.timesteps, timesteps, atol=1)
    scheduler.set_timesteps(5)
    np.testing.assert_allclose(scheduler.timesteps, timesteps[::2], atol=1)
    scheduler.set_timesteps(20)
    np.testing.assert_allclose(scheduler.timesteps[::2], timesteps, atol=1)
    between = math.sqrt(sigmas[3] * sigmas[4])
    assert abs(float(scheduler.process.timestep(-math.log(between))) - float(scheduler.timesteps[7])) <= 0.5
    for other in ({}, {"prediction_type": "flow_prediction"}):
        with pytest.raises(ValueError, match=r"list of noise levels σ/α of Stable Diffusion, from 14\.615 on"):
            GenieScheduler(**other, time_grid=grid).set_timesteps(5)


@pytest.mark.parametrize("scheduler_class", [GenieScheduler, GDDIMScheduler])
def test_noise_levels_that_diffusers_publishes_are_taken_as_they_are(scheduler_class):
    for model in ("StableDiffusion", "StableDiffusionXL"):
        sigmas = AysSchedules[f"{model}Sigmas"]
        scheduler = scheduler_class(**STABLE_DIFFUSION)
        scheduler.set_timesteps(sigmas=sigmas)
        np.testing.assert_allclose(scheduler.timesteps, AysSchedules[f"{model}Timesteps"], atol=1)
        with_end = scheduler.sigmas
        scheduler.set_timesteps(sigmas=torch.tensor(sigmas[:-1]))
        assert torch.equal(scheduler.sigmas, with_end)
    flow = scheduler_class(prediction_type="flow_prediction", flow_shift=3.0)
    flow.set_timesteps(sigmas=[1.0, 0.6, 0.2, 0.0])
    np.testing.assert_allclose(flow.timesteps / 1000, [1.0, 1.8 / 2.2, 0.6 / 1.4], rtol=1e-6)
    for refused in ([0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.5]):
        for scheduler in (scheduler_class(**STABLE_DIFFUSION), flow):
            with pytest.raises(ValueError, match="`sigmas` must"):
                scheduler.set_timesteps(sigmas=refused)


def test_time_grid_takes_precedence_over_flags_and_flags_over_spacing():
    def timesteps(**config):
        scheduler = GenieScheduler(**config)
        scheduler.set_timesteps(10)
        return scheduler.timesteps.tolist()

    spacing = {"timestep_spacing": "trailing"}
    karras = {"use_karras_sigmas": True, **spacing}
    assert timesteps(**karras) == timesteps(time_grid="karras") != timesteps(**spacing)
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
    assert timesteps(7, denoising_step=False) == with_step[:-1]
    assert timesteps(8) == (with_step if grid in SIGMA_GRIDS else timesteps(8, denoising_step=False))
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


@pytest.mark.parametrize("scheduler_class", [GenieScheduler, GDDIMCLDScheduler])
@pytest.mark.parametrize(
    "name", ["cubic", "beta(0.5)", "beta(0.5,0)", "beta(0.5,70)", "beta(0.5,0.7.1)", 7, ["karras"]]
)
def test_a_grid_that_does_not_exist_is_refused_when_it_is_given_with_those_that_do(scheduler_class, name):
    sentence = r"`time_grid` must be one of .*linear, .*beta57, .*bong_tangent.* or beta\(α,β\).*got "
    scheduler = scheduler_class()
    with pytest.raises(ValueError, match=sentence):
        scheduler_class(time_grid=name)
    with pytest.raises(ValueError, match=sentence):
        scheduler_class.from_config(scheduler.config, time_grid=name)
    scheduler.register_to_config(time_grid=name)
    with pytest.raises(ValueError, match=sentence):
        scheduler.set_timesteps(5)


def test_who_asks_for_a_grid_asks_for_its_end():
    config = GenieScheduler(time_grid="uniform_lambda", denoising_step=False).config
    assert GenieScheduler.from_config(config, time_grid="karras").config.denoising_step is None
    assert GenieScheduler.from_config(config, time_grid="karras", denoising_step=False).config.denoising_step is False
    assert GenieScheduler.from_config(config, method="taylor").config.denoising_step is False


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, True])
def test_impossible_numbers_of_steps_are_refused(count):
    with pytest.raises(ValueError, match="num_inference_steps"):
        GenieScheduler().set_timesteps(count)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0, 2.5, 10.0])
@pytest.mark.parametrize("other", [0.3, 0.7, 1.0, 2.5, 10.0])
def test_quantiles_of_the_beta_distribution_are_those_of_scipy(alpha, other):
    shares = np.linspace(0.0, 1.0, 101)
    expected = beta.ppf(shares, alpha, other)
    np.testing.assert_allclose(beta_quantiles(shares, alpha, other), expected, rtol=0, atol=1e-13)
