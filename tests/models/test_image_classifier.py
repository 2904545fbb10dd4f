import pytest
import torch

from genie_diffusers import ImageClassifier


@pytest.fixture
def classifier() -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageClassifier(16, num_classes=4, block_out_channels=(8, 12, 16), norm_num_groups=4)
    return model.double().eval()


def test_logits_are_a_linear_map_of_the_features(classifier, noise):
    images = noise(5, 3, 16, 16)
    features = classifier.features(images)
    assert features.shape == (5, 16)
    weight, bias = classifier.classifier.weight, classifier.classifier.bias
    assert torch.allclose(classifier(images), features @ weight.T + bias)


def test_features_of_a_picture_do_not_depend_on_its_batch(classifier, noise):
    images = noise(5, 3, 16, 16)
    alone = torch.cat([classifier.features(image[None]) for image in images])
    assert torch.allclose(classifier.features(images), alone, rtol=1e-12)
    assert torch.allclose(classifier.train().features(images), alone, rtol=1e-12)


def test_classifier_comes_back_from_its_folder(classifier, noise, tmp_path):
    classifier.save_pretrained(tmp_path)
    images = noise(2, 3, 16, 16)
    loaded = ImageClassifier.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(loaded(images), classifier(images))
