"""Learned samplers have one home, the key `tables`, in whichever scheduler follows them."""

import copy
import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from genie_diffusers import (
    ExponentialMultistepScheduler,
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    QuasiTaylorScheduler,
)

ROWS = [{"sample": [0.95], "data": [0.2]}, {"sample": [0.5], "data": [0.6, -0.1]}, {"data": [1.05, -0.05]}]
TABLES = {"3": {"timesteps": [950, 600, 150], "rows": ROWS}}


def model(sample, timestep):
    return 0.8 * torch.sin(2 * sample + float(timestep) / 300) + 0.3 * sample


def draw(scheduler, steps, sample, begin=0):
    scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(begin)
    for timestep in scheduler.timesteps[begin:]:
        sample = scheduler.step(model(sample, timestep), timestep, sample).prev_sample
    return sample


def test_numbers_of_calls_may_be_integers(noise):
    found = draw(GenieScheduler(tables={3: TABLES["3"]}), 3, noise(4, 3))
    torch.testing.assert_close(found, draw(GenieScheduler(tables=TABLES), 3, noise(4, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("tables", [[TABLES["3"]], {"ten": TABLES["3"]}])
def test_tables_are_by_numbers_of_calls(tables):
    with pytest.raises(ValueError, match="`tables` must be a dictionary from numbers of model calls"):
        GenieScheduler(tables=tables).set_timesteps(3)
    with pytest.raises(ValueError, match="`tables` must be a dictionary from numbers of model calls"):
        GenieScheduler.from_config(GenieScheduler().config, tables=tables).set_timesteps(3)


@pytest.mark.parametrize("change", [{"alphas": [1.0]}, {"alphas": [], "sigmas": []}, {"alphas": "ab", "sigmas": "cd"}])
def test_malformed_entries_reach_the_check_that_says_so(change):
    config = GenieScheduler(tables={"3": {**TABLES["3"], "sigmas": [0.1] * 4, **change}}).config
    with pytest.raises(ValueError, match="`tables` must have"):
        GenieScheduler.from_config(config).set_timesteps(3)


@pytest.mark.parametrize("options", [{}, {"multistep_order": 1, "eta": 1.0, "time_grid": "linear"}])
def test_tables_of_matrices_are_read(options, noise):
    scheduler = GDDIMCLDScheduler(**options)
    scheduler.set_timesteps(5)
    reader = GDDIMCLDScheduler(**options, tables={"5": scheduler.table.fold().to_dict()})
    reader.set_timesteps(5)
    assert reader.learned_table(5) is not None
    assert reader.table == scheduler.table.fold()


@pytest.mark.parametrize(
    "scheduler_class",
    [GenieScheduler, GGDMScheduler, GDDIMScheduler, QuasiTaylorScheduler, ExponentialMultistepScheduler],
)
def test_every_scheduler_follows_its_tables(scheduler_class, noise, tmp_path):
    scheduler_class(tables=TABLES).save_pretrained(tmp_path)
    scheduler = scheduler_class.from_pretrained(tmp_path)
    found = draw(scheduler, 3, noise(4, 2))
    assert scheduler.timesteps.tolist() == [950, 600, 150]
    torch.testing.assert_close(found, draw(GGDMScheduler(tables=TABLES), 3, noise(4, 2)), rtol=1e-12, atol=1e-12)


def test_other_numbers_custom_timesteps_and_late_starts_are_solved(noise):
    learned, plain = GenieScheduler(tables=TABLES), GenieScheduler()
    assert torch.equal(draw(learned, 5, noise(4, 2)), draw(plain, 5, noise(4, 2)))
    for scheduler in (learned, plain):
        scheduler.set_timesteps(timesteps=[950, 600, 150])
    assert learned.table == plain.table
    # its second row reaches back to the first step: from the second on, the same timesteps are solved
    late = draw(learned, 3, noise(4, 2), begin=1)
    plain.set_timesteps(timesteps=[600, 150])
    sample = noise(4, 2)
    for timestep in plain.timesteps:
        sample = plain.step(model(sample, timestep), timestep, sample).prev_sample
    torch.testing.assert_close(late, sample)


def test_a_start_mid_way_follows_a_table_that_does_not_reach_back(noise):
    rows = [{"sample": [0.95], "data": [0.2]}, {"sample": [0.5], "data": [0.6]}, {"data": [1.05, -0.05]}]
    scheduler = GenieScheduler(tables={"3": {"timesteps": [950, 600, 150], "rows": rows}})
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(1)
    assert scheduler.table[2] == {("data", 0): 1.05, ("data", 1): -0.05}


def test_ggdm_refuses_what_was_not_learned():
    with pytest.raises(ValueError, match=r"must be one that was learned \(3\), got 5"):
        GGDMScheduler(tables=TABLES).set_timesteps(5)


def test_who_asks_for_another_solver_gets_its_rows():
    learned = GenieScheduler(tables=TABLES)
    assert GGDMScheduler.from_config(learned.config).config.tables == TABLES
    assert GenieScheduler.from_config(GGDMScheduler(tables=TABLES).config).config.tables == TABLES
    assert GenieInverseScheduler.from_config(learned.config).config.tables is None
    for solver in (GDDIMScheduler, ExponentialMultistepScheduler, QuasiTaylorScheduler):
        assert solver.from_config(learned.config).config.tables is None
        own = solver.from_config(learned.config, tables=TABLES)
        assert solver.from_config(own.config).config.tables == TABLES
    # through a scheduler of diffusers and back
    theirs = DPMSolverMultistepScheduler.from_config(learned.config)
    assert GenieScheduler.from_config(theirs.config).config.tables == TABLES


def test_tables_of_flow_models_are_followed(noise):
    origin = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    origin.set_timesteps(6)
    entry = origin.table.fold().to_dict()
    learned = GenieScheduler.from_config(origin.config, tables={"6": entry}, method="taylor")
    torch.testing.assert_close(draw(learned, 6, noise(4, 2)), draw(origin, 6, noise(4, 2)), rtol=1e-10, atol=1e-10)
    json.dumps(dict(learned.config))


def test_a_malformed_table_is_refused_when_it_is_asked_for():
    tables = copy.deepcopy(TABLES)
    tables["3"]["timesteps"] = [950, 600]
    with pytest.raises(ValueError, match=r"3 strictly decreasing timesteps.*for 3 model calls, got \[950, 600\]"):
        GenieScheduler(tables=tables).set_timesteps(3)
    GenieScheduler(tables=tables).set_timesteps(4)


# --- terms -----------------------------------------------------------------------------------------------------------


def source_of(term, tables=None):
    def source(sample, noise_prediction, timestep, **kwargs):
        return torch.cos(3 * sample)

    source.term, source.tables = term, tables
    return source


def entry_with(term):
    return {"3": {"timesteps": [950, 600, 150], "rows": [{**ROWS[0], term: [0.1]}, *ROWS[1:]]}}


@pytest.mark.parametrize("term, other", [("slope", "residual"), ("residual", "slope")])
def test_a_slope_is_not_taken_for_a_residual_nor_the_other_way(term, other, noise, caplog):
    scheduler = GenieScheduler(tables=entry_with(term))
    scheduler.attach(source_of(term))
    follows = draw(scheduler, 3, noise(4, 2))
    assert scheduler.timesteps.tolist() == [950, 600, 150]

    scheduler.attach(source_of(other))
    for _ in range(2):
        draw(scheduler, 3, noise(4, 2))
    assert scheduler.timesteps.tolist() != [950, 600, 150]
    assert not torch.allclose(draw(scheduler, 3, noise(4, 2)), follows)

    strict = GGDMScheduler(tables=entry_with(term))
    strict.attach(source_of(other))
    with pytest.raises(ValueError, match=f"This table weighs {term}s: `attach` their source"):
        strict.set_timesteps(3)


def test_a_source_of_residuals_without_tables_leaves_the_solver_alone(noise):
    scheduler, plain = GenieScheduler(), GenieScheduler()
    scheduler.attach(source_of("residual"))
    assert torch.equal(draw(scheduler, 6, noise(4, 2)), draw(plain, 6, noise(4, 2)))
    assert scheduler.table == plain.table


def test_tables_of_a_source_are_for_the_solver_that_has_sources(noise):
    """gDDIM in a pipeline whose UNet has a step head is gDDIM."""
    for solver in (GDDIMScheduler, ExponentialMultistepScheduler, QuasiTaylorScheduler):
        scheduler, plain = solver(), solver()
        scheduler.attach(source_of("residual", TABLES))
        assert torch.equal(draw(scheduler, 3, noise(4, 2)), draw(plain, 3, noise(4, 2)))


def test_a_table_that_is_not_followed_says_so_once(caplog):
    scheduler = GenieScheduler(tables=entry_with("residual"))
    for _ in range(3):
        scheduler.set_timesteps(3)
    (record,) = [record for record in caplog.records if "`tables`" in record.message]
    assert "of 3 model calls weigh a residual, which nothing that is attached provides" in record.message


def test_tables_of_the_configuration_go_before_those_of_a_head_and_say_so(noise, caplog):
    other = {
        "3": {"timesteps": [900, 500, 100], "rows": ROWS},
        "4": {"timesteps": [900, 500, 300, 100], "rows": [*ROWS[:2], ROWS[1], ROWS[2]]},
    }
    scheduler = GenieScheduler(tables=TABLES)
    scheduler.attach(source_of("residual", other))
    for _ in range(2):
        draw(scheduler, 3, noise(4, 2))
    assert scheduler.timesteps.tolist() == [950, 600, 150]
    (message,) = caplog.messages
    assert "both have 3 model calls: those of the configuration are followed" in message
    draw(scheduler, 4, noise(4, 2))
    assert scheduler.timesteps.tolist() == [900, 500, 300, 100]
