"""Learned samplers: what they start from, what their rows weigh, and what they refuse."""

import copy
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from genie_diffusers import GDDIMScheduler, GenieScheduler, GGDMScheduler, QuasiTaylorScheduler

TABLES = {
    "3": {
        "timesteps": [950.5, 400.25, 30.75],
        "sample": [[0.9], [0.7, 0.2], [0.6, 0.1, -0.3]],
        "prediction": [[-0.4], [-0.3, 0.2], [0.4, 0.0, 0.15]],
        "slope": [[], [0.05], [0.0, 0.02]],
        "noise": [0.3, 0.1, 0.0],
    },
    "2": {"timesteps": [800, 100], "sample": [[0.9], [1.1]], "prediction": [[-0.2], [-0.4]]},
}


def ready(steps: int = 3, source=None, tables=TABLES, **config) -> GGDMScheduler:
    scheduler = GGDMScheduler(tables=copy.deepcopy(tables), **config)
    scheduler.attach(source)
    scheduler.set_timesteps(steps)
    return scheduler


def denoise(sample: torch.Tensor, timestep) -> torch.Tensor:
    """A made-up ε."""
    return 0.8 * torch.sin(2 * sample + float(timestep) / 300) + 0.3 * sample


def slope_source(sample, noise_prediction, timestep, **kwargs) -> torch.Tensor:
    return torch.cos(3 * sample) + noise_prediction


def draw(scheduler, sample: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    for index, timestep in enumerate(scheduler.timesteps):
        if getattr(scheduler.config, "prediction_type", "epsilon") != "epsilon":
            alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
            data = (sample - sigma * (noise := denoise(sample, timestep))) / alpha
            output = {"sample": data, "v_prediction": alpha * noise - sigma * data}[scheduler.config.prediction_type]
        else:
            output = denoise(sample, timestep)
        sample = scheduler.step(output, timestep, sample, generator=generator, **options).prev_sample
    return sample


# --- origins ---------------------------------------------------------------------------------------------------------

ORIGINS = {
    "Hermite with corrector": GenieScheduler(time_grid="uniform_lambda"),
    "Taylor": GenieScheduler(method="taylor"),
    "DEIS": GDDIMScheduler(multistep_order=3),
    "DEIS with corrector": GDDIMScheduler(multistep_order=2, corrector=True),
    "DDPM": GDDIMScheduler(multistep_order=1, eta=1.0, timestep_spacing="trailing"),
    "clipped": GenieScheduler(clip_sample=True, clip_sample_range=0.7),
    "of v": GenieScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "continuous": GenieScheduler(continuous=True),
    "quasi-Taylor SDE": QuasiTaylorScheduler(method="sde", taylor_order=3),
}


@pytest.mark.parametrize("name", ORIGINS)
@pytest.mark.parametrize("source", [None, slope_source])
def test_the_table_of_a_scheduler_is_that_scheduler(name, source, noise):
    origin = copy.copy(ORIGINS[name])
    origin.attach(source)
    scheduler = GGDMScheduler.from_scheduler(origin, [1, 5, 10])
    scheduler.attach(source)
    for steps in (1, 5, 10):
        origin.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == origin.timesteps.tolist()
        assert not any(scheduler.table.corrections)
        torch.testing.assert_close(draw(scheduler, noise(3, 2)), draw(origin, noise(3, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_from_ddim_is_ddim(eta, timestep_spacing, noise):
    theirs = DDIMScheduler(clip_sample=False, timestep_spacing=timestep_spacing)
    scheduler = GGDMScheduler.from_ddim(theirs, [1, 10], eta)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    theirs.alphas_cumprod = (1 - betas).cumprod(0)  # theirs is single precision
    for steps in (1, 10):
        theirs.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
        expected = draw(theirs, noise(3, 2), eta=eta)
        torch.testing.assert_close(draw(scheduler, noise(3, 2)), expected, rtol=0, atol=1e-12)


def test_from_ddim_with_eta_one_is_ddpm(noise):
    theirs = DDPMScheduler(clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing")
    theirs.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    scheduler = GGDMScheduler.from_ddim(theirs, 8, eta=1.0)
    for either in (theirs, scheduler):
        either.set_timesteps(8)
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), draw(theirs, noise(3, 2)), rtol=0, atol=1e-9)


def test_flags_of_the_origin_are_kept():
    origin = DDIMScheduler(clip_sample=True, clip_sample_range=1.5, prediction_type="v_prediction", steps_offset=1)
    config = GGDMScheduler.from_ddim(origin, 5).config
    assert config.clip_sample and config.clip_sample_range == 1.5 and config.prediction_type == "v_prediction"
    assert DDIMScheduler.from_config(config).config.steps_offset == 1


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("data_form", [False, True])
def test_a_step_is_the_sum_that_its_row_says(prediction_type, data_form, noise):
    tables = {"3": TABLES["3"] | {"data_form": data_form}}
    scheduler = ready(3, slope_source, tables, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    samples, predictions, slopes, (timesteps, *columns, sigmas) = [noise(3, 2)], [], [], TABLES["3"].values()
    for index, timestep in enumerate(timesteps):
        epsilon = denoise(samples[0], timestep)
        alpha, sigma = scheduler.alphas[index], scheduler.noise_stds[index]
        predictions.insert(0, (samples[0] - sigma * epsilon) / alpha if data_form else epsilon)
        slopes.insert(0, slope_source(samples[0], epsilon, timestep))
        following = torch.zeros_like(samples[0])
        for rows, tensors in zip(columns, (samples, predictions, slopes), strict=True):
            for lag, weight in enumerate(rows[index]):
                following = following + weight * tensors[lag]
        if sigmas[index]:
            fresh = torch.randn(following.shape, generator=generator, dtype=torch.float64)
            following = following + sigmas[index] * fresh
        samples.insert(0, following)
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), samples[0], rtol=1e-12, atol=1e-12)


def test_real_timesteps_are_what_the_model_is_called_with(noise):
    scheduler = ready(3, slope_source)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.tolist() == [950.5, 400.25, 30.75]
    assert scheduler.index_for_timestep(400.25) == 1
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.dtype == torch.int64
    with pytest.raises(ValueError, match=r"must be 800, whose turn it is .* got 800\.5"):
        scheduler.set_begin_index(0)
        scheduler.step(noise(3, 2), 800.5, noise(3, 2))


def test_a_finished_run_keeps_no_states(noise):
    scheduler, kept, sample = ready(3, slope_source), [], noise(3, 2)
    for timestep in scheduler.timesteps:
        kept.append(weakref.ref(sample))
        sample = scheduler.step(denoise(sample, timestep), timestep, sample).prev_sample
    assert [reference() for reference in kept] == [None] * 3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_of_ddim_are_those_of_the_diffusion(eta):
    scheduler = GGDMScheduler.from_ddim(GenieScheduler(), 6, eta)
    scheduler.set_timesteps(6)
    alphas, sigmas = scheduler.marginals()
    np.testing.assert_allclose(alphas, scheduler.alphas, rtol=1e-12)
    np.testing.assert_allclose(sigmas, scheduler.noise_stds, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data_form", [False, True])
def test_marginals_are_those_of_samples_when_the_model_knows_the_data(data_form):
    table = {key: rows for key, rows in TABLES["3"].items() if key != "slope"} | {"data_form": data_form}
    scheduler, x_0 = ready(3, tables={"3": table}), 0.7
    alphas, sigmas = scheduler.marginals()
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(400_000, generator=generator, dtype=torch.float64)
    sample = scheduler.alphas[0] * x_0 + scheduler.noise_stds[0] * sample
    for index, timestep in enumerate(scheduler.timesteps):
        assert sample.mean().item() == pytest.approx(alphas[index] * x_0, abs=0.01)
        assert sample.std().item() == pytest.approx(sigmas[index], rel=0.01)
        epsilon = (sample - scheduler.alphas[index] * x_0) / scheduler.noise_stds[index]
        sample = scheduler.step(epsilon, timestep, sample, generator=generator).prev_sample
    assert sample.mean().item() == pytest.approx(alphas[3] * x_0, abs=0.01)
    assert sample.std().item() == pytest.approx(sigmas[3], rel=0.01)


# --- starts mid-way --------------------------------------------------------------------------------------------------


def test_a_table_without_history_starts_anywhere(noise):
    origin = GDDIMScheduler(multistep_order=1, eta=1.0)
    scheduler = GGDMScheduler.from_scheduler(origin, 6)
    ends = []
    for either in (origin, scheduler):
        either.set_timesteps(6)
        either.set_begin_index(2)
        sample, generator = noise(3, 2), torch.Generator().manual_seed(0)
        for timestep in either.timesteps[2:]:
            sample = either.step(denoise(sample, timestep), timestep, sample, generator).prev_sample
        ends.append(sample)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_index", [True, False])
def test_a_table_that_weighs_what_was_before_refuses_to_start_after_it(by_index, noise):
    scheduler = ready(3, slope_source)
    message = "cannot start at step 1: its step 1 weighs what was seen at step 0"
    for _ in range(2):  # a refused start stays refused
        with pytest.raises(ValueError, match=message):
            if by_index:
                scheduler.set_begin_index(1)
            else:
                scheduler.step(noise(3, 2), scheduler.timesteps[1], noise(3, 2))
    scheduler.set_timesteps(3)
    torch.testing.assert_close(draw(scheduler, noise(3, 2)), draw(ready(3, slope_source), noise(3, 2)))


def test_history_that_is_inside_the_run_does_not_matter():
    table = TABLES["2"] | {"sample": [[0.9], [1.1]], "prediction": [[-0.2], [-0.4]]}
    tables = {"3": {**TABLES["3"], "slope": [[], [], []], "sample": [[1.0], [0.7], [0.6, 0.1]]}, "2": table}
    tables["3"]["prediction"] = [[-0.4], [-0.3], [0.4, 0.1]]
    scheduler = ready(3, tables=tables)
    scheduler.set_begin_index(1)
    assert scheduler.begin_index == 1


# --- in pipelines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_stock_pipelines_sample_with_it(pipeline_class, unet):
    model = unet(num_class_embeds=None, in_channels=3, out_channels=3).float()
    called = []
    model.register_forward_pre_hook(lambda module, args: called.append(float(args[1])))
    pipeline = pipeline_class(model, DDIMScheduler())
    pipeline.scheduler = ready(3, tables={"3": {k: v for k, v in TABLES["3"].items() if k != "slope"}})
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert np.isfinite(images).all()
    assert called == [950.5, 400.25, 30.75]


@pytest.mark.slow
def test_a_saved_sampler_loads_the_same_in_a_fresh_process(tmp_path, noise):
    scheduler = GGDMScheduler.from_scheduler(GenieScheduler(), [3, 5])
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").stat().st_size < 8_000
    code = (
        "import json, sys\nfrom genie_diffusers import GGDMScheduler\n"
        "scheduler = GGDMScheduler.from_pretrained(sys.argv[1])\nscheduler.set_timesteps(5)\n"
        "print(json.dumps([[list(map(list, row)), list(row.values())] for row in scheduler.table]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    scheduler.set_timesteps(5)
    expected = [[list(map(list, row)), list(row.values())] for row in scheduler.table]
    assert json.loads(run.stdout) == expected


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 0, 2.5, "3", None])
def test_steps_that_were_not_learned_are_an_error_that_names_those_that_were(steps):
    message = (
        "exactly one of" if steps is None else r"`num_inference_steps` must be one that was learned \(2, 3\), got"
    )
    with pytest.raises(ValueError, match=message):
        GGDMScheduler(tables=TABLES).set_timesteps(steps)


def test_a_configuration_without_tables_says_so():
    with pytest.raises(ValueError, match=r"none: the configuration has no `tables`\), got 10"):
        GGDMScheduler().set_timesteps(10)


@pytest.mark.parametrize("given", [{"timesteps": [800, 100]}, {"sigmas": [5.0, 0.5]}])
def test_other_grids_are_refused(given):
    (name, value), *_ = given.items()
    with pytest.raises(ValueError, match=f"`num_inference_steps` is all.*`{name}={value}`".replace("[", r"\[")):
        GGDMScheduler(tables=TABLES).set_timesteps(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [400, 800, 30]}, "3 strictly decreasing timesteps between 999 and 0"),
        ({"timesteps": [1200, 800, 30]}, r"got \[1200, 800, 30\]"),
        ({"timesteps": [800, 30]}, r"for 3 model calls, got \[800, 30\]"),
        ({"sample": [[1.0, 0.5], [1.0], [1.0]]}, r"'sample' in each of 3 steps.*\[2, 1, 1\]"),
        ({"prediction": [[1.0], [1.0]]}, r"'prediction' in each of 3 steps.*\[1, 1\]"),
        ({"noise": [0.1, -0.1, 0.0]}, "3 values of 'noise', none negative"),
    ],
)
def test_malformed_tables_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ready(3, slope_source, {"3": TABLES["3"] | change})


def test_slopes_need_their_source():
    with pytest.raises(ValueError, match="This table weighs slopes: `attach` their source"):
        ready(3)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (DDIMScheduler(), "`scheduler` must be a scheduler of this package.*got DDIMScheduler"),
        (GenieScheduler(final_sigmas_type="sigma_min"), "got `final_sigmas_type='sigma_min'`"),
        (GenieScheduler(analytical_first_step=True), "`analytical_first_step=True`"),
    ],
)
def test_origins_that_are_no_tables_of_the_family_are_errors(origin, message):
    with pytest.raises(ValueError, match=message):
        GGDMScheduler.from_scheduler(origin, 5)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_of_ddim_is_between_zero_and_one(eta):
    with pytest.raises(ValueError, match=f"`eta` must be between 0 and 1, got {eta}"):
        GGDMScheduler.from_ddim(DDIMScheduler(), 5, eta)
