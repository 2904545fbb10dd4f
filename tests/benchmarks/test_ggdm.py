import json
import sys

import pytest
import torch

import ggdm
from genie_diffusers import GenieScheduler, GGDMScheduler, ImageClassifier
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.metrics import ReferenceFeatures


def test_memory_grows_by_the_stored_states_with_rematerialisation_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ggdm.py"])
    ggdm.main(["memory", "--steps", "2", "4", "--batch_size", "8", "--output_dir", str(tmp_path)])
    grown = json.loads((tmp_path / "ggdm_memory.json").read_text())["states_per_step"]
    assert grown["with rematerialisation"] < 3.1  # x, ε and x̂_0; the weights are few
    assert grown["without"] > 100
    assert (tmp_path / "ggdm_memory.png").exists()


@pytest.mark.slow
def test_quality_has_a_number_for_every_sampler_and_network(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ggdm.py"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageClassifier(16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4).eval()
        features = network.features(torch.rand(110, 3, 16, 16)).detach()
    network.save_pretrained(tmp_path / "network")
    ReferenceFeatures(features.mean(dim=0), features.T.cov(), features).save_pretrained(tmp_path / "network")
    config = GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")
    GGDMScheduler.from_ddim(GenieScheduler.from_config(config), 5).save_pretrained(tmp_path / "learned")
    options = [
        "--learned",
        f"mine={tmp_path / 'learned'}",
        "--samplers",
        "DDPM",
        "--networks",
        str(tmp_path / "network"),
    ]
    options += ["--steps", "5", "10", "--num_samples", "100", "--batch_size", "100", "--output_dir", str(tmp_path)]
    ggdm.main(["quality", *options])
    cells = json.loads((tmp_path / "ggdm_quality.json").read_text())["cells"]
    assert list(cells) == ["mine@5", "DDPM@5", "DDPM@10"]
    assert all(cell["network"]["kernel_distance"]["standard_error"] > 0 for cell in cells.values())
    table = (tmp_path / "ggdm_quality.md").read_text()
    assert table.count("| mine | ") == 2 and "features of network" in table
    value = 1e3 * cells["DDPM@10"]["network"]["kernel_distance"]["value"]
    assert f"{value:.3f} ±" in table
    monkeypatch.setattr(ggdm, "sample", pytest.fail)
    ggdm.main(["quality", *options, "--resume"])
