"""Linear diffusions du = F u dt + G dw in general: what a sampler and a training script need to know of one.

The square root R of the covariance is that of gDDIM (Zhang, Tao & Chen, 2023, https://huggingface.co/papers/2206.05564).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch


class LinearDiffusion:
    """
    A linear diffusion du = F_t u dt + G_t dw from data at timestep 0 to noise, for pictures or whatever else.

    A subclass defines [`~LinearDiffusion.drift`] F and [`~LinearDiffusion.diffusion`] G Gᵀ, and `initial_covariance`;
    the rest follows by an adaptive integration, and is overridden where it has a closed form.

    All functions are vectorised, take and return float64, and are parametrised by the **timestep** t that the network
    is given. A weight (F, G Gᵀ, Ψ, Σ, R) is an array of shape `(*timesteps.shape, *weight_shape)`, whose last two axes
    are a d×d matrix. It acts on the d blocks of channels of a state, `[x, v]` for d = 2.

    Args:
        num_train_timesteps (`int`, defaults to 1000): N; t = (N − 1)·τ for a time τ in [0, 1].
        time_min, time_max (`float`): First and last τ that models are trained and sampled at.
    """

    is_discrete = False
    #: the timestep of clean data
    timestep_data = 0.0
    #: the scheduler configuration that `from_config` reads
    CONFIG_KEYS: tuple[str, ...] = ("num_train_timesteps",)
    #: shape of one weight
    weight_shape: tuple[int, ...] = (1, 1)
    #: Σ at timestep 0, of shape `weight_shape`
    initial_covariance: np.ndarray

    def __init__(self, num_train_timesteps: int = 1000, *, time_min: float = 1e-3, time_max: float = 1.0):
        self.num_train_timesteps = num_train_timesteps
        self._time_scale = float(num_train_timesteps - 1)
        self.timestep_min, self.timestep_max = time_min * self._time_scale, time_max * self._time_scale

    @classmethod
    def from_config(cls, config) -> Any:
        """The process that a scheduler configuration (mapping) describes by the keys `CONFIG_KEYS`."""
        return cls(**{key: config[key] for key in cls.CONFIG_KEYS if key in config})

    # --- the weights -----------------------------------------------------------------------------------------------

    def drift(self, timesteps) -> np.ndarray:
        """F_t, per unit of timestep."""
        raise NotImplementedError

    def diffusion(self, timesteps) -> np.ndarray:
        """G_t G_tᵀ, per unit of timestep."""
        raise NotImplementedError

    def mean(self, timesteps) -> np.ndarray:
        """Ψ(t, 0), with which the data enter the state: E[u_t | u_0] = Ψ(t, 0) u_0."""
        return self._integrated(timesteps)[0]

    def covariance(self, timesteps) -> np.ndarray:
        """Σ_t, the covariance of u_t given the data: Σ̇ = F Σ + Σ Fᵀ + G Gᵀ."""
        return self._integrated(timesteps)[1]

    def root(self, timesteps) -> np.ndarray:
        """R_t with R Rᵀ = Σ and Ṙ = F R + ½ G Gᵀ R^{−T} (gDDIM, Eq. 17)."""
        return self._integrated(timesteps)[2]

    def transition(self, to, timesteps) -> np.ndarray:
        """Ψ(s, t), which takes the mean from `timesteps` t to the times `to` s, earlier or later."""
        return self.mean(to) @ inverse(self.mean(timesteps))

    @cached_property
    def _solution(self) -> Callable:
        # here, since paths in closed form do without scipy
        import scipy.integrate as integrate

        def derivative(timestep, flat):
            mean, covariance, root = flat.reshape(3, *self.weight_shape)
            drift, diffusion = self.drift(timestep), self.diffusion(timestep)
            spread = drift @ covariance
            return np.concatenate(
                [
                    (drift @ mean).ravel(),
                    (spread + spread.swapaxes(-1, -2) + diffusion).ravel(),
                    (drift @ root + 0.5 * diffusion @ inverse(root).swapaxes(-1, -2)).ravel(),
                ]
            )

        covariance = np.broadcast_to(self.initial_covariance, self.weight_shape)
        identity = np.broadcast_to(np.eye(self.weight_shape[-1]), self.weight_shape)
        start = np.stack([identity, covariance, np.linalg.cholesky(covariance)])
        ends = (0.0, self.timestep_max)
        return integrate.solve_ivp(
            derivative, ends, start.ravel(), method="DOP853", rtol=1e-12, atol=1e-14, dense_output=True
        ).sol

    def _integrated(self, timesteps) -> np.ndarray:
        timesteps = np.asarray(timesteps, dtype=np.float64)
        values = np.moveaxis(self._solution(timesteps.ravel()), 0, -1)
        return np.moveaxis(values.reshape(*timesteps.shape, 3, *self.weight_shape), timesteps.ndim, 0)

    def inside(self, timesteps) -> np.ndarray:
        """The same `timesteps`, moved to where F and G describe the path, if it is cut short at its noisy end."""
        return np.asarray(timesteps, dtype=np.float64)

    # --- the noise level of the pictures ---------------------------------------------------------------------------

    def alpha(self, timesteps) -> np.ndarray:
        """α_t, with which a picture enters the first block of the state."""
        return self.mean(timesteps)[..., 0, 0]

    def sigma(self, timesteps) -> np.ndarray:
        """σ_t, the standard deviation of the noise on it."""
        return np.sqrt(self.covariance(timesteps)[..., 0, 0])

    def gamma(self, timesteps) -> np.ndarray:
        """γ_t = σ_t/α_t, the noise level that diffusers calls `sigma` in its Karras-type schedulers."""
        return self.sigma(timesteps) / self.alpha(timesteps)

    def log_snr(self, timesteps) -> np.ndarray:
        """λ_t = log(α_t/σ_t), half the log signal-to-noise ratio of the pictures."""
        return np.log(self.alpha(timesteps) / self.sigma(timesteps))

    def noise_level(self, timesteps) -> np.ndarray:
        """What grids in noise level are even in, by some power or distribution: γ_t, or σ_t of flow matching."""
        return self.gamma(timesteps)

    def at_noise_level(self, noise_level) -> np.ndarray:
        """The timestep of a `noise_level`."""
        return self.timestep(-np.log(noise_level))

    def timestep(self, log_snr) -> np.ndarray:
        """The inverse t(λ) of `log_snr`, between `timestep_min` and `timestep_max`, by bisection."""
        log_snr = np.asarray(log_snr, dtype=np.float64)
        low, high = np.full(log_snr.shape, self.timestep_min), np.full(log_snr.shape, self.timestep_max)
        for _ in range(64):
            middle = 0.5 * (low + high)
            too_clean = self.log_snr(middle) > log_snr
            low, high = np.where(too_clean, middle, low), np.where(too_clean, high, middle)
        return 0.5 * (low + high)

    # --- states ----------------------------------------------------------------------------------------------------

    def state(self, pictures: torch.Tensor) -> torch.Tensor:
        """The state u_0 of clean `pictures` of shape `(batch, channels, ...)`: all other blocks are zero."""
        return torch.cat([pictures, *[torch.zeros_like(pictures)] * (self.weight_shape[-1] - 1)], dim=1)

    def pictures(self, state: torch.Tensor) -> torch.Tensor:
        """The pictures in a state: its first block of channels."""
        return state[:, : state.shape[1] // self.weight_shape[-1]]

    def prior(self, noise: torch.Tensor) -> torch.Tensor:
        """The state R z at the noisiest time, for standard normal `noise` z of shape `(batch, d·channels, ...)`."""
        self.check_state(noise)
        return self.combine([torch.tensor(self.root(self.timestep_max)).to(noise)], [noise])

    def check_state(self, state: torch.Tensor) -> None:
        """
        Raises:
            ValueError: If the weights of this process cannot act on a tensor of this shape.
        """
        blocks = self.weight_shape[-1]
        if blocks > 1 and (state.ndim < 2 or state.shape[1] % blocks != 0):
            raise ValueError(
                f"`sample` must be a state of shape (batch, {blocks}·C, ...) for `{type(self).__name__}`, whose "
                f"{blocks} blocks of C channels are stacked, got {tuple(state.shape)}."
            )

    def combine(self, weights: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Σ_k W_k u_k.

        Args:
            weights (sequence of `torch.Tensor` of shape `weight_shape` or `(batch, *weight_shape)`): The W_k.
            states (sequence of `torch.Tensor` of shape `(batch, channels, ...)`): The u_k.
        """
        shape, blocks = states[0].shape, self.weight_shape[-1]
        terms = [weight @ state.reshape(shape[0], blocks, -1) for weight, state in zip(weights, states, strict=True)]
        return sum(terms[1:], start=terms[0]).reshape(shape)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Draw from the marginal: u_t = Ψ(t, 0) u_0 + R_t z.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, ...)`): Clean pictures.
            noise (`torch.Tensor` of shape `(batch, d·channels, ...)`): Standard normal noise z.
            timesteps (`torch.Tensor` of shape `(batch,)`): Timesteps.

        Raises:
            ValueError: If a timestep is not between 0 and `timestep_max`, or the shapes do not fit.
        """
        self.check_state(noise)
        state = self.state(original_samples)
        if noise.shape != state.shape:
            raise ValueError(
                f"`noise` must have the shape {tuple(state.shape)} of the states of `original_samples`, got "
                f"{tuple(noise.shape)}."
            )
        mean, root = self._at(timesteps, noise, self.mean, self.root)
        return self.combine([mean, root], [state, noise])

    def score(self, noise_prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The score ∇ log p_t = −R^{−T} ε, for timesteps of shape `(batch,)` (gDDIM, Eq. 18)."""
        (root,) = self._at(timesteps, noise_prediction, self.root)
        return self.combine([-torch.linalg.inv(root).mT], [noise_prediction])

    def noise_prediction(self, score: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """ε = −Rᵀ ∇ log p_t, the inverse of `score`."""
        (root,) = self._at(timesteps, score, self.root)
        return self.combine([-root.mT], [score])

    def _at(self, timesteps: torch.Tensor, like: torch.Tensor, *functions: Callable) -> list[torch.Tensor]:
        """Weights of shape `(batch, *weight_shape)` with dtype and device of `like`."""
        on_host = timesteps.detach().cpu().double().numpy()
        if on_host.size and not (0.0 <= on_host.min() and on_host.max() <= self.timestep_max * (1 + 1e-6)):
            raise ValueError(
                f"`timesteps` must lie between 0 and {self.timestep_max:g}, got "
                f"{on_host.min():g} to {on_host.max():g}."
            )
        return [torch.tensor(values(on_host), dtype=like.dtype, device=like.device) for values in functions]


def inverse(weights: np.ndarray) -> np.ndarray:
    """The inverse of matrices in the last two axes; that of many 1×1 ones without calling LAPACK for each."""
    return 1 / weights if weights.shape[-1] == 1 else np.linalg.inv(weights)
