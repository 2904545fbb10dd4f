"""Calibration of a pipeline with an exact denoiser: what it brings, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genie_diffusers import GenieScheduler, Table, calibrate
from genie_diffusers.calibration import Calibration, fitting
from genie_diffusers.core import Parametrisation, run
from tests.calibration.toy import ToyPipeline, ends, error


@pytest.mark.parametrize("kind", ["vp_pipeline", "flow_pipeline"])
def test_few_calls_end_nearer_to_the_solution(kind, request):
    pipe = request.getfixturevalue(kind)
    original = pipe.scheduler
    learned = calibrate(pipe, steps=(4, 6), num_paths=8, refinements=1)
    assert pipe.scheduler is original
    solver = GenieScheduler.from_config(original.config)
    reference = ends(pipe, GenieScheduler.from_config(original.config, time_grid="uniform_lambda"), 300)
    for steps in (4, 6):
        ours, plain = (error(ends(pipe, one, steps), reference) for one in (learned, solver))
        assert learned.timesteps.shape == (steps,)
        assert ours < 0.5 * plain, (steps, ours, plain)


@pytest.mark.parametrize("kind, steps", [pytest.param("vp_pipeline", 8, marks=pytest.mark.slow), ("flow_pipeline", 5)])
def test_refinement_helps_paths_that_were_not_fitted(kind, steps, request):
    pipe = request.getfixturevalue(kind)
    config = pipe.scheduler.config
    greedy, refined = (calibrate(pipe, steps, num_paths=8, refinements=count) for count in (0, 2))
    reference = ends(pipe, GenieScheduler.from_config(config, time_grid="uniform_lambda"), 300)
    assert error(ends(pipe, refined, steps), reference) < 0.95 * error(ends(pipe, greedy, steps), reference)


def test_a_step_that_is_not_damped_is_too_long_to_be_taken(flow_pipeline, monkeypatch):
    monkeypatch.setattr(fitting, "DAMPING", 1e-8)
    errors = []
    for count in (0, 1):
        calibration = Calibration(flow_pipeline, 5, num_paths=8, refinements=count)
        calibration.run()
        errors.append(calibration.fits[5].error)
    assert errors[1] > 0.9 * errors[0]


def test_the_scheduler_ends_where_the_calibration_says(flow_pipeline):
    """The table, run by the engine, is what was fitted: the errors of the fitted paths are those that are stated."""
    calibration = Calibration(flow_pipeline, (3, 5), num_paths=4, seed=20)
    scheduler = calibration.run()
    reference = np.stack([calibration.targets[number][-1].numpy() for number in range(4)])
    for steps in (3, 5):
        found = ends(flow_pipeline, scheduler, steps, seeds=range(20, 24))
        errors = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
        np.testing.assert_allclose(errors, calibration.fits[steps].errors, rtol=1e-3)


@pytest.mark.parametrize("refinements", [0, 1])
def test_batches_of_one_give_the_table_of_one_batch(flow_pipeline, refinements):
    whole = calibrate(flow_pipeline, 3, num_paths=3, refinements=refinements)
    split = calibrate(flow_pipeline, 3, num_paths=3, refinements=refinements, max_batch_size=1)
    same_tables(whole.config.tables, split.config.tables)


def same_tables(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for key, entry in found.items():
        assert entry["timesteps"] == expected[key]["timesteps"]
        for row, other in zip(entry["rows"], expected[key]["rows"], strict=True):
            assert row.keys() == other.keys()
            for term in row:
                np.testing.assert_allclose(row[term], other[term], rtol=rtol, atol=1e-5)


def test_a_model_that_is_only_written_differently_gets_the_same_pictures(vp_pipeline):
    """ε and v of one model: the tables agree, and so do the pictures."""
    learned = {}
    for prediction_type in ("epsilon", "v_prediction"):
        pipe = ToyPipeline(GenieScheduler(prediction_type=prediction_type))
        learned[prediction_type] = ends(pipe, calibrate(pipe, 5, num_paths=4), 5)
    np.testing.assert_allclose(learned["epsilon"], learned["v_prediction"], atol=1e-3)


def test_a_part_of_the_numbers_is_nearly_as_good(vp_pipeline):
    config = vp_pipeline.scheduler.config
    reference = ends(vp_pipeline, GenieScheduler.from_config(config, time_grid="uniform_lambda"), 300)
    whole, part = (
        error(
            ends(vp_pipeline, calibrate(vp_pipeline, 5, num_paths=8, max_numbers=limit, refinements=0), 5), reference
        )
        for limit in (48, 24)
    )
    assert part < 1.5 * whole


def test_other_numbers_of_calls_are_solved_and_earlier_tables_kept(vp_pipeline):
    first = calibrate(vp_pipeline, 3, num_paths=2, refinements=0)
    vp_pipeline.scheduler = first
    second = calibrate(vp_pipeline, 4, num_paths=2, refinements=0)
    assert set(second.config.tables) == {"3", "4"}
    assert second.config.tables["3"] == first.config.tables["3"]
    plain = GenieScheduler()
    np.testing.assert_array_equal(ends(vp_pipeline, second, 7), ends(vp_pipeline, plain, 7))


def test_saved_and_loaded_it_is_the_same(flow_pipeline, tmp_path):
    learned = calibrate(flow_pipeline, 3, num_paths=2, refinements=0)
    learned.save_pretrained(tmp_path)
    loaded = GenieScheduler.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ends(flow_pipeline, learned, 3), ends(flow_pipeline, loaded, 3))
    assert loaded.timesteps.tolist() == pytest.approx(loaded.config.tables["3"]["timesteps"], rel=1e-6)
    assert loaded.config.tables["3"]["learned_for"] == {"clip_sample": False, "thresholding": False}


def test_several_guidance_scales_are_fitted_at_once(vp_pipeline):
    learned = calibrate(vp_pipeline, 4, num_paths=4, guidance_scale=(1.0, 1.2), refinements=0)
    assert learned.config.tables["4"]["learned_for"]["guidance_scale"] == [1.0, 1.2]
    config = vp_pipeline.scheduler.config
    for scale in (1.0, 1.2):
        reference = ends(
            vp_pipeline, GenieScheduler.from_config(config, time_grid="uniform_lambda"), 300, guidance_scale=scale
        )
        found, plain = (
            error(ends(vp_pipeline, one, 4, guidance_scale=scale), reference)
            for one in (learned, GenieScheduler.from_config(config))
        )
        assert found < plain


# --- kept as it goes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(vp_pipeline, tmp_path, monkeypatch):
    expected = calibrate(vp_pipeline, (3, 4), num_paths=3, max_batch_size=2, refinements=0, teacher_steps=30)

    class Killed(Exception):
        pass

    def die(self, count, grids, learn=Calibration.learn):
        if count == 4:
            raise Killed
        return learn(self, count, grids)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Calibration, "learn", die)
        calibrate(
            vp_pipeline, (3, 4), num_paths=3, max_batch_size=2, refinements=0, teacher_steps=30, output_dir=tmp_path
        )
    vp_pipeline.model_calls = 0
    calibration = Calibration(
        vp_pipeline, (3, 4), num_paths=3, max_batch_size=2, refinements=0, teacher_steps=30, output_dir=tmp_path
    )
    resumed = calibration.run()
    same_tables(resumed.config.tables, expected.config.tables, rtol=1e-6)
    assert calibration.calls == vp_pipeline.model_calls
    whole = Calibration(vp_pipeline, (3, 4), num_paths=3, max_batch_size=2, refinements=0, teacher_steps=30)
    whole.run()
    assert calibration.calls < whole.calls - 2 * 30  # neither the recording nor the table of 3 calls again


def test_a_folder_of_another_calibration_is_refused(vp_pipeline, tmp_path):
    calibrate(vp_pipeline, 3, num_paths=2, refinements=0, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"`seed` must be 0, with which .* was begun, got 5"):
        calibrate(vp_pipeline, 3, num_paths=2, refinements=0, seed=5, output_dir=tmp_path)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_calibrated_is_refused_in_a_sentence(vp_pipeline):
    def refused(match, **inputs):
        with pytest.raises(ValueError, match=match):
            calibrate(vp_pipeline, **{"steps": 3, "refinements": 0, **inputs})

    refused("`strength` must be left out", strength=0.5)
    refused("`num_inference_steps` must be left out", num_inference_steps=4)
    refused("`colour` is no input of a ToyPipeline", colour="red")
    refused(
        "one entry for each path, got 2 of `prompt`, 3 of `guidance`|is no input", prompt=["a", "b"], guidance=[1] * 3
    )
    refused("`num_paths` must be that of `prompt`, 2, got 3", prompt=["a", "b"], num_paths=3)
    refused("`steps` must be positive and fewer than the 60", steps=60)
    with pytest.raises(ValueError, match="must be a pipeline of diffusers with a `scheduler`"):
        calibrate(torch.nn.Linear(2, 2))


def test_nan_is_said_with_its_step(vp_pipeline, monkeypatch):
    monkeypatch.setattr(vp_pipeline.mixture, "noise", lambda sample, alpha, sigma: sample.double() * float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity at timestep 999, step 0 of 60"):
        calibrate(vp_pipeline, 3, num_paths=2)


def test_a_model_whose_runs_do_not_converge_is_refused(vp_pipeline, monkeypatch):
    """As a model that was distilled to few steps: what it says jumps from one call to the next."""

    def jumps(sample, alpha, sigma):
        generator = torch.Generator().manual_seed(int(1e6 * sigma))
        return torch.randn(sample.shape, generator=generator, dtype=torch.float64) * 3

    monkeypatch.setattr(vp_pipeline.mixture, "noise", jumps)
    with pytest.raises(ValueError, match=r"does not converge: from 15 calls to 30.*distilled"):
        calibrate(vp_pipeline, (3, 4), num_paths=4, refinements=0)


def test_pipelines_that_choose_their_timesteps_or_copy_their_scheduler_are_refused(vp_pipeline):
    class Chooses(ToyPipeline):
        def __call__(self, batch_size=1, num_inference_steps=10, generator=None):
            self.scheduler.set_timesteps(timesteps=[900, 500, 100])

    class Copies(ToyPipeline):
        def __call__(self, batch_size=1, num_inference_steps=10, generator=None):
            import copy

            copy.deepcopy(self.scheduler)

    class Twice(ToyPipeline):
        def __call__(self, batch_size=1, num_inference_steps=10, generator=None):
            for _ in range(2):
                super().__call__(None, batch_size, num_inference_steps, generator=generator)

    class Never(ToyPipeline):
        def __call__(self, batch_size=1, num_inference_steps=10, generator=None):
            return None

    for pipeline_class, match in (
        (Chooses, "chooses where its model is called"),
        (Copies, "copies its scheduler within a call"),
        (Twice, "sets the timesteps of its scheduler twice"),
        (Never, "did not step `pipe.scheduler`"),
    ):
        with pytest.raises(ValueError, match=match):
            calibrate(pipeline_class(DDIMScheduler()), 3, refinements=0)


def test_the_run_of_half_precision(flow_pipeline):
    flow_pipeline.dtype_of_model = torch.bfloat16
    learned = calibrate(flow_pipeline, 4, num_paths=4)
    json.dumps(dict(learned.config))
    assert np.isfinite(ends(flow_pipeline, learned, 4)).all()


def test_a_recording_in_half_precision_does_not_add_up_what_its_steps_round(flow_pipeline):
    flow_pipeline.dtype_of_model = torch.bfloat16
    calibration = Calibration(flow_pipeline, 12, num_paths=4, teacher_steps=240, refinements=0)
    calibration.run()
    # a bfloat16 number is within 2⁻⁹ of what it was rounded from; each step rounded anew moved the end by 0.08
    assert calibration.teacher_error < 2**-7
    assert calibration.fits[12].error < 0.02


# --- σ that mean "n calls" -------------------------------------------------------------------------------------------


def test_the_default_ramp_of_flow_pipelines_is_a_number_of_calls(flow_pipeline):
    learned = calibrate(flow_pipeline, 4, num_paths=2, refinements=0)
    ramp = np.linspace(1.0, 1 / 4, 4)
    learned.set_timesteps(sigmas=ramp)
    assert learned.timesteps.tolist() == pytest.approx(learned.config.tables["4"]["timesteps"], rel=1e-6)
    learned.set_timesteps(sigmas=torch.tensor(ramp, dtype=torch.float32))
    assert learned.timesteps.tolist() == pytest.approx(learned.config.tables["4"]["timesteps"], rel=1e-6)
    plain = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=2.0).config)
    for sigmas in (ramp * 0.999, np.linspace(1.0, 1 / 5, 5), [1.0, 0.7, 0.4, 0.1]):  # no table: custom
        learned.set_timesteps(sigmas=sigmas)
        plain.set_timesteps(sigmas=sigmas)
        assert torch.equal(learned.timesteps, plain.timesteps)
    gridded = GenieScheduler.from_config(plain.config, time_grid="karras")
    gridded.set_timesteps(sigmas=ramp)
    by_count = GenieScheduler.from_config(plain.config, time_grid="karras")
    by_count.set_timesteps(4)
    assert torch.equal(gridded.timesteps, by_count.timesteps)


def test_another_mu_is_said_once(caplog):
    config = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    origin = GenieScheduler.from_config(config)
    origin.set_timesteps(4, mu=0.8)
    entry = {**origin.table.fold().to_dict(), "learned_for": {"mu": 0.8, "clip_sample": False}}
    learned = GenieScheduler.from_config(config, tables={"4": entry})
    learned.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.8)
    assert not caplog.messages
    for _ in range(2):
        learned.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=1.15)
    (message,) = caplog.messages
    assert "learned at `mu=0.8`, and this run has `mu=1.15`" in message


# --- one model on two paths ------------------------------------------------------------------------------------------


def test_a_table_serves_the_same_model_as_a_flow(vp_pipeline):
    """x/(α + σ) of a variance-preserving model is a flow: with rows scaled alike, the pictures are the same."""
    entry = calibrate(vp_pipeline, 5, num_paths=4).config.tables["5"]
    table = Table.from_dict(entry, vp_pipeline.scheduler.process, 5)
    scale = table.alphas + table.sigmas
    rows = [
        {
            term: weight * (scale[index] if term[0] == "sample" else 1.0) / scale[index + 1]
            for term, weight in row.items()
        }
        for index, row in enumerate(table.rows)
    ]
    sigmas = table.sigmas / scale
    as_flow = Table(1000 * sigmas[:-1], table.alphas / scale, sigmas, rows)
    assert (
        GenieScheduler(prediction_type="flow_prediction", tables={"5": as_flow.to_dict()}).learned_table(5) == as_flow
    )
    levels = {float(t): (a, s) for t, a, s in zip(table.timesteps, table.alphas, table.sigmas, strict=False)}
    mixture = vp_pipeline.mixture
    noise = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def noise_model(sample, timestep):
        return mixture.noise(sample, *levels[float(timestep)])

    def flow_model(sample, timestep):
        alpha, sigma = float(1 - timestep / 1000), float(timestep / 1000)
        norm = np.hypot(alpha, sigma)
        noise = mixture.noise(sample / norm, alpha / norm, sigma / norm)
        return (noise - sample) / alpha  # z − x_0 with x_0 = (x − σ z)/α

    found = run(table, noise_model, noise, Parametrisation("epsilon"))
    same = run(as_flow, flow_model, noise / scale[0], Parametrisation("flow_prediction"))
    torch.testing.assert_close(same, found, rtol=1e-9, atol=1e-9)


# --- found by use ----------------------------------------------------------------------------------------------------


def test_a_recording_of_another_model_is_not_gone_on_from(vp_pipeline, tmp_path):
    calibrate(vp_pipeline, 3, num_paths=2, refinements=0, output_dir=tmp_path)
    vp_pipeline.mixture.means = 1.05 * vp_pipeline.mixture.means
    with pytest.raises(ValueError, match="`output_dir` holds the recording of another model"):
        calibrate(vp_pipeline, 3, num_paths=2, refinements=0, output_dir=tmp_path)
    assert (tmp_path / "table-3.json").exists()


def test_a_folder_of_a_run_that_does_not_converge_may_be_begun_anew(vp_pipeline, tmp_path, monkeypatch):
    options = {"steps": 3, "num_paths": 2, "refinements": 0, "output_dir": tmp_path}
    with monkeypatch.context() as patched:
        generator = torch.Generator().manual_seed(0)
        patched.setattr(
            vp_pipeline.mixture,
            "noise",
            lambda sample, alpha, sigma: (
                3 * torch.randn(sample.shape, generator=generator.manual_seed(int(1e6 * sigma)))
            ),
        )
        with pytest.raises(ValueError, match="Take more `teacher_steps`"):
            calibrate(vp_pipeline, **options)
        patched.setattr(vp_pipeline.mixture, "noise", lambda sample, alpha, sigma: sample.double() * float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            calibrate(vp_pipeline, **options, seed=1)
    calibrate(vp_pipeline, **options, teacher_steps=40)


def test_each_half_of_the_paths_has_every_guidance_scale(vp_pipeline):
    calibration = Calibration(vp_pipeline, 3, num_paths=4, guidance_scale=[1.0, 1.2], refinements=0)
    chosen = []
    calibration.fitted = lambda grid, points, chosen_paths=None: chosen.append(chosen_paths) or Halves()

    class Halves:
        grid, points, errors = "optimal", [0], np.ones(4)

    calibration.held_out_error(Halves())
    scales = np.array([1.0, 1.2, 1.0, 1.2])
    assert [sorted(scales[one]) for one in chosen] == [[1.0, 1.2], [1.0, 1.2]]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 8.0},
        {"steps": "4"},
        {"steps": (2.5,)},
        {"num_paths": 0},
        {"max_batch_size": 0},
        {"max_numbers": -1},
        {"refinements": -1},
        {"guidance_scale": ()},
        {"prompt": []},
        {"num_paths": 2, "guidance_scale": (1.0, 2.0, 3.0)},
    ],
)
def test_numbers_that_mean_nothing_are_refused(vp_pipeline, options):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}` must"):
        calibrate(vp_pipeline, **{"steps": 3, **options})
