"""The straight path of flow-matching models (Lipman et al., 2023, https://huggingface.co/papers/2210.02747).

The shift of timesteps is that of Esser et al. (2024, https://huggingface.co/papers/2403.03206).
"""

import numpy as np

from .linear_diffusion import LinearDiffusion

# α of the noisiest timestep, which is pure noise: as for zero terminal SNR, λ stays finite. σ is one less that much
# there, since α + σ = 1 is what turns velocities into predictions.
NOISIEST_ALPHA = 2.0**-12


class RectifiedFlow(LinearDiffusion):
    """
    x_t = (1 − σ_t) x_0 + σ_t z with σ_t = t/N, on which models predict the velocity v = z − x_0.

    It is a linear diffusion like any other, x_t = α_t x_0 + σ_t z with α = 1 − σ, so the solvers of dx̄/dγ = ε in
    x̄ = x/α and γ = σ/α hold as they are. The last timestep N is pure noise; α is 2⁻¹² there, and σ
    is 1 − 2⁻¹².

    Args:
        num_train_timesteps (`int`, defaults to 1000): N. The network is called with real timesteps t between 1 and N.
    """

    def __init__(self, num_train_timesteps: int = 1000):
        super().__init__(num_train_timesteps)
        self._time_scale = float(num_train_timesteps)
        self.timestep_min, self.timestep_max = 1.0, self._time_scale

    def alpha(self, timesteps) -> np.ndarray:
        """α_t = 1 − σ_t."""
        return 1.0 - self.sigma(timesteps)

    def sigma(self, timesteps) -> np.ndarray:
        """σ_t = t/N."""
        return np.minimum(self._share(timesteps), 1.0 - NOISIEST_ALPHA)

    def _share(self, timesteps) -> np.ndarray:
        return np.asarray(timesteps, dtype=np.float64) / self._time_scale

    def log_snr_derivative(self, timesteps) -> np.ndarray:
        """dλ/dt = −1/(N σ α), per unit of timestep."""
        return -1.0 / (self._time_scale * self.sigma(timesteps) * self.alpha(timesteps))

    def timestep(self, log_snr) -> np.ndarray:
        """The inverse t(λ) = N/(1 + e^λ) of `log_snr`."""
        return self._time_scale / (1.0 + np.exp(np.asarray(log_snr, dtype=np.float64)))

    def noise_level(self, timesteps) -> np.ndarray:
        """σ_t, in which diffusers' own flow-matching schedulers space their grids."""
        return self._share(timesteps)

    def at_noise_level(self, noise_level) -> np.ndarray:
        return np.asarray(noise_level, dtype=np.float64) * self._time_scale

    def alpha_at(self, gammas) -> np.ndarray:
        """α where σ/α = γ."""
        return 1.0 / (1.0 + np.asarray(gammas, dtype=np.float64))

    def shifted(self, timesteps, shift: float) -> np.ndarray:
        """Timesteps moved towards noise: σ → s σ/(1 + (s − 1) σ), that is λ → λ − log s (Esser et al., Eq. 23)."""
        sigma = self._share(timesteps)
        return self._time_scale * shift * sigma / (1.0 + (shift - 1.0) * sigma)

    def inside(self, timesteps) -> np.ndarray:
        return np.minimum(np.asarray(timesteps, dtype=np.float64), self._time_scale * (1.0 - NOISIEST_ALPHA))

    def beta(self, timesteps, derivative: int = 0) -> np.ndarray:
        """
        β_t = −d log ᾱ/dt, or its first or second derivative in t, of the variance-preserving path x/√(α² + σ²).

        Args:
            timesteps: Real timesteps.
            derivative (`int`, defaults to 0): 0, 1 or 2.
        """
        # log ᾱ = 2 log(1 − σ) − log n with n = (1 − σ)² + σ²
        sigma = self.sigma(timesteps)
        alpha, n, n_dot = 1.0 - sigma, (1.0 - sigma) ** 2 + sigma**2, 4.0 * sigma - 2.0
        curvature = 4.0 * n - n_dot**2
        values = (
            2.0 / alpha + n_dot / n,
            2.0 / alpha**2 + curvature / n**2,
            4.0 / alpha**3 - 4.0 * n_dot / n**2 - 2.0 * n_dot * curvature / n**3,
        )
        return values[derivative] / self._time_scale ** (derivative + 1)

    def drift(self, timesteps) -> np.ndarray:
        return -1.0 / (self._time_scale * self.mean(timesteps))

    def diffusion(self, timesteps) -> np.ndarray:
        return 2.0 * self.root(timesteps) / (self._time_scale * self.mean(timesteps))

    def mean(self, timesteps) -> np.ndarray:
        return self.alpha(timesteps)[..., None, None]

    def covariance(self, timesteps) -> np.ndarray:
        return self.root(timesteps) ** 2

    def root(self, timesteps) -> np.ndarray:
        return self.sigma(timesteps)[..., None, None]
