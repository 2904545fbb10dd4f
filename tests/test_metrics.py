import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from genie_diffusers import ImageClassifier
from genie_diffusers.metrics import (
    KernelDistance,
    QualityDistance,
    ReferenceFeatures,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    kernel_estimate,
)


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int, noise) -> torch.Tensor:
    """`count` vectors whose own mean and covariance are exactly these."""
    vectors = noise(count, len(mean))
    vectors = vectors - vectors.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(vectors.T.cov()), vectors.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ whitened).T + mean


def positive_definite(size: int, noise, seed: int) -> torch.Tensor:
    factor = noise(size, 2 * size, seed=seed)
    return factor @ factor.T / (2 * size)


@pytest.fixture
def moments(noise) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(5, seed=1), positive_definite(5, noise, seed=2)


# Fréchet distance


def test_frechet_distance_of_two_gaussians_is_the_cost_of_the_optimal_map(moments, noise):
    # Optimal transport between Gaussians is linear, and any symmetric positive T is optimal: it costs
    # E ‖T x + b − x‖², which needs no square root of a matrix.
    mean, covariance = moments
    transport, other_mean = positive_definite(5, noise, seed=3), noise(5, seed=4)
    features = with_moments(other_mean, transport @ covariance @ transport, 40, noise)
    change = transport - torch.eye(5, dtype=torch.float64)
    expected = (other_mean - mean).square().sum() + (change @ covariance @ change).trace()
    assert frechet_distance(features, mean, covariance).item() == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(features.float(), mean, covariance).dtype == torch.float64


def test_frechet_distance_to_its_own_moments_is_zero(moments, noise):
    features = with_moments(*moments, 40, noise)
    assert frechet_distance(features, *moments).item() == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_fewer_pictures_than_features_needs_no_regular_covariance(moments):
    # Two points at mean ± a have covariance 2 a aᵀ, and tr (S C)^½ = √(2 aᵀ C a).
    mean, covariance = moments
    offset = torch.arange(1.0, 6.0, dtype=torch.float64)
    distance = frechet_distance(torch.stack([mean + offset, mean - offset]), mean, covariance)
    cross = (2 * offset @ covariance @ offset).sqrt()
    assert distance.item() == pytest.approx((2 * offset @ offset + covariance.trace() - 2 * cross).item())


# Kernel distance


def test_kernel_distance_is_unbiased(noise):
    # In one dimension (xy + 1)³ = Σ_p binom(3, p) (xy)^p, so the distance is Σ_p binom(3, p) (E x^p − E y^p)². Of
    # N(0, 1) and N(½, 1) the moments are 0, 1, 0 and ½, 5/4, 13/8.
    expected = 3 * 0.5**2 + 3 * 0.25**2 + 1.625**2
    for shift, distance in ((0.0, 0.0), (0.5, expected)):
        pairs = [noise(2, 30, 1, seed=seed) for seed in range(400)]
        draws = torch.stack([kernel_distance(x, y + shift) for x, y in pairs])
        assert draws.mean().item() == pytest.approx(distance, abs=4 * draws.std().item() / 20)


def test_the_linear_kernel_sees_the_mean_alone(noise):
    x, y = noise(7, 5), 2 * noise(9, 5, seed=1) + 0.3
    # ‖mean x − mean y‖²/d, less what the mean squares of the means owe to chance
    chance = x.var(dim=0).sum() / len(x) + y.var(dim=0).sum() / len(y)
    expected = ((x.mean(dim=0) - y.mean(dim=0)).square().sum() - chance) / 5
    assert KernelDistance(y, degree=1)(x).item() == pytest.approx(expected.item())
    assert KernelDistance(y)(x).item() == kernel_distance(x, y).item()


def test_kernel_distance_is_differentiable(noise):
    features = noise(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernel_distance(x, noise(5, 3, seed=1)), features)


# Both


def test_distances_agree_with_torchmetrics(noise):
    class AsTheyAre(torch.nn.Module):
        num_features = 6

        def forward(self, features):
            return features

    features, real = noise(150, 6), noise(150, 6, seed=1) * 1.3 + 0.2
    frechet = FrechetInceptionDistance(AsTheyAre()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(AsTheyAre(), subsets=1, subset_size=150)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(features, real=False)
    own = frechet_distance(features, real.mean(dim=0), real.T.cov())
    assert own.item() == pytest.approx(frechet.compute().item(), rel=1e-6)
    assert kernel_distance(features, real).item() == pytest.approx(kernel.compute()[0].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["frechet", "kernel"])
def test_standard_error_is_the_spread_over_independent_sets(name, noise):
    real = noise(400, 4, seed=1000)

    def estimate(seed):
        features = noise(150, 4, seed=seed) * 1.2 + 0.1
        if name == "kernel":
            return kernel_estimate(features, real)
        return frechet_estimate(features, real.mean(dim=0), real.T.cov())

    estimates = [estimate(seed) for seed in range(200)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    errors = [estimate.standard_error for estimate in estimates]
    # 200 sets know the spread to 5%; the jackknife is biased upwards by about as much.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.2)


def test_estimates_are_the_distances_with_and_without_each_group(moments, noise):
    features, real = noise(130, 5), noise(100, 5, seed=1)
    for estimate, distance in (
        (frechet_estimate(features, *moments), lambda left: frechet_distance(left, *moments)),
        (kernel_estimate(features, real), lambda left: kernel_distance(left, real)),
    ):
        assert estimate.value == pytest.approx(distance(features).item(), rel=1e-12)
        groups = torch.arange(130) * 50 // 130
        left_out = [distance(features[groups != i]).item() for i in range(50)]
        assert estimate.replicates == pytest.approx(left_out, rel=1e-9)


def test_difference_on_the_same_seeds_is_known_better_than_either(moments, noise):
    features = noise(200, 5)
    estimates = [frechet_estimate(scale * features, *moments) for scale in (1.0, 1.01)]
    difference = estimates[1] - estimates[0]
    assert difference.value == estimates[1].value - estimates[0].value
    assert difference.standard_error < 0.1 * estimates[0].standard_error


def test_features_of_another_network_are_an_error(moments, noise):
    with pytest.raises(ValueError, match=r"shape \(pictures, 5\), at least two pictures, got \(120, 4\)"):
        frechet_distance(noise(120, 4), *moments)
    with pytest.raises(ValueError, match=r"shape \(pictures, 5\), at least two pictures, got \(1, 5\)"):
        kernel_distance(noise(1, 5), noise(7, 5))
    with pytest.raises(ValueError, match="at least 100 pictures, got 99"):
        frechet_estimate(noise(99, 5), *moments)


# The distance of pictures


@pytest.fixture
def classifier() -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassifier(8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4).eval()


@pytest.fixture
def distance(classifier, noise) -> QualityDistance:
    features = noise(120, 16, seed=1)
    return QualityDistance(classifier.features, ReferenceFeatures(features.mean(dim=0), features.T.cov(), features))


def test_distance_is_the_same_in_any_batch_split(distance, noise):
    images = noise(130, 3, 8, 8).float()
    whole, parts = distance(images, batch_size=130), distance(images, batch_size=7)
    for name in ("frechet_distance", "kernel_distance"):
        assert whole[name].value == pytest.approx(parts[name].value, rel=1e-5)
        assert whole[name].replicates == pytest.approx(parts[name].replicates, rel=1e-5)


def test_overshoots_are_clipped(distance, noise):
    images = noise(3, 3, 8, 8).float()
    assert torch.equal(distance.features(3 * images), distance.features((3 * images).clamp(-1, 1)))
    assert not torch.allclose(distance.features(images / 10), distance.features(images / 5))


def test_classifier_and_reference_come_back_from_their_folder(classifier, distance, noise, tmp_path):
    classifier.save_pretrained(tmp_path)
    distance.reference.save_pretrained(tmp_path)
    loaded, images = QualityDistance.from_pretrained(tmp_path), noise(4, 3, 8, 8).float()
    assert torch.equal(loaded.features(images), distance.features(images))
    assert torch.equal(loaded.reference.mean, distance.reference.mean)
    assert torch.equal(loaded.reference.covariance, distance.reference.covariance)
    assert torch.allclose(loaded.reference.features.double(), distance.reference.features, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def packaged() -> QualityDistance:
    return QualityDistance.from_pretrained()


def test_packaged_classifier_has_the_features_of_its_reference(packaged):
    generator = torch.Generator().manual_seed(0)
    features = packaged.features(torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1)
    assert features.shape == (3, 128)
    mean, covariance, reference_features = packaged.reference
    assert mean.shape == (128,) and covariance.shape == (128, 128) and reference_features.shape == (10_000, 128)
    assert torch.linalg.eigvalsh(covariance).min() > 0


def test_real_pictures_are_near_and_noise_is_far(packaged):
    mean, covariance, reference_features = packaged.reference
    near = [frechet_distance(reference_features[:n], mean, covariance).item() for n in (500, 2000)]
    assert near[1] < near[0]  # the bias
    noise = torch.rand(500, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert frechet_distance(packaged.features(noise), mean, covariance).item() > 20 * near[0]
