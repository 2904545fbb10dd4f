"""Samplers as values: what a table says of itself, and what it refuses to be read from."""

import json

import numpy as np
import pytest

from genie_diffusers import (
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    Levels,
    QuasiTaylorScheduler,
    Table,
)
from genie_diffusers.core import build
from genie_diffusers.core.solvers.ddim import ddim

SCHEDULERS = {
    "hermite": GenieScheduler(time_grid="uniform_lambda"),
    "taylor": GenieScheduler(method="taylor"),
    "quasi-taylor": QuasiTaylorScheduler(method="sde"),
    "gddim": GDDIMScheduler(multistep_order=3, corrector=True),
    "ggdm": GGDMScheduler.from_scheduler(GenieScheduler(), [6]),
}
ENTRY = {"timesteps": [900, 400], "rows": [{"sample": [0.9], "data": [0.1]}, {"data": [0.8, 0.2], "noise": [0.0]}]}


@pytest.fixture(params=SCHEDULERS)
def table(request) -> Table:
    scheduler = SCHEDULERS[request.param]
    scheduler.set_timesteps(6)
    return scheduler.table


def test_a_table_survives_json(table):
    again = Table.from_json(table.to_json())
    assert again == table
    assert list(map(dict, again.rows)) == [{term: w for term, w in row.items() if w} for row in table.rows]


def test_tables_are_equal_if_they_are_the_same_sampler(table):
    entry = table.to_dict()
    entry["rows"][2]["sample"][0] += 1e-9
    assert Table.from_dict(entry) != table
    assert table != "a table"


def test_folding_leaves_no_corrections_and_the_same_sum():
    scheduler = SCHEDULERS["hermite"]
    scheduler.set_timesteps(6)
    row, correction = scheduler.table[3], scheduler.table.corrections[3]
    folded = scheduler.table.fold()
    assert not any(folded.corrections)
    for term in {*row, *correction}:
        assert folded[3][term] == pytest.approx(row.get(term, 0.0) + row["sample", 0] * correction.get(term, 0.0))
    assert folded.fold() == folded


def test_a_run_may_start_where_no_row_reaches_back_before_it():
    levels = Levels(np.array([900.0, 500.0, 100.0]), np.array([0.1, 0.5, 0.9, 1.0]), np.array([0.99, 0.8, 0.4, 0.0]))
    rows = [{("sample", 0): 1.0}, {("data", 1): 1.0}, {("data", 0): 1.0}]
    table = build(levels, lambda levels, index, known: rows[index])
    assert [table.reaches_before(begin) for begin in range(3)] == [None, (1, 0), None]
    assert table.needs() == {"sample", "data"}


def test_ddim_keeps_the_marginals_on_any_path():
    gammas = np.array([30.0, 4.0, 0.5, 0.0])
    for norm in (np.hypot(1.0, gammas), 1.0 + gammas):  # variance preserving, flow matching
        levels = Levels(np.arange(3.0)[::-1], 1 / norm, gammas / norm)
        for eta in (0.0, 0.5, 1.0):
            table = build(levels, lambda *where, eta=eta: ddim(*where, eta=eta))
            alphas, sigmas = table.marginals()
            np.testing.assert_allclose(alphas, levels.alphas, rtol=1e-12)
            np.testing.assert_allclose(sigmas, levels.sigmas, rtol=1e-12, atol=1e-15)


def test_levels_are_those_of_the_path_where_none_are_stated():
    process = GenieScheduler().process
    table = Table.from_dict(ENTRY, process, 2)
    np.testing.assert_allclose(table.alphas, [*process.alpha([900, 400]), 1.0])
    assert table.sigmas[-1] == 0.0
    with pytest.raises(ValueError, match="must state 'alphas' and 'sigmas'"):
        Table.from_dict(ENTRY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [900]}, r"2 strictly decreasing timesteps between 999 and 0 for 2 model calls, got \[900\]"),
        ({"timesteps": [400, 900.5]}, None),  # from data to noise: an encoder
        ({"timesteps": [400, 400]}, "2 strictly decreasing timesteps"),
        ({"timesteps": [0, 0]}, None),  # an encoder's first one stands for clean data too
        ({"timesteps": [1400, 400]}, "between 999 and 0"),
        ({"timesteps": [float("nan"), 400]}, "finite numbers for 'timesteps'"),
        ({"timesteps": "ab"}, "finite numbers for 'timesteps'"),
        ({"rows": [{"sample": [1.0]}]}, "a row for each of its 2 timesteps.*got 1 and 0"),
        ({"corrections": [{}]}, "as many corrections or none, got 2 and 1"),
        ({"rows": [{"sample": 1.0}, {}]}, "a list of weights for 'sample', got 1.0"),
        ({"model_levels": [[0.1, 0.9]]}, "two lists in 'model_levels'"),
        ({"model_levels": [[0.1], [0.9]]}, "2 values of α and of σ in 'model_levels'"),
        ({"corection": [{}, {}]}, r"must have keys of alphas, .*got \['corection'\]"),
        ({"rows": [{"sample": [1.0, 0.5]}, {}]}, r"'sample' in each of 2 steps, at most back to the first.*\[2, 0\]"),
        ({"rows": [{"sample": [float("inf")]}, {}]}, "'sample' by finite numbers"),
        ({"rows": [{"sample": ["x"]}, {}]}, "'sample' by finite numbers"),
        ({"rows": [{"velocity": [1.0]}, {}]}, "must weigh nothing but sample, prediction, data"),
        ({"rows": [{"noise": [-0.1]}, {}]}, "2 values of 'noise', none negative"),
        ({"alphas": [0.1, 0.9], "sigmas": [0.9, 0.1]}, "3 values of 'alphas', none negative, for 2 model calls"),
        ({"sigmas": [0.9, 0.1, -1.0]}, None),  # not read without alphas
        ({"rows": None, "weights": [[1.0, 0.1], [1.0]], "residuals": [0.1]}, "weights"),
    ],
)
def test_malformed_tables_are_errors_that_say_what_is_wrong(change, message):
    entry = {key: value for key, value in {**ENTRY, **change}.items() if value is not None}
    if message is None:
        Table.from_dict(entry, GenieScheduler().process, 2)
        return
    with pytest.raises(ValueError, match=message):
        Table.from_dict(entry, GenieScheduler().process, 2)


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(ValueError, match="`tables` must be a dictionary, got list"):
        Table.from_dict([1, 2])
    with pytest.raises(ValueError, match="'timesteps' and 'rows', got 'rows'"):
        Table.from_dict({"rows": []})


def test_a_table_of_another_noise_schedule_is_refused():
    scheduler = GenieScheduler()
    scheduler.set_timesteps(6)
    entry = scheduler.table.fold().to_dict()
    Table.from_dict(entry, scheduler.process, 6)
    with pytest.raises(ValueError, match="noise levels of another model"):
        Table.from_dict(entry, GenieScheduler(beta_schedule="scaled_linear").process, 6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({("sample", 0): 1.0, ("predicton", 0): -5.0}, r"a term of sample, prediction, .* got \('predicton', 0\)"),
        ({("prediction", 1): 1.0}, r"at most 0 steps ago.* got \('prediction', 1\)"),
        ({("noise", 1): 1.0}, r"noise of now alone, got \('noise', 1\)"),
        ({"sample": 1.0}, r"must weigh \(term, how many steps ago\)"),
        ({("sample", 0): float("nan")}, "by a finite number, got nan"),
        (None, "must have a dictionary of weights .* got None"),
    ],
)
def test_rows_that_weigh_what_there_is_not_are_refused(weights, message):
    levels = Levels(np.array([900.0, 400.0]), np.array([0.1, 0.6, 1.0]), np.array([0.99, 0.8, 0.0]))
    with pytest.raises(ValueError, match="Step 0 " + message if message.startswith("must") else message):
        build(levels, lambda levels, index, known: weights)
    with pytest.raises(ValueError, match=message):
        build(levels, lambda *_: {("sample", 0): 1.0}, lambda *_: weights)


def test_marginals_are_those_of_numbers_and_of_runs_from_noise():
    for scheduler in (GDDIMCLDScheduler(), GenieInverseScheduler(time_grid="uniform_lambda")):
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="weights are numbers and that start with noise"):
            scheduler.table.marginals()


# --- what earlier versions wrote -------------------------------------------------------------------------------------


def test_rows_of_heads_are_read():
    entry = {"timesteps": [900, 400], "weights": [[0.9, -0.2], [1.1, -0.3, 0.05]], "residuals": [0.1, 0.0]}
    table = Table.from_dict(entry, GenieScheduler().process, 2)
    assert table[0] == {("sample", 0): 0.9, ("prediction", 0): -0.2, ("residual", 0): 0.1}
    assert table[1] == {("sample", 0): 1.1, ("prediction", 0): -0.3, ("prediction", 1): 0.05}


@pytest.mark.parametrize("data_form", [False, True])
def test_columns_of_ggdm_are_read(data_form):
    entry = {"timesteps": [900, 400], "sample": [[0.9], [0.7, 0.2]], "prediction": [[-0.4], [0.0, 0.2]]}
    entry |= {"slope": [[], [0.05]], "noise": [0.3, 0.0], "data_form": data_form}
    what = "data" if data_form else "prediction"
    table = Table.from_dict(entry, GenieScheduler().process, 2)
    assert table[0] == {("sample", 0): 0.9, (what, 0): -0.4, ("noise", 0): 0.3}
    assert table[1] == {("sample", 0): 0.7, ("sample", 1): 0.2, (what, 1): 0.2, ("slope", 0): 0.05}


def test_rows_of_encoders_are_read():
    process = GenieScheduler().process
    gammas = process.gamma(np.array([0.0, 300.0, 999.0]))
    entry = {"sigmas": gammas.tolist(), "weights": [[1.0, 0.1], [0.9, 0.2, 0.3]], "options": {"method": "hermite"}}
    table = Table.from_dict(json.loads(json.dumps(entry)), process, 2)
    assert list(table.timesteps) == [0, 300]
    np.testing.assert_allclose(np.divide(table.sigmas, table.alphas), gammas)
    assert table[1] == {("sample", 0): 0.9, ("prediction", 0): 0.2, ("prediction", 1): 0.3}
    assert table.learned_for == {"method": "hermite"}


def test_rows_of_encoders_of_flows_are_read():
    encoder = GenieInverseScheduler(
        method="taylor", final_sigmas_type="sigma_min", prediction_type="flow_prediction", time_grid="uniform_lambda"
    )
    encoder.set_timesteps(5)
    table, gammas = encoder.table, encoder.levels.gammas
    weights = [[row[key] for key in (("sample", 0), ("prediction", 0))] for row in table.rows]
    read = Table.from_dict({"sigmas": gammas.tolist(), "weights": weights, "options": {}}, encoder.process, 5)
    np.testing.assert_allclose(read.alphas, table.alphas, rtol=1e-12)
    np.testing.assert_allclose(read.sigmas, table.sigmas, rtol=1e-12)
