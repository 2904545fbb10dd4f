import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of 16x12 pictures in the Hub's parquet layout."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(40)]
    labels = [i % 3 for i in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(
        folder / "train-00000-of-00001.parquet"
    )
    return folder
