import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from genie_diffusers import ImageClassifier
from genie_diffusers.learning.data import load_pictures
from genie_diffusers.learning.run import RunLog
from genie_diffusers.metrics import QualityDistance
from training import train_classifier

ARGUMENTS = ["--test_split", "train", "--resolution", "8", "--random_flip", "--block_out_channels", "8", "16"]
ARGUMENTS += ["--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1", "--learning_rate", "1e-2"]
ARGUMENTS += ["--checkpointing_steps", "2", "--report_to", "none", "--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """The folder of a run of 4 steps that was done twice from step 2 on, and its losses before and after."""
    folder = tmp_path_factory.mktemp("classifier")
    places = ["--dataset_name", data, "--cache_dir", folder / "cache", "--output_dir", folder / "result"]
    args = train_classifier.parse_args([*map(str, places), *ARGUMENTS])
    losses = []
    for _ in range(2):
        train_classifier.main(args)
        losses.append(RunLog.read(args.output_dir / "loss.csv"))
        shutil.rmtree(args.output_dir / "checkpoint-4")
    return args, losses


@pytest.fixture(scope="module")
def pictures(resumed):
    args, _ = resumed
    return load_pictures(args.dataset_name, 8, 3, label_column=args.label_column, cache_dir=args.cache_dir)


def as_images(pictures) -> torch.Tensor:
    pixels = np.frombuffer(b"".join(pictures["pixels"]), dtype=np.uint8).reshape(-1, 8, 8, 3)
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).float()


def test_resumed_run_repeats_its_losses(resumed):
    _, (before, after) = resumed
    assert [step for step, *_ in before] == [1, 2, 3, 4]
    assert before == after


def test_card_states_the_accuracy_of_the_saved_weights(resumed, pictures):
    args, _ = resumed
    classifier = ImageClassifier.from_pretrained(args.output_dir).eval()
    correct = classifier(as_images(pictures)).argmax(dim=1) == torch.tensor(pictures["label"])
    card = ModelCard.load(args.output_dir / "README.md")
    stated = re.search(r"\| Accuracy \| ([\d.]+)% of the 40 pictures", card.text)[1]
    assert float(stated) == pytest.approx(100 * correct.float().mean().item(), abs=0.01)
    assert card.data.pipeline_tag == "image-classification"


def test_reference_holds_the_features_of_the_saved_weights(resumed, pictures):
    args, _ = resumed
    distance = QualityDistance.from_pretrained(args.output_dir)
    features = distance.features(as_images(pictures)).double()
    mean, covariance, reference_features = distance.reference
    assert torch.allclose(mean, features.mean(dim=0), atol=1e-6)
    assert torch.allclose(covariance, features.T.cov(), atol=1e-6)
    assert torch.allclose(reference_features.double(), features, rtol=1e-3, atol=1e-4)
    assert distance.estimate(features.repeat(3, 1))["frechet_distance"].value < 1e-3
