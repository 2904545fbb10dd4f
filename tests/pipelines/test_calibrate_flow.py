"""`calibrate` in the stock flow-matching pipelines of diffusers, each with the scheduler of its checkpoints."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from genie_diffusers import GenieScheduler, calibrate
from genie_diffusers.core.table import Table
from tests.pipelines.tiny_flow import FAMILIES, bria_with, cogview_4, ltx_2, own

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

#: one of each way in which a pipeline treats its scheduler and its sample
QUICK = ("sd3", "flux", "flux_2", "flux_inpainting", "wan", "ltx", "kandinsky_5")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def learn(pipe, inputs: dict[str, Any], **options) -> GenieScheduler:
    options = {"steps": (3, 4), "teacher_steps": 24, "refinements": 0, **options}
    return calibrate(pipe, **options, **inputs)


def draw(pipe, scheduler, inputs: dict[str, Any], steps: int) -> torch.Tensor:
    """Latents of noises that no calibration has seen."""
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in (100, 101)]
    call = {**own(inputs), "output_type": "latent", "return_dict": False}
    return pipe(**call, num_inference_steps=steps, generator=generators)[0]


def distance(latents: torch.Tensor, reference: torch.Tensor) -> float:
    return float((latents.float() - reference.float()).norm() / reference.float().norm())


def assert_follows(learned: GenieScheduler, steps: int):
    """The last run had this many calls, and each of them was where the table has it."""
    table = Table.from_dict(learned.config["tables"][str(steps)], learned.process, steps)
    assert learned.table == table
    assert learned.timesteps.tolist() == torch.tensor(table.timesteps, dtype=torch.float32).tolist()
    assert learned.step_index == steps


@pytest.mark.parametrize("name", EVERY)
def test_the_stock_pipeline_follows_the_learned_table_to_the_solution(name, caplog):
    pipe, inputs = FAMILIES[name]()
    stock = pipe.scheduler
    learned = learn(pipe, inputs)
    assert pipe.scheduler is stock
    solver = GenieScheduler.from_config(stock.config)
    solution = draw(pipe, solver, inputs, 60)
    errors = {}
    for steps in (3, 4):
        found = draw(pipe, learned, inputs, steps)
        assert_follows(learned, steps)
        assert torch.isfinite(found).all()
        assert found.shape == draw(pipe, stock, inputs, steps).shape
        errors[steps] = distance(found, solution)
    assert errors[4] < distance(draw(pipe, solver, inputs, 4), solution)
    assert errors[3] < distance(draw(pipe, solver, inputs, 3), solution)
    assert "were learned at" not in caplog.text


def test_the_shift_of_a_pipeline_that_shifts_by_the_number_of_calls():
    """FLUX.2 derives `mu` from it: the recorded run has another one than the runs of the table."""
    pipe, inputs = FAMILIES["flux_2"]()
    tables = learn(pipe, inputs).config["tables"]
    for steps in (3, 4):
        expected = compute_empirical_mu(image_seq_len=16, num_steps=steps)
        assert tables[str(steps)]["learned_for"]["mu"] == pytest.approx(expected)


def test_paths_one_after_the_other_give_the_same_tables():
    pipe, inputs = FAMILIES["sd3"]()
    together, alone = (
        Table.from_dict(learn(pipe, inputs, steps=3, max_batch_size=size).config["tables"]["3"], None, 3)
        for size in (None, 1)
    )
    assert list(alone.timesteps) == list(together.timesteps)
    for row, other in zip(alone.rows, together.rows, strict=True):
        assert dict(row) == pytest.approx(dict(other), abs=1e-3)


def test_a_transformer_in_half_precision():
    pipe, inputs = FAMILIES["flux"]()
    pipe = copy.deepcopy(pipe).to(torch.bfloat16)  # text encoders are shared
    learned = learn(pipe, inputs)
    solver = GenieScheduler.from_config(learned.config, tables=None)
    solution = draw(pipe, solver, inputs, 60)
    found = draw(pipe, learned, inputs, 4)
    assert_follows(learned, 4)
    assert found.dtype == torch.bfloat16
    assert distance(found, solution) < distance(draw(pipe, solver, inputs, 4), solution)


@pytest.mark.parametrize("name", ["flux", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_transformer_that_caches_blocks(name):
    pipe, inputs = FAMILIES[name]()
    exact = draw(pipe, GenieScheduler.from_config(pipe.scheduler.config), inputs, 24)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    cached = draw(pipe, GenieScheduler.from_config(pipe.scheduler.config), inputs, 24)
    assert not torch.equal(cached, exact)
    learned = learn(pipe, inputs)
    found = draw(pipe, learned, inputs, 4)
    assert_follows(learned, 4)
    assert torch.equal(draw(pipe, learned, inputs, 4), found)  # nothing is left over from the run before
    solver = GenieScheduler.from_config(learned.config, tables=None)
    assert distance(found, cached) < distance(draw(pipe, solver, inputs, 4), cached)


@pytest.mark.slow
def test_a_compiled_transformer():
    pipe, inputs = FAMILIES["flux"]()
    expected = learn(pipe, inputs, steps=3)
    found = draw(pipe, expected, inputs, 3)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    learned = learn(pipe, inputs, steps=3)
    assert learned.config["tables"]["3"]["timesteps"] == expected.config["tables"]["3"]["timesteps"]
    torch.testing.assert_close(draw(pipe, learned, inputs, 3), found, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_a_pipeline_writes_itself_is_kept_with_the_recording(tmp_path):
    pipe, inputs = FAMILIES["flux_inpainting"]()
    first = learn(pipe, inputs, steps=3, output_dir=tmp_path).config["tables"]["3"]
    (tmp_path / "table-3.json").unlink()
    assert learn(pipe, inputs, steps=3, output_dir=tmp_path).config["tables"]["3"] == first


def test_a_sample_that_a_callback_changes_everywhere_is_refused():
    pipe, inputs = FAMILIES["sd3"]()

    def change(pipe, index, timestep, tensors):
        return {"latents": 0.9 * tensors["latents"]}

    with pytest.raises(ValueError, match="`pipe` changes all of its sample between steps"):
        learn(pipe, {**inputs, "callback_on_step_end": change})


def test_pipelines_that_do_not_leave_the_timesteps_to_their_scheduler_say_so():
    for (pipe, inputs), message in (
        # the model is told timesteps that are not those of the noise levels
        (cogview_4(), "chooses where its model is called and passes `timesteps="),
        # passes it to nothing but FlowMatchEulerDiscreteScheduler
        (bria_with(use_dynamic_shifting=True), "`mu` must be given if `use_dynamic_shifting` is set"),
        # the sound is sampled beside the video
        (ltx_2(), "copies its scheduler within a call"),
    ):
        stock = pipe.scheduler
        with pytest.raises(ValueError, match=message):
            learn(pipe, inputs)
        assert pipe.scheduler is stock
