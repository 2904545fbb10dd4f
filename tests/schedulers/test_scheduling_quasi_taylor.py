import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from genie_diffusers import GenieScheduler, QuasiTaylorScheduler
from genie_diffusers.core.solvers.quasi_taylor import METHODS, limit_weights

ROUGH_BETAS = np.random.default_rng(0).uniform(1e-4, 0.08, 100).tolist()
JUMPING_BETAS = np.repeat([1e-4, 0.3, 1e-3, 0.6, 0.02], 20).tolist()
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "rough": {"trained_betas": ROUGH_BETAS, "num_train_timesteps": 100},
    "jumping": {"trained_betas": JUMPING_BETAS, "num_train_timesteps": 100},
    "short": {"trained_betas": [0.1, 0.4], "num_train_timesteps": 2},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "continuous": {"continuous": True},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_order = pytest.mark.parametrize("taylor_order", [1, 2, 3])
every_method = pytest.mark.parametrize("method", METHODS)


def ready(num_inference_steps: int, **config) -> QuasiTaylorScheduler:
    scheduler = QuasiTaylorScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def point_run(scheduler, sample: torch.Tensor, generator=None, data: float = 0.7) -> torch.Tensor:
    """A run with the exact ε of data that are one point."""
    for alpha, sigma, timestep in zip(scheduler.alphas, scheduler.noise_stds, scheduler.timesteps, strict=False):
        epsilon = (sample - alpha * data) / sigma
        sample = scheduler.step(epsilon, timestep, sample, generator=generator).prev_sample
    return sample


def warnings_of(caplog, action) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        action()
    return [record.message for record in caplog.records if "expansion" in record.message]


# --- the singular ends -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_schedule
@every_order
@every_method
@pytest.mark.parametrize("grid", ["linspace", "uniform_lambda", "quadratic"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_weights_are_finite_and_no_step_is_farther_from_its_limit_than_its_size(
    schedule, method, taylor_order, grid, end
):
    config = {**SCHEDULES[schedule], "time_grid": grid, "final_sigmas_type": end}
    config |= {"method": method, "taylor_order": taylor_order}
    for count in (1, 5, 37, 200):
        if count > config.get("num_train_timesteps", 1000) - (schedule == "short"):
            continue
        scheduler = ready(count, **config)
        assert not np.isnan(scheduler.departures).any() and len(scheduler.departures) == count
        for row, alpha_next, sigma_next, alpha, sigma in zip(
            scheduler.table,
            scheduler.alphas[1:],
            scheduler.noise_stds[1:],
            scheduler.alphas[:-1],
            scheduler.noise_stds[:-1],
            strict=True,
        ):
            rho, w, s = (row.get((name, 0), 0.0) for name in ("sample", "prediction", "noise"))
            assert np.isfinite([rho, w, s]).all() and s >= 0
            assert 0 <= rho * alpha <= 2 * alpha_next * (1 + 1e-9)
            limit = limit_weights(method, alpha, sigma, alpha_next, sigma_next)
            of_noise = rho * sigma + w - limit.sample * sigma - limit.prediction
            assert max(abs(of_noise), abs(s - limit.noise)) <= sigma_next * (1 + 1e-9) + 1e-9 * rho


@every_schedule
@every_order
@every_method
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_runs_are_finite_in_half_precision(schedule, method, taylor_order, prediction_type):
    count = 1 if schedule == "short" else 10
    scheduler = ready(
        count, **SCHEDULES[schedule], method=method, taylor_order=taylor_order, prediction_type=prediction_type
    )
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 4, generator=generator).half()
    for timestep in scheduler.timesteps:
        output = sample if prediction_type == "epsilon" else 0.3 * sample.tanh()
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    assert sample.dtype == torch.float16 and torch.isfinite(sample).all()


@every_order
@every_method
def test_the_step_to_clean_data_is_the_predicted_data_without_noise(method, taylor_order):
    scheduler = ready(7, method=method, taylor_order=taylor_order)
    alpha, sigma = scheduler.alphas[-2], scheduler.noise_stds[-2]
    assert scheduler.table[-1] == pytest.approx({("sample", 0): 1 / alpha, ("prediction", 0): -sigma / alpha})
    assert scheduler.departures[-1] == 0


@every_order
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "zero SNR"])
def test_at_a_singular_noisy_end_the_sde_takes_the_posterior_and_says_so(schedule, taylor_order, caplog):
    def act():
        return ready(50, **SCHEDULES[schedule], method="sde", taylor_order=taylor_order)

    (message,) = warnings_of(caplog, act)
    scheduler = act()
    assert "Steps 0 of 50" in message and f"`taylor_order={taylor_order}`" in message and "posterior" in message
    assert scheduler.departures[0] > 1 and (scheduler.departures[1:] < 1).all()
    levels = [values[i : i + 1] for i in (0, 1) for values in (scheduler.alphas, scheduler.noise_stds)]
    limit = limit_weights("sde", *levels)
    expected = {("sample", 0): limit.sample, ("prediction", 0): limit.prediction, ("noise", 0): limit.noise}
    assert scheduler.table[0] == {column: float(weight[0]) for column, weight in expected.items()}


def test_the_squared_cosine_is_no_singularity_for_the_first_order_ode(caplog):
    """α itself is smooth where β = −2α̇/α is not, and the ODE only asks for α and σ."""
    config = {**SCHEDULES["squaredcos_cap_v2"], "taylor_order": 1}
    assert not warnings_of(caplog, lambda: ready(10, **config))
    assert ready(10, **config).departures.max() < 0.1


def test_long_steps_are_warned_of_once_a_run_and_short_ones_never(caplog):
    scheduler = QuasiTaylorScheduler(taylor_order=1, time_grid="uniform_lambda", denoising_step=True)
    (message,) = warnings_of(caplog, lambda: scheduler.set_timesteps(5))
    assert f"by up to {100 * scheduler.departures.max():.3g}%" in message and "DDIM" in message
    assert not warnings_of(caplog, lambda: scheduler.set_begin_index(2))
    assert not warnings_of(caplog, lambda: scheduler.set_timesteps(50))


@every_order
def test_departures_shrink_with_the_step_as_the_order_and_one(taylor_order):
    config = {"continuous": True, "taylor_order": taylor_order, "time_grid": "uniform_lambda"}
    largest = np.array([ready(count, **config).departures.max() for count in (100, 200, 400)])
    np.testing.assert_allclose(np.log2(largest[:-1] / largest[1:]), taylor_order + 1, atol=0.2)


def test_on_a_rough_schedule_the_third_order_is_exact_over_one_timestep():
    """Between its jumps α is a cubic there, and the derivatives are taken on the side of the step."""
    scheduler = QuasiTaylorScheduler(**SCHEDULES["rough"], taylor_order=3, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(timesteps=np.arange(99, 0, -1))
    rho = np.array([row["sample", 0] for row in scheduler.table])
    np.testing.assert_allclose(rho, scheduler.alphas[1:] / scheduler.alphas[:-1], rtol=1e-12)
    assert not isinstance(scheduler.process._alpha, type(QuasiTaylorScheduler().process._alpha))


# --- what it tends to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, reference", [("ode", DDIMScheduler), ("sde", DDPMScheduler)])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_at_a_thousand_steps_runs_are_those_of_ddim_and_ddpm(schedule, method, reference):
    """With the same noise: DDPM draws it in the same order."""
    theirs = reference(**SCHEDULES[schedule], clip_sample=False)
    theirs.alphas_cumprod = torch.from_numpy(
        QuasiTaylorScheduler(**SCHEDULES[schedule]).process.alpha(range(1000)) ** 2
    )
    theirs.set_timesteps(1000)
    ends = {}
    start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for order in (0, 1, 2, 3):
        scheduler = theirs
        if order:
            scheduler = QuasiTaylorScheduler(**SCHEDULES[schedule], method=method, taylor_order=order)
            scheduler.set_timesteps(timesteps=theirs.timesteps.tolist())
        sample, generator = start, torch.Generator().manual_seed(1)
        for timestep in scheduler.timesteps:
            options = {"generator": generator} if reference is DDPMScheduler or order else {}
            sample = scheduler.step(sample.tanh(), timestep, sample, **options).prev_sample
        ends[order] = sample
    distances = [float((ends[order] - ends[0]).norm() / ends[0].norm()) for order in (1, 2, 3)]
    assert distances[0] < 0.05 and distances[2] < 1e-3
    assert distances[2] < distances[1] < distances[0]


def test_the_first_order_ode_is_exact_for_standard_normal_data():
    """Where ε = σ x and no sample moves."""
    scheduler = ready(50, taylor_order=1, final_sigmas_type="sigma_min")
    for row, sigma in zip(scheduler.table, scheduler.noise_stds, strict=False):
        assert row["sample", 0] + row["prediction", 0] * sigma == pytest.approx(1, rel=1e-13)


@every_order
def test_a_single_data_point_is_recovered_with_its_noise_at_the_order(taylor_order):
    """At σ_min: x = α x_0 + σ ε with the ε that the run started with, up to O(h^p)."""
    errors = []
    config = {"continuous": True, "taylor_order": taylor_order, "time_grid": "uniform_lambda"}
    for count in (100, 200, 400):
        scheduler = ready(count, **config, final_sigmas_type="sigma_min")
        (alpha, *_, alpha_end), (sigma, *_, sigma_end) = scheduler.alphas, scheduler.noise_stds
        epsilon = torch.linspace(-2, 2, 5, dtype=torch.float64)
        end = point_run(scheduler, 0.7 * alpha + sigma * epsilon)
        errors.append(float((end - 0.7 * alpha_end - sigma_end * epsilon).norm() / sigma_end))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), taylor_order, atol=0.2)


@every_order
@every_method
def test_a_single_data_point_is_recovered_at_clean_data(method, taylor_order):
    scheduler = ready(8, method=method, taylor_order=taylor_order)
    start = torch.linspace(-2, 2, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(point_run(scheduler, start, generator), torch.full_like(start, 0.7))


@every_order
def test_the_variance_of_samples_is_that_of_the_noise_level(taylor_order):
    """At σ_min after 200 steps, on a single data point: by the table with the order, and by sampling."""
    variances = []
    for count in (100, 200, 400):
        config = {"continuous": True, "method": "sde", "taylor_order": taylor_order, "time_grid": "uniform_lambda"}
        scheduler = ready(count, **config, final_sigmas_type="sigma_min")
        variance = scheduler.noise_stds[0] ** 2
        for row, sigma in zip(scheduler.table, scheduler.noise_stds[:-1], strict=True):
            # ε = (x − α x_0)/σ, so the deviation from the mean is multiplied by ρ + w/σ
            variance = (row["sample", 0] + row["prediction", 0] / sigma) ** 2 * variance + row["noise", 0] ** 2
        variances.append(variance / scheduler.noise_stds[-1] ** 2)
    rates = np.log2(np.divide(*np.abs(np.array([variances[:-1], variances[1:]]) - 1)))
    np.testing.assert_allclose(rates, taylor_order, atol=0.25)

    count, generator = 20_000, torch.Generator().manual_seed(0)
    scheduler = ready(200, **config, final_sigmas_type="sigma_min")
    sigma = scheduler.noise_stds[0]
    start = 0.7 * scheduler.alphas[0] + sigma * torch.randn(count, generator=generator, dtype=torch.float64)
    end = point_run(scheduler, start, generator)
    measured = float(end.var()) / scheduler.noise_stds[-1] ** 2
    assert abs(measured - variances[1]) < 4 * variances[1] * np.sqrt(2 / count)
    bias = float(end.mean() - 0.7 * scheduler.alphas[-1]) / scheduler.noise_stds[-1]
    assert abs(bias) < 5 / np.sqrt(count)


# --- noise -----------------------------------------------------------------------------------------------------------


def model(sample, timestep):
    return sample.tanh()


def run(scheduler, sample, generator):
    scheduler.set_timesteps(6)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample, generator=generator).prev_sample
    return sample


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_one_generator_per_sample_gives_the_same_samples_for_any_split_into_batches():
    scheduler, sample = QuasiTaylorScheduler(method="sde"), torch.ones(4, 2, 3)
    whole = run(scheduler, sample, seeded(0, 1, 2, 3))
    parts = torch.cat([run(scheduler, sample[:1], seeded(0)), run(scheduler, sample[1:], seeded(1, 2, 3))])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert not torch.allclose(whole, run(scheduler, sample, seeded(4, 5, 6, 7)), atol=0.1)


def test_the_ode_draws_nothing():
    (generator,) = seeded(0)
    state = generator.get_state()
    run(QuasiTaylorScheduler(), torch.ones(2, 3), generator)
    assert torch.equal(generator.get_state(), state)


def test_a_wrong_number_of_generators_is_an_error():
    with pytest.raises(ValueError, match="`generator` must be one generator or one for each of 4 samples, got 3"):
        run(QuasiTaylorScheduler(method="sde"), torch.ones(4, 2), seeded(0, 1, 2))


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, choices",
    [("method", "heun", "ode, sde"), ("taylor_order", 4, "1, 2, 3"), ("taylor_order", 0, "1, 2, 3")],
)
def test_unknown_options_are_refused(key, value, choices):
    with pytest.raises(ValueError, match=f"`{key}` must be one of {choices}, got {value!r}"):
        ready(5, **{key: value})


@pytest.mark.parametrize("key, value", [("method", "sde"), ("taylor_order", 3)])
def test_set_timesteps_uses_the_configuration_as_it_is_now(key, value):
    scheduler = ready(5)
    before = scheduler.table
    scheduler.register_to_config(**{key: value})
    scheduler.set_timesteps(5)
    assert scheduler.table == ready(5, **{key: value}).table != before


def test_methods_of_other_schedulers_of_this_package_stay_behind():
    genie, ours = GenieScheduler(method="taylor", beta_end=0.01), QuasiTaylorScheduler(method="sde", beta_end=0.01)
    there, back = QuasiTaylorScheduler.from_config(genie.config), GenieScheduler.from_config(ours.config)
    assert (there.config.method, there.config.beta_end) == ("ode", 0.01)
    assert (back.config.method, back.config.beta_end) == ("hermite", 0.01)
    by_way_of_ddim = DDIMScheduler.from_config(ours.config)
    assert QuasiTaylorScheduler.from_config(by_way_of_ddim.config).config.method == "sde"
    assert GenieScheduler.from_config(by_way_of_ddim.config).config.method == "hermite"
    with pytest.raises(ValueError, match="'taylor'"):
        QuasiTaylorScheduler.from_config(ours.config, method="taylor").set_timesteps(5)
