"""From data to noise: exact round trips, learned rows, and what encoder and decoder owe to each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genie_diffusers import GenieInverseScheduler, GeniePipeline, GenieScheduler, RectifiedFlow
from genie_diffusers.cli import PACKAGED_MODEL

ENCODER = Path(PACKAGED_MODEL).parent / "genie-inverse-cifar10-16"

OPTIONS = [
    {},
    {"time_grid": "uniform_lambda"},
    {"time_grid": "uniform_lambda", "denoising_step": True},
    {"time_grid": "uniform_lambda", "final_sigmas_type": "sigma_min"},
    {"time_grid": "uniform_lambda", "final_sigmas_type": "sigma_min", "analytical_first_step": True},
    {"time_grid": "quadratic", "analytical_first_step": True},
    {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"continuous": True, "time_grid": "uniform_lambda"},
    {"prediction_type": "flow_prediction", "flow_shift": 3.0},
]


def round_trip(encoder, decoder, steps, data, predict):
    """Data, encoded and decoded, and the encoded one; `predict(sample, alpha, sigma)` is the noise."""
    state, ends = data, []
    for scheduler in (encoder, decoder):
        scheduler.set_timesteps(steps)
        state = state * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            alpha, sigma = scheduler.table.model_level(index)
            noise = predict(state, alpha, sigma)
            output = {
                "epsilon": noise,
                "v_prediction": alpha * noise - sigma * (state - sigma * noise) / alpha,
                "flow_prediction": noise - (state - sigma * noise) / alpha,
            }[scheduler.config.prediction_type]
            state = scheduler.step(output, timestep, state).prev_sample
        ends.append(state)
    return ends[1], ends[0]


@pytest.mark.parametrize("method", ["hermite", "taylor"])
@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(map(str, options.values())) for options in OPTIONS])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_where_the_prediction_is_the_same_everywhere_the_round_trip_is_exact(noise, method, options, steps):
    """The path is straight, x̄ = x_0 + γ ε, whatever the grid, the ends and the order."""
    encoder = GenieInverseScheduler(method=method, **options)
    data, constant = noise(3, 4), noise(3, 4, seed=1)
    back, encoded = round_trip(
        encoder, GenieScheduler.from_config(encoder.config), steps, data, lambda sample, alpha, sigma: constant
    )
    torch.testing.assert_close(back, data, rtol=1e-6, atol=1e-6)
    if "analytical_first_step" not in options:
        gamma_start, gamma_end = encoder.levels.gammas[[0, -1]].tolist()
        alpha_start, alpha_end = encoder.alphas[[0, -1]]
        expected = alpha_end * (data / alpha_start + (gamma_end - gamma_start) * constant)
        torch.testing.assert_close(encoded, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(map(str, options.values())) for options in OPTIONS])
def test_it_visits_the_points_of_its_decoder_backwards(options):
    encoder = GenieInverseScheduler(**options)
    decoder = GenieScheduler.from_config(encoder.config)
    for scheduler in (encoder, decoder):
        scheduler.set_timesteps(8)
    torch.testing.assert_close(encoder.sigmas, decoder.sigmas.flip(0), rtol=0, atol=0)
    visited = [decoder.process.timestep_min, *decoder.timesteps[1:].flip(0).tolist()]
    np.testing.assert_allclose(encoder.timesteps, visited, rtol=1e-6)
    assert encoder.init_noise_sigma == 1


def test_all_timesteps_can_be_visited():
    for final_sigmas_type in ("zero", "sigma_min"):
        scheduler = GenieInverseScheduler(final_sigmas_type=final_sigmas_type, time_grid="linear")
        scheduler.set_timesteps(1000)
        weights = [weight for row in scheduler.table for weight in row.values()]
        assert np.all(np.isfinite(weights))
        assert np.abs(weights).max() < 10


def test_the_prediction_on_clean_data_is_dropped_when_there_is_another():
    """x_0 = x̄_1 − γ_1 ε_1 is the decoder's last step; no model was trained for data without noise."""
    scheduler = GenieInverseScheduler(time_grid="uniform_lambda")
    scheduler.set_timesteps(6)
    sigma = scheduler.noise_stds[1]
    assert scheduler.table.corrections[1] == {
        ("prediction", 0): pytest.approx(sigma),
        ("prediction", 1): pytest.approx(-sigma),
    }
    for index in range(2, 6):
        assert all(index - lag > 0 for what, lag in scheduler.table.fold()[index] if what == "prediction")


def test_slopes_are_asked_for_where_there_is_noise(mixture, run, noise, slope_source):
    scheduler = GenieInverseScheduler(continuous=True, time_grid="uniform_lambda")
    source = slope_source(scheduler)
    scheduler.attach(source)
    scheduler.set_timesteps(5)
    data = noise(4, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.table.model_level(index)
        data = scheduler.step(mixture.noise_prediction(data, alpha, sigma), timestep, data).prev_sample
    assert len(source.calls) == 4, "all but the call on clean data"
    assert all(call["step"] < 0 for call in source.calls)
    assert source.calls[0]["history_slope"] is None


# --- learned rows ----------------------------------------------------------------------------------------------------


def learned(scheduler: GenieInverseScheduler, steps: int, scale: float = 1.0) -> dict:
    """The rows that the solver has anyway, all but the first weight times `scale`."""
    scheduler.set_timesteps(steps)
    rows = []
    for index in range(steps):
        row = scheduler.table.fold()[index]
        rows.append([row["sample", 0], *(scale * row.get(("prediction", lag), 0.0) for lag in range(index + 1))])
    return {str(steps): {"sigmas": scheduler.sigmas.tolist(), "weights": rows}}


@pytest.fixture
def solver():
    return GenieInverseScheduler(time_grid="uniform_lambda", final_sigmas_type="sigma_min", analytical_first_step=True)


def test_learned_rows_are_followed(solver, run, noise, tmp_path):
    encoding = learned(solver, 6)
    GenieInverseScheduler.from_config(solver.config, encoding=encoding).save_pretrained(tmp_path)
    loaded = GenieInverseScheduler.from_pretrained(tmp_path)
    changed = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6, scale=0.5))
    ends = []
    for scheduler in (solver, loaded, changed):
        scheduler.set_timesteps(6)
        ends.append(run(scheduler, noise(4, 2)))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
    assert (ends[2] - ends[0]).abs().max() > 0.1


def test_other_numbers_of_calls_and_attached_sources_are_left_to_the_solver(solver, slope_source):
    encoder = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6, scale=0.5))
    for steps, source in ((5, None), (6, slope_source(encoder))):
        for scheduler in (solver, encoder):
            scheduler.attach(source)
            scheduler.set_timesteps(steps)
        assert encoder.table == solver.table


def test_learned_rows_are_for_their_own_points(solver):
    encoder = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6), time_grid="quadratic")
    with pytest.raises(ValueError, match="`tables` was learned for 6 model calls at the noise levels"):
        encoder.set_timesteps(6)
    encoder = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6), final_sigmas_type="zero")
    with pytest.raises(ValueError, match="`tables` was learned"):
        encoder.set_timesteps(6)


def test_learned_rows_are_checked_when_a_source_is_detached(solver, slope_source):
    encoder = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6), time_grid="quadratic")
    encoder.attach(slope_source(encoder))
    encoder.set_timesteps(6)
    with pytest.raises(ValueError, match="`tables` was learned"):
        encoder.attach(None)


def test_learned_rows_are_for_their_own_decoder():
    encoder = GenieInverseScheduler.from_pretrained(ENCODER, interpolation_order=2)
    with pytest.raises(ValueError, match=r"`tables` was learned.*interpolation_order"):
        encoder.set_timesteps(10)


def test_a_point_visited_twice_has_no_slope_of_the_history(solver, slope_source, mixture, noise):
    source = slope_source(solver)
    solver.attach(source)
    solver.set_timesteps(timesteps=[900, 500, 100, 0])
    data = noise(4, 2)
    for index, timestep in enumerate(solver.timesteps):
        alpha, sigma = solver.table.model_level(index)
        data = solver.step(mixture.noise_prediction(data, alpha, sigma), timestep, data).prev_sample
    histories = [call["history_slope"] for call in source.calls]
    assert histories[1] is None
    assert all(torch.isfinite(history).all() for history in histories[2:])


def test_a_decoder_takes_all_of_the_configuration_but_the_rows(solver, caplog):
    encoder = GenieInverseScheduler.from_config(solver.config, encoding=learned(solver, 6))
    decoder = GenieScheduler.from_config(encoder.config)
    assert not caplog.records
    own = {name: value for name, value in encoder.config.items() if not name.startswith("_") and name != "tables"}
    assert {name: decoder.config[name] for name in own} == own
    assert encoder.config.tables and not decoder.config.tables


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(beta_schedule="scaled_linear"), FlowMatchEulerDiscreteScheduler()]
)
def test_it_is_made_from_configurations_of_diffusers(scheduler):
    encoder = GenieInverseScheduler.from_config(scheduler.config)
    encoder.set_timesteps(5)
    assert isinstance(encoder.process, RectifiedFlow) == (encoder.config.prediction_type == "flow_prediction")
    assert np.all(np.diff(encoder.sigmas) > 0)
    json.dumps(dict(encoder.config))


# --- a trained model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    pipe = GeniePipeline.from_pretrained(PACKAGED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[1, 5], generator=torch.Generator().manual_seed(0), output_type="latent").images
    return pipe, drawn


def encoded_and_back(pictures, encoder, steps: int, head: bool) -> tuple[torch.Tensor, float]:
    """The noise that the pictures are encoded to, and the relative error of what is decoded from it."""
    pipe, data = pictures
    latents, noise = data, None
    for scheduler in (encoder, GenieScheduler.from_config(encoder.config)):
        pipe.scheduler = scheduler
        if not head:
            scheduler.attach(None)
        latents = pipe(latents=latents, class_labels=[1, 5], num_inference_steps=steps, output_type="latent").images
        noise = latents if noise is None else noise
    return noise, float((latents - data).norm() / data.norm())


@pytest.mark.parametrize("head", [True, False], ids=["step head", "no head"])
def test_a_pipeline_encodes_and_decodes(pictures, head):
    ends = {"time_grid": "uniform_lambda", "final_sigmas_type": "sigma_min", "analytical_first_step": True}
    encoder = GenieInverseScheduler.from_config(pictures[0].scheduler.config, **ends)
    noise, error = encoded_and_back(pictures, encoder, 20, head)
    assert 0.8 < noise.std() < 1.2
    assert error < 0.04
    assert error < 0.5 * encoded_and_back(pictures, encoder, 10, head)[1]


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_packaged_rows_bring_pictures_closer_than_the_solver(pictures, steps):
    encoder = GenieInverseScheduler.from_pretrained(ENCODER)
    solver = GenieInverseScheduler.from_config(encoder.config, encoding=None)
    learned, plain = (encoded_and_back(pictures, each, steps, head=False)[1] for each in (encoder, solver))
    assert learned < plain
