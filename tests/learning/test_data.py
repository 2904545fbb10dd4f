import itertools

import datasets
import numpy as np
import pytest
import torch

from genie_diffusers.learning.data import PositionSampler, TrainingStream, load_pictures

NUM_PICTURES = 40  # of the `data` fixture


@pytest.fixture
def pictures(data, tmp_path):
    return load_pictures(str(data), 4, 3, label_column="label", cache_dir=str(tmp_path))


def test_pictures_are_the_area_averages_of_their_central_squares(data, pictures):
    source = datasets.Dataset.from_parquet(str(data / "train-00000-of-00001.parquet"))
    for i in (0, 7):
        square = np.asarray(source[i]["image"], dtype=np.float64)[:, 2:14]
        average = square.reshape(4, 3, 4, 3, 3).mean((1, 3))
        ours = np.frombuffer(pictures[i]["pixels"], np.uint8).reshape(4, 4, 3)
        # PIL rounds after each of its two passes.
        assert np.abs(ours - average).max() <= 1.0
        assert pictures[i]["label"] == source[i]["label"]


def stream(pictures, **arguments):
    return TrainingStream(pictures, (3, 4, 4), (3, 4, 4), seed=3, **arguments)


def test_sample_depends_on_its_position_alone(pictures):
    arguments = {"random_flip": True, "label_dropout": 0.5, "null_class": 3}
    positions = [5, 77, 41, 0]
    together = stream(pictures, **arguments).__getitems__(positions)
    for i, position in enumerate(positions):
        alone = stream(pictures, **arguments).__getitems__([position])
        for name, values in together.items():
            assert torch.equal(values[i], alone[name][0])


def test_every_epoch_has_every_picture_once_in_another_order(pictures):
    samples = stream(pictures)
    epochs = [samples.__getitems__(list(range(i * NUM_PICTURES, (i + 1) * NUM_PICTURES))) for i in range(2)]
    first, second = (epoch["images"].flatten(1).tolist() for epoch in epochs)
    assert sorted(first) == sorted(second) and first != second
    assert len({tuple(picture) for picture in first}) == NUM_PICTURES
    assert not torch.equal(epochs[0]["noise"], epochs[1]["noise"])


def test_flips_and_dropped_labels_have_their_frequencies(pictures):
    positions = list(range(50 * NUM_PICTURES))
    plain = stream(pictures).__getitems__(positions)
    augmented = stream(pictures, random_flip=True, label_dropout=0.1, null_class=3).__getitems__(positions)
    flipped = (augmented["images"] == plain["images"].flip(3)).flatten(1).all(1)
    same = (augmented["images"] == plain["images"]).flatten(1).all(1)
    assert (flipped ^ same).all()
    # Five standard deviations of 2,000 draws.
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.056)
    assert (augmented["labels"] == 3).float().mean() == pytest.approx(0.1, abs=0.034)
    kept = augmented["labels"] != 3
    assert torch.equal(augmented["labels"][kept], plain["labels"][kept])
    assert torch.equal(augmented["noise"], plain["noise"])


def test_processes_share_the_stream_without_gap_or_overlap():
    batches = [list(itertools.islice(PositionSampler(24, 4, process, 3), 5)) for process in range(3)]
    interleaved = [position for step in zip(*batches, strict=True) for batch in step for position in batch]
    assert interleaved == list(range(24, 24 + 60))


def test_conditional_model_without_its_label_column_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"`--label_column` must be one of the columns image, label .* got 'class'"):
        load_pictures(str(data), 4, 3, label_column="class", cache_dir=str(tmp_path))


def test_column_of_another_type_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="`--image_column` must hold pictures, got 'label'"):
        load_pictures(str(data), 4, 3, image_column="label", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`--label_column` must hold integers, got 'image'"):
        load_pictures(str(data), 4, 3, label_column="image", cache_dir=str(tmp_path))


def test_picture_smaller_than_the_resolution_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="got 16 and a picture of 16x12 pixels"):
        load_pictures(str(data), 16, 3, cache_dir=str(tmp_path))
