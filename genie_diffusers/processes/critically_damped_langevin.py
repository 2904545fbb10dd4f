"""Critically-damped Langevin diffusion of pictures and velocities (Dockhorn, Vahdat & Kreis, 2022,
https://huggingface.co/papers/2112.07068), in closed form."""

import numpy as np
from numpy.polynomial import Chebyshev
from scipy.special import gammainc

from .linear_diffusion import LinearDiffusion


class CriticallyDampedLangevin(LinearDiffusion):
    """
    Pictures x coupled to velocities v, channels stacked `[x, v]`; noise enters through the velocities only.

    With mass M = Γ²/4 (critical damping), in the time τ of the SDE,

        dx = β M⁻¹ v dτ
        dv = −β x dτ − Γ β M⁻¹ v dτ + √(2 Γ β) dw

    whose stationary law is x ~ N(0, 1), v ~ N(0, M). Data start with velocities v ~ N(0, γ M), which are integrated
    out: Σ_0 = diag(10⁻⁶, γ M + 10⁻⁶), as in the paper. Models are called with t = (N − 1)·τ, τ in [10⁻³, 1].

    Args:
        num_train_timesteps (`int`, defaults to 1000): N.
        langevin_beta (`float`, defaults to 4.0): β, positive.
        friction (`float`, defaults to 1.0): Γ, positive.
        initial_velocity_variance (`float`, defaults to 0.04): γ, positive.

    Raises:
        ValueError: If one of the last three is not positive.
    """

    CONFIG_KEYS = ("num_train_timesteps", "langevin_beta", "friction", "initial_velocity_variance")
    weight_shape = (2, 2)
    #: the variance 10⁻⁶ that keeps Σ_0 invertible
    STABILITY = 1e-6

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        *,
        langevin_beta: float = 4.0,
        friction: float = 1.0,
        initial_velocity_variance: float = 0.04,
    ):
        super().__init__(num_train_timesteps)
        for name, value in (
            ("langevin_beta", langevin_beta),
            ("friction", friction),
            ("initial_velocity_variance", initial_velocity_variance),
        ):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        #: β per unit of timestep, Γ, and the mass M
        self._beta, self._friction, self.mass = langevin_beta / self._time_scale, friction, friction**2 / 4
        self._stationary = np.diag([1.0, self.mass])
        velocity_variance = initial_velocity_variance * self.mass + self.STABILITY
        self.initial_covariance = np.diag([self.STABILITY, velocity_variance])
        #: the timestep until which the positions are noised by `STABILITY` more than by the velocities
        self._width = np.sqrt(self.STABILITY / velocity_variance) * self.mass / self._beta

        def angle_derivative(log_time):
            timesteps = self._width * np.expm1(log_time)
            covariance = self.covariance(timesteps)
            ratio = np.sqrt(np.linalg.det(covariance)) / covariance[..., 0, 0]
            return -self._beta / self.mass * ratio * (timesteps + self._width)

        # The angle turns fastest within `_width` of the data: a series in log(1 + t/width) resolves all of it.
        domain = [0.0, np.log1p(self.timestep_max / self._width)]
        self._angle = Chebyshev.interpolate(angle_derivative, 256, domain).integ(lbnd=0.0).trim(1e-16)

    def drift(self, timesteps) -> np.ndarray:
        matrix = self._beta * np.array([[0.0, 1 / self.mass], [-1.0, -self._friction / self.mass]])
        return np.broadcast_to(matrix, (*np.shape(timesteps), 2, 2))

    def diffusion(self, timesteps) -> np.ndarray:
        return np.broadcast_to(np.diag([0.0, 2 * self._friction * self._beta]), (*np.shape(timesteps), 2, 2))

    def transition(self, to, timesteps) -> np.ndarray:
        # F = β (N − (2/Γ) I) with N² = 0, the repeated eigenvalue of critical damping.
        span = np.asarray(self._beta * (np.asarray(to, dtype=np.float64) - timesteps))[..., None, None]
        nilpotent = np.array([[2 / self._friction, 1 / self.mass], [-1.0, -2 / self._friction]])
        return np.exp(-2 / self._friction * span) * (np.eye(2) + span * nilpotent)

    def mean(self, timesteps) -> np.ndarray:
        return self.transition(timesteps, 0.0)

    def covariance(self, timesteps) -> np.ndarray:
        # Σ = (Σ_∞ − Ψ Σ_∞ Ψᵀ) + Ψ Σ_0 Ψᵀ; the first term written out, which avoids its cancellation near the data.
        z = 4 * self._beta / self._friction * np.asarray(timesteps, dtype=np.float64)
        decay = np.exp(-z)
        positions = gammainc(3, z)  # 1 − e^{−z} (1 + z + z²/2)
        both = decay * self._friction * z**2 / 4
        velocities = self.mass * (-np.expm1(-z) + decay * (z - z**2 / 2))
        noise = np.stack([positions, both, both, velocities], axis=-1).reshape(*z.shape, 2, 2)
        mean = self.mean(timesteps)
        return noise + mean @ self.initial_covariance @ mean.swapaxes(-1, -2)

    def root(self, timesteps) -> np.ndarray:
        # R = L Q with L = chol Σ and a rotation Q by θ, θ̇ = −F₁₂ L₂₂/L₁₁: what Ṙ = F R + ½ G Gᵀ R^{−T} leaves of R.
        angle = self._angle(np.log1p(np.asarray(timesteps, dtype=np.float64) / self._width))
        cosine, sine = np.cos(angle), np.sin(angle)
        rotation = np.stack([cosine, -sine, sine, cosine], axis=-1).reshape(*np.shape(timesteps), 2, 2)
        return np.linalg.cholesky(self.covariance(timesteps)) @ rotation

    def preconditioning(self, timesteps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Weights (S, A, B) that make a model of pictures one of states: it sees S u and returns y with ε = A u + B y.

        Data enter R^{−1} u = R^{−1} Ψ u_0 + z along one direction e₁ alone. With the rotation E = (e₁, e₂) and
        w = Eᵀ R^{−1} u, the first component of w is a noisy picture w₁ = x_0/γ̂ + z₁ and the second one nothing but the
        noise z₂. The model therefore sees (σ̂ w₁, w₂), where σ̂ w₁ = α̂ x_0 + σ̂ z₁ is variance preserving, and returns y
        with Eᵀ ε = (y₁, w₂ + y₂): y₁ is the noise prediction of a variance-preserving model, and y₂ = 0 is exact.
        """
        inverse = np.linalg.inv(self.root(timesteps))
        direction = (inverse @ self.mean(timesteps))[..., 0]
        signal = np.linalg.norm(direction, axis=-1)  # 1/γ̂
        cosine, sine = np.moveaxis(direction, -1, 0) / signal
        frame = np.stack([cosine, -sine, sine, cosine], axis=-1).reshape(*signal.shape, 2, 2)
        aligned = frame.swapaxes(-1, -2) @ inverse
        scale = np.stack([1 / np.sqrt(1 + signal**2), np.ones_like(signal)], axis=-1)
        return scale[..., None] * aligned, frame @ np.diag([0.0, 1.0]) @ aligned, frame
