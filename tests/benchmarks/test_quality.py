import json

import pytest
import torch

import quality
from genie_diffusers import ImageClassifier
from genie_diffusers.cli import PACKAGED_MODEL, Sampler, load_pipeline
from genie_diffusers.metrics import ReferenceFeatures

ARGUMENTS = ["--samplers", "ddim,genie", "--steps", "2", "3", "--num_samples", "100", "--device", "cpu"]


CONVERGED = Sampler("genie-history", "linear", 4)


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


def run(folder, drawn: list[Sampler], patch, *arguments):
    sample = quality.sample

    def recording(pipe, config, sampler, *rest):
        drawn.append(sampler)
        return sample(pipe, config, sampler, *rest)

    patch.setattr(quality, "CONVERGED", CONVERGED)
    patch.setattr(quality, "sample", recording)
    quality.main([*ARGUMENTS, "--classifier", str(folder), "--output_dir", str(folder), *arguments])


def test_every_cell_is_measured_once_at_its_number_of_calls(results):
    folder, drawn = results
    assert drawn == [Sampler(name, None, n) for name in ("ddim", "genie") for n in (2, 3)] + [CONVERGED]
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
    first, other = cells["genie:None@2"]["frechet_distance"], cells["ddim:None@3"]["frechet_distance"]
    assert f"| GENIE (head) | {first['value']:.3f} ± {first['standard_error']:.3f} |" in tables
    assert f"| GENIE (head), 2 | DDIM, 3 | {first['value'] - other['value']:.4f} ± " in tables
    assert (folder / "quality.png").stat().st_size > 0


def test_resumed_run_measures_only_what_changed(results, monkeypatch):
    folder, _ = results
    path = folder / "quality.json"
    before = path.read_text()
    changed = json.loads(before)
    changed["cells"]["genie:None@3"]["weights"][-1] += 1.0
    path.write_text(json.dumps(changed))
    drawn: list[Sampler] = []
    run(folder, drawn, monkeypatch, "--resume")
    assert drawn == [Sampler("genie", None, 3)]
    written, before = json.loads(path.read_text()), json.loads(before)
    assert written.pop("command") == before.pop("command") + " --resume"
    assert written == before


def test_resumed_run_with_other_settings_is_an_error(results):
    folder, _ = results
    with pytest.raises(ValueError, match=r"`--resume` needs the settings of quality\.json"):
        quality.main([*ARGUMENTS, "--classifier", str(folder), "--output_dir", str(folder), "--resume", "--seed", "1"])


def test_pictures_do_not_depend_on_the_batch_size():
    pipe = load_pipeline(PACKAGED_MODEL, None, "cpu")
    pictures = quality.choose_pictures(pipe, 7, seed=3)
    assert set(pictures.labels) <= set(range(10)) and pictures.seeds == list(range(3, 10))
    config, sampler = pipe.scheduler.config, Sampler("ddpm", None, 2)  # draws noise in every step
    images = [quality.sample(pipe, config, sampler, pictures, batch_size)[0] for batch_size in (7, 3)]
    assert torch.allclose(*images, atol=1e-4)
