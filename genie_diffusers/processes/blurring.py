"""Blurring diffusion (Hoogeboom & Salimans, 2023, https://huggingface.co/papers/2209.05557), in closed form."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.fft import dct

from .linear_diffusion import LinearDiffusion


class Blurring(LinearDiffusion):
    """
    Pictures that are blurred by heat dissipation while they are noised.

    In the orthonormal DCT-II y of the picture every frequency f = (i, j) is a diffusion of its own,

        y_t = a_t y_0 + σ_t z,   a_t = α_t d_t,   σ_t² = 1 − α_t²
        α_τ = cos(π/2 · (τ + 0.004)/1.008)
        d_τ = (1 − d_min) exp(−λ_f ½ σ_B² sin⁴(πτ/2)) + d_min,   λ_f = π² (i²/H² + j²/W²)

    The state is the picture itself, in pixels: the transform is orthonormal, so noise and ε are white in either space,
    and only the weights act on frequencies. Models are called with t = (N − 1)·τ, τ from 10⁻⁵ to where σ/α = 80.

    Args:
        sample_size (`int` or pair of `int`): Height and width of the pictures, of any parity.
        num_train_timesteps (`int`, defaults to 1000): N.
        blur_sigma (`float`, defaults to 10.0): σ_B, the width of the blur at τ = 1 in pixels.
        blur_minimum (`float`, defaults to 0.001): d_min, what is left of every frequency, inside (0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    CONFIG_KEYS = ("sample_size", "num_train_timesteps", "blur_sigma", "blur_minimum")
    #: σ/α at the noisiest time
    GAMMA_MAX = 80.0

    def __init__(
        self,
        sample_size: int | Sequence[int],
        num_train_timesteps: int = 1000,
        *,
        blur_sigma: float = 10.0,
        blur_minimum: float = 0.001,
    ):
        time_max = 1.008 * 2 / np.pi * np.arctan(self.GAMMA_MAX) - 0.004
        super().__init__(num_train_timesteps, time_min=1e-5, time_max=time_max)
        size = tuple(sample_size) if isinstance(sample_size, Sequence) else (sample_size, sample_size)
        if len(size) != 2 or not all(isinstance(length, int) and length >= 1 for length in size):
            raise ValueError(f"`sample_size` must be a positive integer or a pair of them, got {sample_size!r}.")
        if not blur_sigma >= 0:
            raise ValueError(f"`blur_sigma` must not be negative, got {blur_sigma}.")
        if not 0 < blur_minimum <= 1:
            raise ValueError(f"`blur_minimum` must be inside (0, 1], got {blur_minimum}.")
        self.sample_size = size
        self.weight_shape = (*size, 1, 1)
        self._blur_sigma, self._blur_minimum = blur_sigma, blur_minimum
        rows, columns = (np.arange(length) / length for length in size)
        self._dissipation = np.pi**2 * (rows[:, None] ** 2 + columns**2)

    def alpha(self, timesteps) -> np.ndarray:
        return np.cos(self._phase(timesteps))

    def sigma(self, timesteps) -> np.ndarray:
        return np.sin(self._phase(timesteps))

    def drift(self, timesteps) -> np.ndarray:
        rotation, blur = self._rates(timesteps)
        return blur - self._per_frequency(rotation * np.tan(self._phase(timesteps)))

    def diffusion(self, timesteps) -> np.ndarray:
        # dσ²/dt − 2 F σ², with σ σ̇ + σ² φ̇ tan φ = φ̇ tan φ
        rotation, blur = self._rates(timesteps)
        phase = self._phase(timesteps)
        return 2 * (self._per_frequency(rotation * np.tan(phase)) - blur * self._per_frequency(np.sin(phase) ** 2))

    def mean(self, timesteps) -> np.ndarray:
        """a_t, with which a frequency of the picture enters the state."""
        fading = self._fading(np.asarray(timesteps, dtype=np.float64) / self._time_scale)
        blur = (1 - self._blur_minimum) * fading + self._blur_minimum
        return self._per_frequency(self.alpha(timesteps)) * blur[..., None, None]

    def covariance(self, timesteps) -> np.ndarray:
        return np.broadcast_to(self._per_frequency(self.sigma(timesteps) ** 2), self._shape(timesteps))

    def root(self, timesteps) -> np.ndarray:
        return np.broadcast_to(self._per_frequency(self.sigma(timesteps)), self._shape(timesteps))

    def preconditioning(self, timesteps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Weights (S, A, B) for a model that sees S y = y and returns v with ε = A y + B v.

        A step divides what the model misses of ε by a_t = α_t d_t, which is tiny near pure noise, and a thousand times
        smaller still where a frequency is blurred away. Here the model makes the v-prediction of the picture without
        blur, x_0 = α y − σ v (Salimans & Ho, 2022): the picture is never off by more than what the model misses. As
        ε = (y − a x_0)/σ, A = (1 − d)/σ + d σ and B = d α.
        """
        timesteps = np.asarray(timesteps, dtype=np.float64)
        alpha, sigma = self._per_frequency(self.alpha(timesteps)), self.root(timesteps)
        blur = self.mean(timesteps) / alpha
        return np.ones_like(blur), (1 - blur) / sigma + blur * sigma, blur * alpha

    def check_state(self, state: torch.Tensor) -> None:
        super().check_state(state)
        if tuple(state.shape[-2:]) != self.sample_size:
            raise ValueError(
                f"`sample` must have the height and width {self.sample_size} of `sample_size`, whose frequencies the "
                f"weights belong to, got {tuple(state.shape[-2:])}."
            )

    def combine(self, weights: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> torch.Tensor:
        vertical, horizontal = (dct_matrix(length, states[0].dtype, states[0].device) for length in self.sample_size)
        total = sum(
            # one weight for all channels
            weight[..., 0, 0].unsqueeze(-3) * (vertical @ state @ horizontal.mT)
            for weight, state in zip(weights, states, strict=True)
        )
        return vertical.mT @ total @ horizontal

    def _phase(self, timesteps) -> np.ndarray:
        return np.pi / 2 * (np.asarray(timesteps, dtype=np.float64) / self._time_scale + 0.004) / 1.008

    def _fading(self, time: np.ndarray) -> np.ndarray:
        dissipated = 0.5 * (self._blur_sigma * np.sin(np.pi / 2 * time) ** 2) ** 2
        return np.exp(-self._dissipation * dissipated[..., None, None])

    def _rates(self, timesteps) -> tuple[np.ndarray, np.ndarray]:
        """φ̇ of the phase φ, and ḋ/d of every frequency, per unit of timestep."""
        time = np.asarray(timesteps, dtype=np.float64) / self._time_scale
        # d/dτ ½ σ_B² sin⁴(πτ/2)
        dissipated = np.pi * self._blur_sigma**2 * np.sin(np.pi / 2 * time) ** 3 * np.cos(np.pi / 2 * time)
        fading = (1 - self._blur_minimum) * self._fading(time)
        blur = -self._dissipation * dissipated[..., None, None] * fading / (fading + self._blur_minimum)
        return np.full_like(time, np.pi / 2 / 1.008) / self._time_scale, blur[..., None, None] / self._time_scale

    def _shape(self, timesteps) -> tuple[int, ...]:
        return (*np.shape(timesteps), *self.weight_shape)

    @staticmethod
    def _per_frequency(values: np.ndarray) -> np.ndarray:
        return np.asarray(values)[..., None, None, None, None]


@lru_cache(maxsize=32)
def dct_matrix(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix of shape `(length, length)`."""
    with torch.inference_mode(False):  # it is kept
        return torch.tensor(dct(np.eye(length), norm="ortho", axis=0), dtype=dtype, device=device)
