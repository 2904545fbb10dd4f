import json

import pytest
import torch

import quality
from genie_diffusers import GenieScheduler, GenieUNet2DModel, ImageClassifier
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.metrics import ReferenceFeatures

OURS = "GENIE, step head"
ARGUMENTS = ["--samplers", "DDIM", OURS, "--steps", "2", "3", "--num_samples", "100", "--device", "cpu"]
CONVERGED = ("GENIE, head-free", "linear+", 4)
GRIDS = {"DDIM": {"2": {"grid": "linear-"}, "3": {"grid": "karras+"}}, OURS: {n: {"grid": "default"} for n in "23"}}
CELLS = [("DDIM", "linear-", 2), ("DDIM", "karras+", 3), (OURS, "default", 2), (OURS, "default", 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a small run, and what was sampled for it."""
    folder, drawn = tmp_path_factory.mktemp("results"), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = ImageClassifier(16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4).eval()
        features = classifier.features(torch.rand(110, 3, 16, 16)).detach()
    classifier.save_pretrained(folder)
    ReferenceFeatures(features.mean(dim=0), features.T.cov(), features).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        run(folder, drawn, patch)
    return folder, drawn


def run(folder, drawn: list[tuple], patch, *arguments):
    sample = quality.sample

    def recording(unet, config, name, grid, calls, *rest):
        drawn.append((name, grid, calls))
        return sample(unet, config, name, grid, calls, *rest)

    patch.setattr(quality, "CONVERGED", CONVERGED)
    patch.setattr(quality, "sample", recording)
    (folder / "grids.json").write_text(json.dumps({"errors": GRIDS}))
    folders = ["--classifier", str(folder), "--output_dir", str(folder), "--grids", str(folder / "grids.json")]
    quality.main([*ARGUMENTS, *folders, *arguments])


def test_every_cell_is_measured_once_at_its_number_of_calls(results):
    folder, drawn = results
    assert drawn == [*CELLS, CONVERGED]
    written = json.loads((folder / "quality.json").read_text())
    assert [cell["calls"] for cell in written["cells"].values()] == [2, 3, 2, 3]
    assert [cell["own"] for cell in written["cells"].values()] == [False, False, True, True]
    for cell in written["cells"].values():
        assert cell["frechet_distance"]["value"] > written["real"]["frechet_distance"]["value"] > 0
        assert quality.from_json(cell["kernel_distance"]).standard_error == pytest.approx(
            cell["kernel_distance"]["standard_error"], rel=1e-3
        )


def test_tables_and_comparison_show_the_measured_numbers(results):
    folder, _ = results
    cells = json.loads((folder / "quality.json").read_text())["cells"]
    tables = (folder / "quality.md").read_text()
    first, other = cells[f"{OURS}@2"]["frechet_distance"], cells["DDIM@3"]["frechet_distance"]
    assert f"| {OURS} | {first['value']:.3f} ± {first['standard_error']:.3f} |" in tables
    assert f"| {OURS}, 2 | DDIM, 3 | {first['value'] - other['value']:.3f} ± " in tables
    assert (folder / "quality.png").stat().st_size > 0


def test_resumed_run_measures_only_what_changed(results, monkeypatch):
    folder, _ = results
    path = folder / "quality.json"
    before = path.read_text()
    changed = json.loads(before)
    changed["cells"][f"{OURS}@3"]["weights"][-1] += 1.0
    path.write_text(json.dumps(changed))
    drawn: list[tuple] = []
    run(folder, drawn, monkeypatch, "--resume")
    assert drawn == [(OURS, "default", 3)]
    written, before = json.loads(path.read_text()), json.loads(before)
    assert written.pop("command") == before.pop("command") + " --resume"
    assert written == before


def test_resumed_run_with_other_settings_is_an_error(results):
    folder, _ = results
    with pytest.raises(ValueError, match=r"`--resume` needs the settings of quality\.json"):
        run(folder, [], pytest.MonkeyPatch(), "--resume", "--seed", "1")


def test_pictures_do_not_depend_on_the_batch_size():
    unet = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float().eval()
    config = GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")
    noises = quality.choose_pictures(unet, 7, seed=3)
    assert set(noises.labels.tolist()) <= set(range(10))
    for name in ("DDIM", OURS):
        images = [quality.sample(unet, config, name, "default", 2, noises, batch_size)[0] for batch_size in (7, 3)]
        assert torch.allclose(*images, atol=1e-4)
