import json

import pytest
import torch

import guided_slope
from genie_diffusers import GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.paths import draw_guided, predict


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided_slope, "REFERENCE_CALLS", 14)
        guided_slope.main(
            ["--guidance_scales", "1", "7.5", "--noises", "2", "--steps", "2", "--output_dir", str(folder)]
        )
    return json.loads((folder / "guided_slope.json").read_text())["results"]


def test_every_source_has_its_slopes_and_pictures(results):
    for found in results.values():
        assert list(found) == [
            *("secant in time", "secant in time, own paths"),
            *("exact", "head", "exact, own paths", "head, own paths", "history"),
        ]
        assert all(found[name]["slope"]["mean"] > 0 for name in found if name != "history")
        assert all(found[name]["pictures"]["mean"] > 0 for name in found if "secant" not in name)


def test_the_two_paths_are_one_without_guidance_and_two_with_it(results):
    for name in ("secant in time", "exact", "head"):
        differences = [
            results[scale][f"{name}, own paths"]["less those of the guided path"]["slope"]["mean"]
            for scale in ("1", "7.5")
        ]
        assert abs(differences[0]) < 1e-3 < abs(differences[1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_branches_combine_to_the_guided_prediction(scale):
    unet = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").eval()
    noises, timestep = draw_guided(unet, 2, 0, scale), torch.tensor(300)
    with torch.no_grad():
        guided = predict(unet, noises.noise, timestep, noises)
        of_branches = guided_slope.combined(lambda branch: predict(unet, noises.noise, timestep, branch), unet, noises)
    torch.testing.assert_close(of_branches, guided, rtol=1e-4, atol=1e-4)
