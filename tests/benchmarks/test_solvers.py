import json

import pytest

import solvers

ARGUMENTS = "--calls 4 --grids default quadratic- --noises 4 --choice_noises 2 --draws 64 --device cpu".split()


def report_of(folder, *arguments):
    solvers.main([*ARGUMENTS, *arguments, "--output_dir", str(folder)])
    return json.loads((folder / "solvers.json").read_text()), (folder / "solvers.md").read_text()


def test_errors_draws_and_orders_of_the_mixtures(tmp_path):
    report, text = report_of(tmp_path, "--problem", "plane", "--solvers", "ddim", "unipc_2", "er_sde_1")
    assert set(report["errors"]) == set(report["draws"]) == {"plane, std 0.4", "plane, std 0.4, as a flow"}
    for rows in report["errors"].values():
        assert set(rows) == {"ddim", "unipc_2"}
        assert rows["unipc_2"]["4"]["value"] < rows["ddim"]["4"]["value"]
    for rows in report["draws"].values():
        assert set(rows) == {"er_sde_1", "ddim, eta=1", "unipc_2", "exact draws"}
    for name, expected in (("ddim", 1), ("unipc_2", 3), ("er_sde_1", 1)):
        assert report["orders"][name] == pytest.approx({"vp": expected, "flow": expected}, abs=0.3)
        assert f"| {name} |" in text


def test_the_packaged_models(tmp_path, monkeypatch):
    monkeypatch.setattr(solvers, "REFERENCE_CALLS", 12)
    report, _ = report_of(tmp_path, "--problem", "packaged", "--solvers", "ddim", "unipc_2")
    assert set(report["errors"]) == {"packaged ddpm-cifar10-16", "packaged flow-cifar10-16"} and not report["draws"]
    for rows in report["errors"].values():
        assert 0 < rows["unipc_2"]["4"]["value"] < rows["ddim"]["4"]["value"] < 1
