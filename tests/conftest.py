"""An exact denoiser (a Gaussian mixture in the plane) and small random UNets, for tests without checkpoints."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


class GaussianMixture:
    """
    Data Σ_k p_k N(μ_k, s²) in the plane, whose denoiser is known in closed form: x_t is Σ_k p_k N(α μ_k, α² s² + σ²).

    Everything is float64 and given (α, σ) or λ instead of a timestep, so that no rounding of times comes in.
    """

    means = torch.tensor([[1.2, 0.3], [-0.7, 1.0], [-0.4, -1.1]], dtype=torch.float64)
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std = 0.4

    def noise_prediction(self, sample: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """ε = −σ ∇ log p_t(x)."""
        variance = alpha**2 * self.std**2 + sigma**2
        offsets = sample[:, None] - alpha * self.means
        logits = self.probabilities.log() - (offsets**2).sum(-1) / (2 * variance)
        return sigma * (logits.softmax(-1)[..., None] * offsets).sum(1) / variance

    def noise_prediction_at(self, sample: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """The same, as a differentiable function of λ: α² = 1/(1 + e^{−2λ})."""
        alpha, sigma = torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
        return self.noise_prediction(sample, alpha, sigma)

    def slope(self, sample: torch.Tensor, noise_prediction: torch.Tensor, log_snr: float) -> torch.Tensor:
        """dε/dλ along dx/dλ = σ² x − σ ε, by forward-mode differentiation."""
        log_snr = torch.tensor(log_snr, dtype=torch.float64)
        sigma = torch.sigmoid(-2 * log_snr).sqrt()
        velocity = sigma**2 * sample - sigma * noise_prediction
        point, direction = (sample, log_snr), (velocity, torch.ones_like(log_snr))
        return torch.func.jvp(self.noise_prediction_at, point, direction)[1]


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    return GaussianMixture()


@pytest.fixture(scope="session")
def slope_source(mixture):
    """Builds the exact slope source of the mixture for a scheduler; it records the keyword arguments of its calls."""

    def build(scheduler):
        def source(sample, noise_prediction, timestep, **kwargs):
            source.calls.append(kwargs)
            # The scheduler's own float64 λ: a timestep that went through float32 is not exact enough.
            log_snr = float(scheduler.lambdas[scheduler.step_index])
            return mixture.slope(sample, noise_prediction, log_snr)

        source.calls = []
        return source

    return build


@pytest.fixture(scope="session")
def run(mixture):
    """Samples with the exact denoiser in the scheduler's `prediction_type`, the way a pipeline does."""

    def run(scheduler, sample: torch.Tensor) -> torch.Tensor:
        for index, timestep in enumerate(scheduler.timesteps):
            gamma = float(scheduler.sigmas[index])
            alpha = 1 / math.sqrt(1 + gamma**2)
            sigma = gamma * alpha
            noise = mixture.noise_prediction(sample, alpha, sigma)
            data = (sample - sigma * noise) / alpha
            model_output = {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}
            sample = scheduler.step(model_output[scheduler.config.prediction_type], timestep, sample).prev_sample
        return sample

    return run


@pytest.fixture(scope="session")
def noise():
    """Standard normal noise in float64 from a seed."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture
def unet():
    """Builds a class-conditional `UNet2DModel` with attention and random weights, in float64 and eval mode."""

    def build(seed: int = 0, **config) -> UNet2DModel:
        defaults = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "num_class_embeds": 4,
        }
        return _random_model(UNet2DModel, {**defaults, **config}, seed)

    return build


@pytest.fixture
def text_unet():
    """Builds a `UNet2DConditionModel` with cross-attention and random weights, in float64 and eval mode."""

    def build(seed: int = 0, **config) -> UNet2DConditionModel:
        defaults = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        }
        return _random_model(UNet2DConditionModel, {**defaults, **config}, seed)

    return build


def _random_model(cls, config: dict, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**config).double().eval()
