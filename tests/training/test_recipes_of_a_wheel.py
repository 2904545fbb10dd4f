"""What a wheel has as `genie_diffusers.recipes` is the scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_script_runs_as_a_module_and_its_card_quotes_a_command_that_does(data, tmp_path):
    assert '"training" = "genie_diffusers/recipes"' in (REPOSITORY / "pyproject.toml").read_text()
    package = tmp_path / "site" / "genie_diffusers"
    shutil.copytree(REPOSITORY / "genie_diffusers", package, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(REPOSITORY / "training", package / "recipes")
    script = ["-m", "genie_diffusers.recipes.train_classifier", "--dataset_name", data, "--output_dir", "result"]
    script += ["--resolution", "8", "--test_split", "train", "--max_train_steps", "1", "--report_to", "none"]
    environment = {"PYTHONPATH": str(package.parent), "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    run = subprocess.run(
        [*launcher, *map(str, script)], env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    card = ModelCard.load(tmp_path / "result" / "README.md").text
    assert "accelerate launch -m genie_diffusers.recipes.train_classifier --dataset_name path/to/pictures" in card
