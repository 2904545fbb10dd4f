import json

import pytest
import torch

import guided_solver_error
import solver_error
from genie_diffusers import GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.paths import Noises, draw_guided, predict

DDIM, OURS = "DDIM", "GENIE, step head"
SMALL = ["--noises", "3", "--choice_noises", "2", "--calls", "8"]


def run(folder, *arguments) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_error, "REFERENCE_CALLS", 12)
        guided_solver_error.main([*SMALL, "--output_dir", str(folder), *arguments])
    return json.loads((folder / "guided_solver_error.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, run(folder, "--guidance_scales", "7.5", "1", "--solvers", OURS, DDIM)


@pytest.fixture(scope="module")
def unet():
    return GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").eval()


@pytest.mark.slow
def test_every_scale_has_its_errors_in_the_table(report):
    folder, written = report
    assert list(written["errors"]) == ["1", "7.5"]
    assert all(list(rows) == [DDIM, OURS] for rows in written["errors"].values())
    table = (folder / "guided_solver_error.md").read_text()
    for scale in ("1", "7.5"):
        cell = written["errors"][scale][DDIM]["8"]
        section = table.split(f"## w = {scale}\n")[1].split("##")[0]
        assert f"{cell['error']:.4f} ± {cell['standard_error']:.4f}**" in section
    assert written["errors"]["1"][DDIM]["8"] != written["errors"]["7.5"][DDIM]["8"]
    assert (folder / "guided_solver_error.png").stat().st_size > 0


@pytest.mark.slow
def test_a_later_run_leaves_the_rest_as_it_was(report):
    folder, before = report
    after = run(folder, "--guidance_scales", "3", "--solvers", DDIM)
    assert list(after["errors"]) == ["1", "3", "7.5"]
    assert all(after["errors"][scale] == before["errors"][scale] for scale in before["errors"])
    changed = run(folder, "--guidance_scales", "3", "--solvers", DDIM, "--seed", "1")
    assert list(changed["errors"]) == ["3"], "errors of other noises are not kept beside these"


def test_paths_of_all_scales_start_alike_and_scale_one_is_the_conditional_model(unet):
    one, other = draw_guided(unet, 3, 0, 1.0), draw_guided(unet, 3, 0, 7.5)
    assert torch.equal(one.noise, other.noise) and torch.equal(one.labels, other.labels)
    assert one.labels.max() < unet.config.num_class_embeds - 1
    timestep = torch.tensor(300)
    with torch.no_grad():
        conditional = predict(unet, one.noise, timestep, one)
        null = predict(unet, one.noise, timestep, Noises(one.noise, torch.full((3,), 10), None))
        guided = predict(unet, one.noise, timestep, other)
    torch.testing.assert_close(guided, null + 7.5 * (conditional - null), rtol=1e-4, atol=1e-4)
