import json
import math

import pytest
import torch
from PIL import Image

import dsno
from genie_diffusers import DSNOPipeline, DSNOUNet2DModel, GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL


def test_calls_are_interpolated_between_logarithms():
    by_calls = {1: 0.9, 2: 0.4, 8: 0.1, 20: 0.02}
    assert dsno.equivalent_calls(0.4, by_calls) == pytest.approx(2)
    assert dsno.equivalent_calls(0.2, by_calls) == pytest.approx(4)
    assert math.isnan(dsno.equivalent_calls(1.0, by_calls)) and math.isnan(dsno.equivalent_calls(0.01, by_calls))


def test_errors_are_those_of_the_last_points():
    reference = torch.ones(4, 3, 1, 2, 2)
    found = dsno.errors(torch.stack([torch.full((4, 1, 2, 2), 1.5), torch.full((4, 1, 2, 2), 0.9)], dim=1), reference)
    assert [entry["error"] for entry in found] == pytest.approx([0.5, 0.1])
    assert [entry["standard_error"] for entry in found] == pytest.approx([0, 0], abs=1e-7)


def test_seconds_are_medians_of_processor_time(monkeypatch):
    clock = iter([0, 9, 9, 10, 10, 13, 13, 15, 15, 17, 17, 21])
    monkeypatch.setattr(dsno.time, "process_time", lambda: next(clock))
    assert dsno.cpu_seconds({"a": lambda: None, "b": lambda: None}, repeats=2) == {"a": 2.5, "b": 3.0}


@pytest.mark.slow
def test_a_small_run_measures_everything_and_draws_it(tmp_path, monkeypatch):
    unet = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float().eval()
    config = GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")
    for name, points, modes in (("operator", 4, 2), ("plain", 1, 0)):
        DSNOPipeline(DSNOUNet2DModel.from_unet(unet, points, modes, config)).save_pretrained(tmp_path / name)
    monkeypatch.setattr(dsno, "CONVERGED", 10)
    monkeypatch.setattr(dsno, "PAPER", ("GDDIMScheduler", 12, dsno.PAPER[2]))
    arguments = {"operator": tmp_path / "operator", "plain": tmp_path / "plain", "output_dir": tmp_path / "results"}
    arguments |= {"noises": 10, "teacher_noises": 2, "teacher_calls": 9, "num_samples": 100, "repeats": 1}
    counts = ["--calls", "1", "2", "--quality_calls", "2"]
    dsno.main([*(str(part) for name, value in arguments.items() for part in (f"--{name}", value)), *counts])
    results = json.loads((tmp_path / "results" / "dsno.json").read_text())
    assert [len(row["errors"]) for row in results["teachers"]] == [4, 4]
    lengths = {name: len(entries) for name, entries in results["errors"].items()}
    assert lengths == {"operator": 4, "plain regression": 1, "teacher, 1 calls": 1, "teacher, 2 calls": 1}
    one, two = (results["errors"][f"teacher, {calls} calls"][0]["error"] for calls in (1, 2))
    assert one > 1.5 * two > 0
    assert [(row["label"], row["calls"]) for row in results["quality"]] == [
        ("operator", 1),
        ("plain regression", 1),
        ("teacher", 2),
    ]
    assert results["parameters"]["temporal layers"] == 126_976
    assert results["cost"]["ratio"] > 1
    table = (tmp_path / "results" / "dsno.md").read_text()
    assert "| GDDIMScheduler | 12 | " in table and "| operator | " in table
    for name in ("dsno.png", "dsno_trajectories.png"):
        Image.open(tmp_path / "results" / name).verify()
