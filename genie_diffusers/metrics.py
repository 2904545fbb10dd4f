"""
Distances between sets of pictures, measured on the features that a network has of them.

The formulas are those of FID (Heusel et al., 2017, https://huggingface.co/papers/1706.08500) and KID (Bińkowski et
al., 2018, https://huggingface.co/papers/1801.01401). The network is another one, so the numbers are others: they
compare samplers of one model at an equal number of pictures, and nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .models import ImageClassifier

PACKAGED_CLASSIFIER = str(Path(__file__).parent / "checkpoints" / "classifier-cifar10-16")
REFERENCE_FILE = "reference.safetensors"

#: left out in turn; a standard error is then itself known to 1/√(2·49), 10%
JACKKNIFE_GROUPS = 50


@dataclass(frozen=True)
class Estimate:
    """
    A distance with its uncertainty over the generated pictures; the real ones are the same for all.

    The difference of two estimates is an estimate too. Taken from the same seeds in the same order it is known far
    better than either, because most of what is random is common to both.

    Args:
        value (`float`): The distance.
        replicates (`np.ndarray` of shape `(50,)`): The distance without each fiftieth of the pictures in turn.
    """

    value: float
    replicates: np.ndarray

    @property
    def standard_error(self) -> float:
        """By the delete-a-group jackknife."""
        return math.sqrt((len(self.replicates) - 1) * self.replicates.var())

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.replicates - other.replicates)


class ReferenceFeatures(NamedTuple):
    """
    What the distances need to know of the real pictures.

    Args:
        mean (`torch.Tensor` of shape `(features,)`): Mean of the features.
        covariance (`torch.Tensor` of shape `(features, features)`): Unbiased covariance of the features.
        features (`torch.Tensor` of shape `(pictures, features)`): Features of some of the pictures, or of others.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ReferenceFeatures":
        """Load what [`~ReferenceFeatures.save_pretrained`] has saved."""
        return cls(**load_file(Path(folder) / REFERENCE_FILE))

    def save_pretrained(self, folder: str | Path):
        """Save beside a classifier: the statistics in double, the features in half precision."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "features": self.features.half()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / REFERENCE_FILE)


def frechet_distance(features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """
    Squared Fréchet distance ‖μ − m‖² + tr(S + C − 2 (S C)^½) between two Gaussians, in float64, differentiable.

    It is biased: features of n real pictures are at a distance that falls as 1/n. Compare at equal n.

    Args:
        features (`torch.Tensor` of shape `(pictures, features)`): What μ and S are estimated from.
        mean (`torch.Tensor` of shape `(features,)`): m.
        covariance (`torch.Tensor` of shape `(features, features)`): C.

    Raises:
        ValueError: If there are fewer than two pictures, or the number of features differs.
    """
    _check_features(features, len(mean))
    features, mean, covariance = features.double(), mean.double(), covariance.double()
    # tr (S C)^½ = tr (C^½ S C^½)^½, which is symmetric.
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    own_covariance = features.T.cov()
    cross = torch.linalg.eigvalsh(root @ own_covariance @ root).clamp(min=0).sqrt().sum()
    return (features.mean(dim=0) - mean).square().sum() + own_covariance.trace() + covariance.trace() - 2 * cross


def frechet_estimate(features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> Estimate:
    """
    [`frechet_distance`] with its uncertainty.

    Raises:
        ValueError: If there are fewer than 100 pictures.
    """
    groups = _groups(features).argmax(dim=1)
    replicates = [frechet_distance(features[groups != i], mean, covariance) for i in range(JACKKNIFE_GROUPS)]
    return Estimate(frechet_distance(features, mean, covariance).item(), torch.stack(replicates).cpu().numpy())


class KernelDistance:
    """
    Squared maximum mean discrepancy under the kernel k(x, y) = (x·y/d + 1)^degree, in float64, differentiable.

    Unbiased at any number of pictures, hence negative now and then for equal distributions.

    Args:
        reference_features (`torch.Tensor` of shape `(other pictures, features)`): Features of the one set.
        degree (`int`, defaults to 3): 3 is the kernel of KID; 1 sees the mean of the features only.
    """

    def __init__(self, reference_features: torch.Tensor, degree: int = 3):
        self.reference_features, self.degree = reference_features, degree
        self._within = _mean_within(reference_features, degree)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """
        The distance of the other set, of features of shape `(pictures, features)`.

        Raises:
            ValueError: If there are fewer than two pictures in a set, or the number of features differs.
        """
        own, cross = _kernel_sums(features, self.reference_features, features.new_ones(len(features), 1), self.degree)
        return _discrepancy(own.sum(), cross.sum(), self._within, len(features))


def kernel_distance(features: torch.Tensor, reference_features: torch.Tensor) -> torch.Tensor:
    """
    [`KernelDistance`] of degree 3.

    Args:
        features (`torch.Tensor` of shape `(pictures, features)`): Features of the one set.
        reference_features (`torch.Tensor` of shape `(other pictures, features)`): Features of the other.

    Raises:
        ValueError: If there are fewer than two pictures in a set, or the number of features differs.
    """
    return KernelDistance(reference_features)(features)


def kernel_estimate(features: torch.Tensor, reference_features: torch.Tensor) -> Estimate:
    """
    [`kernel_distance`] with its uncertainty.

    Raises:
        ValueError: If there are fewer than 100 pictures.
    """
    groups = _groups(features)
    own, cross = _kernel_sums(features, reference_features, groups, degree=3)
    others = _mean_within(reference_features, degree=3)
    value = _discrepancy(own.sum(), cross.sum(), others, len(features))
    left_own = own.sum() - own.sum(dim=0) - own.sum(dim=1) + own.diagonal()
    replicates = _discrepancy(left_own, cross.sum() - cross, others, len(features) - groups.sum(dim=0))
    return Estimate(value.item(), replicates.cpu().numpy())


class QualityDistance:
    """
    Fréchet and kernel distance of generated to real pictures, on the features that a network has of them.

    Args:
        feature_extractor (`Callable[[torch.Tensor], torch.Tensor]`):
            Pictures in [−1, 1], of shape `(pictures, channels, height, width)` → features, `(pictures, features)`.
        reference ([`ReferenceFeatures`]): Features of the real pictures, on the device of the network.
    """

    def __init__(self, feature_extractor: Callable[[torch.Tensor], torch.Tensor], reference: ReferenceFeatures):
        self.feature_extractor, self.reference = feature_extractor, reference

    @classmethod
    def from_pretrained(
        cls, folder: str | Path = PACKAGED_CLASSIFIER, device: str | torch.device = "cpu"
    ) -> "QualityDistance":
        """What `training/train_classifier.py` has written; the packaged CIFAR-10 classifier at 16x16 by default."""
        classifier = ImageClassifier.from_pretrained(folder).to(device).eval().requires_grad_(False)
        reference = ReferenceFeatures(*(tensor.to(device) for tensor in ReferenceFeatures.from_pretrained(folder)))
        return cls(classifier.features, reference)

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
        """
        Features of pictures, computed in batches where the reference is.

        Args:
            images (`torch.Tensor` of shape `(pictures, channels, height, width)`): In [−1, 1]; overshoots are clipped.
            batch_size (`int`, defaults to 500): Pictures at a time.
        """
        batches = images.clamp(-1, 1).split(batch_size)
        return torch.cat([self.feature_extractor(batch.to(self.reference.mean.device)) for batch in batches])

    def estimate(self, features: torch.Tensor) -> dict[str, Estimate]:
        """`"frechet_distance"` and `"kernel_distance"` of the pictures that have these features."""
        mean, covariance, reference_features = self.reference
        return {
            "frechet_distance": frechet_estimate(features, mean, covariance),
            "kernel_distance": kernel_estimate(features, reference_features),
        }

    def __call__(self, images: torch.Tensor, batch_size: int = 500) -> dict[str, Estimate]:
        """`"frechet_distance"` and `"kernel_distance"` of pictures, as in [`~QualityDistance.features`]."""
        return self.estimate(self.features(images, batch_size))


def _groups(features: torch.Tensor) -> torch.Tensor:
    """Membership of each picture in one of 50 groups of neighbours, of shape `(pictures, 50)`."""
    if len(features) < 2 * JACKKNIFE_GROUPS:
        raise ValueError(f"`features` must be of at least {2 * JACKKNIFE_GROUPS} pictures, got {len(features)}.")
    places = torch.arange(len(features), device=features.device)
    return torch.nn.functional.one_hot(places * JACKKNIFE_GROUPS // len(features)).double()


def _kernel_sums(
    features: torch.Tensor, reference: torch.Tensor, groups: torch.Tensor, degree: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ k between groups without a picture's own, and Σ of each group's mean k to the reference."""
    _check_features(features, reference.shape[1])
    features, reference, groups = features.double(), reference.double(), groups.double()
    weights = reference.new_full((len(reference), 1), 1 / len(reference))
    own_pictures = torch.diag(groups.T @ _self_kernel(features, degree))
    own = groups.T @ _kernel_product(features, features, groups, degree) - own_pictures
    return own, (groups.T @ _kernel_product(features, reference, weights, degree))[:, 0]


def _mean_within(reference: torch.Tensor, degree: int) -> torch.Tensor:
    """Mean k between two different pictures of the reference."""
    _check_features(reference, reference.shape[1])
    reference, m = reference.double(), len(reference)
    every = _kernel_product(reference, reference, reference.new_ones(m, 1), degree).sum()
    return (every - _self_kernel(reference, degree).sum()) / (m * (m - 1))


def _discrepancy(own: torch.Tensor, cross: torch.Tensor, others: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    return own / (n * (n - 1)) + others - 2 * cross / n


def _kernel_product(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, degree: int) -> torch.Tensor:
    """Σ_j k(x_i, y_j) w_j, some rows at a time."""
    return torch.cat([(rows @ y.T / y.shape[1] + 1) ** degree @ weights for rows in x.split(1000)])


def _self_kernel(x: torch.Tensor, degree: int) -> torch.Tensor:
    """k(x_i, x_i)"""
    return (x.square().mean(dim=1) + 1) ** degree


def _check_features(features: torch.Tensor, dimension: int):
    if features.ndim != 2 or len(features) < 2 or features.shape[1] != dimension:
        raise ValueError(
            f"Features must have shape (pictures, {dimension}), at least two pictures, got {tuple(features.shape)}."
        )
