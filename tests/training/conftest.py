import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
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


@pytest.fixture(scope="session")
def captioned_data(tmp_path_factory) -> Path:
    """A folder of 20x16 pictures with captions, as `datasets` and the Hub know it."""
    folder = tmp_path_factory.mktemp("data") / "captioned"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = ["a cat", "a dog on a mat", "cats", "the sea", "a b c", ""] * 4
    lines = []
    for i, caption in enumerate(captions):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((20, 16)).save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_base(make_stable_diffusion, tmp_path_factory):
    """A text-to-image checkpoint in the layout of the Hub: `make_base(StableDiffusionInpaintPipeline, 9)`."""

    def make(pipeline_class=StableDiffusionPipeline, unet_channels=4, scheduler=None) -> Path:
        folder = tmp_path_factory.mktemp("base") / "model"
        make_stable_diffusion(pipeline_class, unet_channels, scheduler).save_pretrained(folder)
        return folder

    return make
