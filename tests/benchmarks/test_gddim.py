import shutil

import pytest
import torch

import gddim

SEEDS, LABELS = [0, 1], torch.tensor([1, 5])


@pytest.fixture(scope="module")
def pipes():
    return {name: gddim.load(name) for name in gddim.PROCESSES}


@pytest.mark.parametrize("name", gddim.PROCESSES)
def test_one_model_call_is_the_same_denoising_step_for_every_sampler(pipes, name):
    expected, _ = gddim.sample(pipes[name], "gDDIM, order 1", 1, SEEDS, LABELS, 2)
    for sampler in gddim.samplers_of(name):
        if sampler != gddim.RK45:
            drawn, calls = gddim.sample(pipes[name], sampler, 1, SEEDS, LABELS, 2)
            assert calls == 1
            torch.testing.assert_close(drawn, expected, rtol=1e-2, atol=1e-2)


def test_adaptive_and_multistep_solutions_meet(pipes):
    precise, _ = gddim.sample(pipes["CLD"], "gDDIM, order 3", 40, SEEDS[:1], LABELS[:1], 1)
    model = gddim.Model(pipes["CLD"], LABELS[:1])
    noise = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(SEEDS[0]))
    adaptive = gddim.runge_kutta(model, model.process.prior(noise.double()), 3e-3)
    assert (adaptive - precise).norm() < 0.25 * precise.norm()


def test_the_table_is_that_of_the_measured_cells(tmp_path):
    shutil.copy(gddim.RESULTS / "gddim.json", tmp_path)
    gddim.main(["--only", "table", "--output_dir", str(tmp_path)])
    table = (tmp_path / "gddim.md").read_text()
    assert table == (gddim.RESULTS / "gddim.md").read_text()
    page = (gddim.RESULTS.parents[1] / "docs" / "gddim.md").read_text()
    assert table.split("## Fréchet distance\n\n")[1].split("\n\n")[0] in page
