"""The examples run as their own docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_interpolation_ends_near_the_originals(tmp_path):
    colours = {"red.png": (200, 60, 40), "blue.png": (40, 80, 190)}
    for name, colour in colours.items():
        Image.new("RGB", (32, 24), colour).save(tmp_path / name)
    run = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "interpolate.py", *colours, "--points", "3"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    grid = np.asarray(Image.open(tmp_path / "interpolation.png"), dtype=float)
    assert grid.shape == (2 * 96, 5 * 96, 3)
    decoded = grid[:96].reshape(96, 5, 96, 3).transpose(1, 0, 2, 3)
    for original, end in ((decoded[0], decoded[1]), (decoded[4], decoded[3])):
        assert np.abs(original - end).mean() < 8
    assert np.abs(decoded[2] - decoded[0]).mean() > 8
    assert np.abs(decoded[2] - decoded[4]).mean() > 8
