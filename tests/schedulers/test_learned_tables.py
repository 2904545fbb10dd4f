"""Tables that a slope source brings: learned timesteps and rows for some numbers of model calls."""

import copy

import pytest
import torch

from genie_diffusers import GenieScheduler

TABLES = {
    "1": {"timesteps": [970], "weights": [[0.4, -0.3]], "residuals": [0.0]},
    "4": {
        "timesteps": [950, 700, 300, 40],
        "weights": [[0.9, -0.2], [1.1, -0.3, 0.05], [1.2, -0.4, 0.1, -0.02], [1.3, -0.5, 0.07, -0.03, 0.01]],
        "residuals": [0.1, 0.0, 0.3, 0.2],
    },
}


class Source:
    """Something that is weighed by the tables; it records its calls."""

    def __init__(self, tables: dict):
        self.tables, self.calls = tables, []

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope):
        self.calls.append((timestep, step, history_slope))
        return torch.cos(3 * sample) + noise_prediction


@pytest.fixture
def source():
    return Source(copy.deepcopy(TABLES))


def ready(source=None, num_inference_steps: int | None = 4, timesteps=None, **config) -> GenieScheduler:
    scheduler = GenieScheduler(**config)
    scheduler.attach(source)
    scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
    return scheduler


def denoise(sample: torch.Tensor, timestep) -> torch.Tensor:
    """A made-up ε."""
    return 0.8 * torch.sin(2 * sample + float(timestep) / 300) + 0.3 * sample


def draw(scheduler: GenieScheduler, sample: torch.Tensor, begin: int = 0) -> torch.Tensor:
    for index, timestep in enumerate(scheduler.timesteps[begin:], start=begin):
        alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
        noise = denoise(sample, timestep)
        output = {
            "epsilon": noise,
            "sample": (sample - sigma * noise) / alpha,
            "v_prediction": (noise - sigma * sample) / alpha,
        }[scheduler.config.prediction_type]
        sample = scheduler.step(output, timestep, sample).prev_sample
    return sample


def by_hand(sample: torch.Tensor, steps: str) -> torch.Tensor:
    predictions = []
    for timestep, (of_sample, *of_predictions), residual in zip(*TABLES[steps].values(), strict=True):
        predictions.insert(0, denoise(sample, timestep))
        landing = of_sample * sample
        for weight, prediction in zip(of_predictions, predictions, strict=False):
            landing = landing + weight * prediction
        sample = landing + residual * (torch.cos(3 * sample) + predictions[0])
    return sample


@pytest.mark.parametrize("method", ["hermite", "taylor"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", TABLES)
def test_timesteps_and_rows_are_those_of_the_table(source, noise, steps, prediction_type, method):
    scheduler = ready(source, int(steps), prediction_type=prediction_type, method=method)
    assert scheduler.timesteps.tolist() == TABLES[steps]["timesteps"]
    assert scheduler.sigmas[-1] == 0
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), by_hand(noise(3, 2), steps), rtol=1e-12, atol=1e-12)


def test_the_source_is_asked_where_it_is_weighed_and_told_the_slope_of_the_history(source, noise):
    scheduler = ready(source)
    predictions, sample = [], noise(3, 2)
    for timestep in scheduler.timesteps:
        predictions.append(denoise(sample, timestep))
        sample = scheduler.step(predictions[-1], timestep, sample).prev_sample
    timesteps, steps, history_slopes = zip(*source.calls, strict=True)
    assert timesteps == (950, 300, 40), "the second residual is zero"
    assert steps == tuple(scheduler.lambdas[index + 1] - scheduler.lambdas[index] for index in (0, 2, 3))
    assert steps[-1] == float("inf") and history_slopes[0] is None
    for index, history_slope in zip((2, 3), history_slopes[1:], strict=True):
        width = scheduler.lambdas[index] - scheduler.lambdas[index - 1]
        torch.testing.assert_close(history_slope, (predictions[index] - predictions[index - 1]) / width)


def test_a_table_without_residuals_never_asks_the_source(source, noise):
    source.tables["4"]["residuals"] = [0.0] * 4
    scheduler = ready(source)
    assert torch.isfinite(draw(scheduler, noise(3, 2))).all()
    assert source.calls == []


@pytest.mark.parametrize("method", ["hermite", "taylor"])
@pytest.mark.parametrize(
    "given",
    [{"num_inference_steps": 5}, {"num_inference_steps": None, "timesteps": TABLES["4"]["timesteps"]}],
    ids=["other steps", "custom timesteps"],
)
def test_runs_without_a_table_are_those_without_a_source(source, noise, given, method):
    with_tables, plain = ready(source, **given, method=method), ready(**given, method=method)
    assert with_tables.table == plain.table and with_tables.table.corrections == plain.table.corrections
    assert with_tables.timesteps.tolist() == plain.timesteps.tolist()
    assert torch.equal(draw(with_tables, noise(3, 2)), draw(plain, noise(3, 2)))
    assert source.calls == []


def test_custom_sigmas_are_no_table(source, noise):
    of_table = ready(source).sigmas[:-1]
    schedulers = GenieScheduler(), GenieScheduler()
    schedulers[0].attach(source)
    for scheduler in schedulers:
        scheduler.set_timesteps(sigmas=of_table)
    assert torch.equal(*(draw(scheduler, noise(3, 2)) for scheduler in schedulers))


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_a_start_mid_way_goes_on_at_the_same_timesteps_by_the_configured_method(source, noise, final_sigmas_type):
    scheduler = ready(source, final_sigmas_type=final_sigmas_type)
    scheduler.set_begin_index(1)
    plain = ready(num_inference_steps=None, timesteps=TABLES["4"]["timesteps"][1:])
    torch.testing.assert_close(draw(scheduler, noise(3, 2), begin=1), draw(plain, noise(3, 2)))
    assert source.calls == []
    scheduler.set_begin_index(0)
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), by_hand(noise(3, 2), "4"))


@pytest.mark.parametrize(
    "config",
    [
        {"analytical_first_step": True},
        {"final_sigmas_type": "sigma_min"},
        {"time_grid": "quadratic", "denoising_step": True},
        {"use_karras_sigmas": True},
        {"interpolation_order": 1},
    ],
    ids=lambda config: next(iter(config)),
)
def test_options_of_the_grid_and_the_solver_change_nothing(source, noise, config):
    scheduler = ready(source, **config)
    assert scheduler.init_noise_sigma == 1.0
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), by_hand(noise(3, 2), "4"))


def test_clipping_is_that_of_the_predicted_data(source, noise):
    scheduler = ready(source, clip_sample=True, clip_sample_range=0.3)
    sample, timestep = noise(3, 2), scheduler.timesteps[0]
    alpha, sigma = scheduler.alphas[0], scheduler.noise_stds[0]
    output = denoise(sample, timestep)
    free = (sample - sigma * output) / alpha
    clipped, held = (sample - alpha * free.clamp(-0.3, 0.3)) / sigma, free.abs() > 0.3
    residual = torch.where(held, 0.0, torch.cos(3 * sample) + output)
    expected = 0.9 * sample - 0.2 * clipped + 0.1 * residual
    assert held.any()
    torch.testing.assert_close(scheduler.step(output, timestep, sample).prev_sample, expected)


@pytest.mark.parametrize("taken", [0, 2])
def test_detaching_goes_on_at_the_same_timesteps_by_the_configured_method(source, noise, taken):
    scheduler, sample = ready(source), noise(3, 2)
    for timestep in scheduler.timesteps[:taken]:
        sample = scheduler.step(denoise(sample, timestep), timestep, sample).prev_sample
    asked = len(source.calls)
    scheduler.attach(None)
    plain = ready(num_inference_steps=None, timesteps=TABLES["4"]["timesteps"][taken:])
    torch.testing.assert_close(draw(scheduler, sample, begin=taken), draw(plain, sample))
    assert len(source.calls) == asked
    scheduler.set_timesteps(4)
    assert torch.equal(draw(scheduler, noise(3, 2)), draw(ready(), noise(3, 2)))


def test_tables_attached_during_a_run_wait_for_the_next_one(source, noise):
    scheduler, plain = ready(), ready()
    scheduler.attach(source)
    assert torch.equal(draw(scheduler, noise(3, 2)), draw(plain, noise(3, 2)))
    scheduler.set_timesteps(4)
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), by_hand(noise(3, 2), "4"))


def test_tables_are_attached_and_not_configured(source, noise, tmp_path):
    saved = ready(source)
    saved.save_pretrained(tmp_path)
    loaded = GenieScheduler.from_pretrained(tmp_path)
    assert "residuals" not in (tmp_path / "scheduler_config.json").read_text()
    loaded.set_timesteps(4)
    assert torch.equal(draw(loaded, noise(3, 2)), draw(ready(), noise(3, 2)))
    loaded.attach(source)
    loaded.set_timesteps(4)
    torch.testing.assert_close(draw(loaded, noise(3, 2)), by_hand(noise(3, 2), "4"))
