"""An exact denoiser for any linear diffusion: a Gaussian mixture whose score is known in closed form."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.integrate import solve_ivp

from genie_diffusers import Blurring


def transposed(matrix: np.ndarray) -> np.ndarray:
    return matrix.swapaxes(-1, -2)


class LinearMixture:
    """
    Data Σ_k p_k N(μ_k, s²): u_t is Σ_k p_k N(Ψ μ_k, s² Ψ Ψᵀ + Σ). With s = 0 and one mean it is a single data point.

    Everything happens on arrays of shape (batch, *frequencies, d, values), on which weights act by matrix product.
    """

    def __init__(self, process, means: np.ndarray, std: float = 0.4):
        self.process, self.std = process, std
        self.means = self.to_blocks(process.state(torch.from_numpy(means)).numpy())
        self.probabilities = np.arange(len(means), 0, -1) / np.arange(len(means) + 1).sum()

    def to_blocks(self, state: np.ndarray) -> np.ndarray:
        if isinstance(self.process, Blurring):
            return dctn(state, axes=(2, 3), norm="ortho").transpose(0, 2, 3, 1)[..., None, :]
        return state.reshape(len(state), self.process.weight_shape[-1], -1)

    def to_state(self, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if isinstance(self.process, Blurring):
            return idctn(blocks[..., 0, :].transpose(0, 3, 1, 2), axes=(2, 3), norm="ortho")
        return blocks.reshape(shape)

    def block_prediction(self, blocks: np.ndarray, timestep: float) -> np.ndarray:
        """ε = −Rᵀ ∇ log p_t."""
        process = self.process
        mean = process.mean(timestep)
        total = self.std**2 * mean[..., :1] @ transposed(mean[..., :1]) + process.covariance(timestep)
        offsets = blocks[:, None] - mean @ self.means
        whitened = np.linalg.inv(total) @ offsets
        logits = np.log(self.probabilities) - 0.5 * (offsets * whitened).sum(axis=tuple(range(2, offsets.ndim)))
        posterior = np.exp(logits - logits.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        mixed = (posterior.reshape(*posterior.shape, *(1,) * (offsets.ndim - 2)) * whitened).sum(axis=1)
        return transposed(process.root(timestep)) @ mixed

    def noise_prediction(self, state: torch.Tensor, timestep: float) -> torch.Tensor:
        blocks = self.block_prediction(self.to_blocks(state.numpy()), timestep)
        return torch.from_numpy(np.ascontiguousarray(self.to_state(blocks, tuple(state.shape))))

    def solve(self, state: torch.Tensor, start: float, end: float) -> torch.Tensor:
        """The probability-flow ODE du/dt = F u + ½ G Gᵀ R^{−T} ε, adaptively, in the logarithm of the time."""
        process, origin = self.process, self.process.timestep_data
        blocks = self.to_blocks(state.numpy())

        def velocity(log_time, flat):
            timestep, now = np.exp(log_time) + origin, flat.reshape(blocks.shape)
            of_prediction = 0.5 * process.diffusion(timestep) @ transposed(np.linalg.inv(process.root(timestep)))
            flow = process.drift(timestep) @ now + of_prediction @ self.block_prediction(now, timestep)
            return np.exp(log_time) * flow.ravel()

        times = np.log([start - origin, end - origin])
        solution = solve_ivp(velocity, times, blocks.ravel(), method="DOP853", rtol=1e-10, atol=1e-11)
        return torch.from_numpy(self.to_state(solution.y[:, -1].reshape(blocks.shape), tuple(state.shape)))

    def sample(self, scheduler, state: torch.Tensor, generator=None) -> torch.Tensor:
        """The loop of a pipeline, with timesteps that have not gone through float32."""
        for index, timestep in enumerate(scheduler.timesteps):
            prediction = self.noise_prediction(state, scheduler._host_timesteps[index])
            state = scheduler.step(prediction, timestep, state, generator).prev_sample
        return state


@pytest.fixture
def linear_mixture():
    return LinearMixture
