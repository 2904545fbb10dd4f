"""The variance-preserving diffusion x_t = α_t x_0 + σ_t z, α² + σ² = 1, as smooth functions of a real timestep.

Discrete noise schedules follow diffusers' definitions (Ho et al., 2020; Nichol & Dhariwal, 2021); the continuous
one is the linear-β SDE of Song et al. (2021), Appendix C.
"""

import math

import numpy as np
import torch

from .linear_diffusion import LinearDiffusion
from .splines import InterpolatingSpline, MonotoneCubic, PiecewisePolynomial

# diffusers keeps the last α of a zero-terminal-SNR schedule at this value, so that λ stays finite.
ZERO_SNR_ALPHA = 2.0**-12

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class VariancePreserving(LinearDiffusion):
    """
    A variance-preserving linear diffusion.

    All functions are vectorised, take and return float64, and are parametrised by the **timestep** t that the network
    is given. A discrete schedule lives on the integers 0 … N−1 and is extended to the reals in between; t = −1 is
    clean data (ᾱ = 1). With `continuous=True`, t = (N − 1)·τ with τ in [10⁻³, 1] the time of the SDE.

    Notation: ᾱ = α², γ = σ/α, λ = log(α/σ) = −log γ.

    Args:
        alphas (`np.ndarray` of shape `(N,)`, *optional*):
            α at the integer timesteps, strictly decreasing inside (0, 1). Leave out for the analytic process.
        beta_min, beta_max (`float`):
            β(τ) = beta_min + (beta_max − beta_min)·τ of the analytic process. Not used when `alphas` is given.
        num_train_timesteps (`int`):
            N of the analytic process; its network time is (N − 1)·τ.

    Raises:
        ValueError: If `alphas` is not strictly decreasing inside (0, 1).
    """

    #: what `from_config` reads
    CONFIG_KEYS = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "snr_shift_scale",
        "continuous",
    )
    #: smallest time of the analytic process, as in Song et al. (2021) and GENIE
    CONTINUOUS_TIME_MIN = 1e-3

    def __init__(
        self,
        alphas: np.ndarray | None = None,
        *,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        num_train_timesteps: int = 1000,
    ):
        self.is_discrete = alphas is not None
        #: the timestep of clean data
        self.timestep_data = -1.0 if self.is_discrete else 0.0
        if alphas is None:
            self.num_train_timesteps = num_train_timesteps
            self._beta_min, self._beta_max = beta_min, beta_max
            self._time_scale = float(num_train_timesteps - 1)
            self.timestep_max = self._time_scale
            self.timestep_min = self.CONTINUOUS_TIME_MIN * self._time_scale
            return
        alphas = np.asarray(alphas, dtype=np.float64)
        if alphas.ndim != 1 or not (np.all(np.diff(alphas) < 0) and 0 < alphas[-1] and alphas[0] < 1):
            raise ValueError("`alphas` must be a strictly decreasing sequence inside (0, 1).")
        self.num_train_timesteps = len(alphas)
        self.timestep_min, self.timestep_max = 0.0, float(len(alphas) - 1)
        # α itself is interpolated: unlike log ᾱ or λ it is smooth at both ends of every schedule, where ᾱ reaches 1
        # (one knot before the data) and where it reaches 0 (squared-cosine, zero terminal SNR).
        knots, values = np.arange(-1.0, len(alphas)), np.concatenate([[1.0], alphas])
        spline = InterpolatingSpline(knots, values)
        # A spline decreases where its weights do; a schedule with jumps is monotone before it is smooth.
        decreases = bool(np.all(np.diff(spline.weights) < 0))
        self._alpha: PiecewisePolynomial = spline if decreases else MonotoneCubic(knots, values)

    @classmethod
    def from_betas(
        cls, betas: np.ndarray, rescale_zero_terminal_snr: bool = False, snr_shift_scale: float = 1.0
    ) -> "VariancePreserving":
        """
        The process of a sequence of DDPM variances, ᾱ_t = Π_{s ≤ t} (1 − β_s).

        Args:
            betas (`np.ndarray` of shape `(N,)`): Variances, each inside (0, 1).
            rescale_zero_terminal_snr (`bool`):
                Shift and scale √ᾱ so that the last one is 0 and the first is kept (Lin et al., 2023, Algorithm 1).
                The last α is then set to 2⁻¹² as in diffusers, or to a quarter of the one before where that is
                smaller, which keeps the schedule strictly decreasing.
            snr_shift_scale (`float`):
                By which all signal-to-noise ratios ᾱ/(1 − ᾱ) are divided before that, as in CogVideoX.
        """
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not np.all((betas > 0) & (betas < 1)):
            raise ValueError("`betas` must be a sequence of at least two numbers inside (0, 1).")
        if not snr_shift_scale > 0:
            raise ValueError(f"`snr_shift_scale` must be positive, got {snr_shift_scale}.")
        alphas_cumprod = np.cumprod(1.0 - betas)
        alphas = np.sqrt(alphas_cumprod / (snr_shift_scale + (1.0 - snr_shift_scale) * alphas_cumprod))
        if rescale_zero_terminal_snr:
            alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
            alphas[-1] = min(ZERO_SNR_ALPHA, alphas[-2] / 4)
        return cls(alphas)

    @classmethod
    def from_config(cls, config) -> "VariancePreserving":
        """
        The process that a diffusers scheduler configuration describes.

        Args:
            config (mapping):
                Reads `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (`"linear"`,
                `"scaled_linear"`, `"squaredcos_cap_v2"`, `"sigmoid"`), `trained_betas`, `rescale_betas_zero_snr`,
                `snr_shift_scale` and `continuous`; missing keys have diffusers' defaults. With `continuous=True` the
                analytic process has β(τ) = N·(beta_start + (beta_end − beta_start)·τ).
        """
        num_train_timesteps = config.get("num_train_timesteps", 1000)
        beta_start, beta_end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        beta_schedule = config.get("beta_schedule", "linear")
        trained_betas = config.get("trained_betas")
        zero_snr, snr_shift_scale = config.get("rescale_betas_zero_snr", False), config.get("snr_shift_scale", 1.0)
        if config.get("continuous", False):
            if trained_betas is not None or beta_schedule != "linear" or zero_snr or snr_shift_scale != 1:
                raise ValueError(
                    "`continuous=True` is the analytic process with linear β: it needs `beta_schedule='linear'`, no "
                    "`trained_betas`, no `rescale_betas_zero_snr` and `snr_shift_scale=1`, got "
                    f"`beta_schedule={beta_schedule!r}`, `snr_shift_scale={snr_shift_scale}`."
                )
            return cls(
                beta_min=num_train_timesteps * beta_start,
                beta_max=num_train_timesteps * beta_end,
                num_train_timesteps=num_train_timesteps,
            )
        if trained_betas is not None:
            betas = np.asarray(trained_betas, dtype=np.float64)
            if len(betas) != num_train_timesteps:
                raise ValueError(
                    f"`trained_betas` must hold as many values as `num_train_timesteps`, {num_train_timesteps}, got "
                    f"{len(betas)}."
                )
        else:
            betas = named_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        return cls.from_betas(betas, zero_snr, snr_shift_scale)

    def alpha(self, timesteps) -> np.ndarray:
        """α_t, for real `timesteps` (−1 to `timestep_max` for a discrete schedule)."""
        timesteps = np.asarray(timesteps, dtype=np.float64)
        if self.is_discrete:
            return self._alpha(timesteps)
        return np.exp(-0.5 * self._integral_beta(timesteps / self._time_scale))

    def sigma(self, timesteps) -> np.ndarray:
        """σ_t = √(1 − α_t²), without cancellation near the data."""
        if self.is_discrete:
            alpha = self.alpha(timesteps)
            return np.sqrt((1.0 - alpha) * (1.0 + alpha))
        return np.sqrt(-np.expm1(-self._integral_beta(np.asarray(timesteps, dtype=np.float64) / self._time_scale)))

    def alpha_at(self, gammas) -> np.ndarray:
        """α where σ/α = γ."""
        return 1.0 / np.sqrt(1.0 + np.asarray(gammas, dtype=np.float64) ** 2)

    def gamma(self, timesteps) -> np.ndarray:
        """γ_t = σ_t/α_t, the noise level that diffusers calls `sigma` in its Karras-type schedulers."""
        return self.sigma(timesteps) / self.alpha(timesteps)

    def log_snr(self, timesteps) -> np.ndarray:
        """λ_t = log(α_t/σ_t), half the log signal-to-noise ratio."""
        return np.log(self.alpha(timesteps) / self.sigma(timesteps))

    def beta(self, timesteps, derivative: int = 0) -> np.ndarray:
        """
        β_t = −d log ᾱ/dt, per unit of timestep, or its first or second derivative in t.

        Args:
            timesteps: Real timesteps.
            derivative (`int`, defaults to 0):
                0, 1 or 2. Where a schedule with jumps has two values, it is the one on the side of the data.
        """
        timesteps = np.asarray(timesteps, dtype=np.float64)
        if self.is_discrete:
            timesteps = np.nextafter(timesteps, -np.inf)
            # β = −2 r₁ with r_k = α⁽ᵏ⁾/α, whose derivative is r_{k+1} − r₁ r_k.
            r = [self._alpha(timesteps, nu=k) / self._alpha(timesteps) for k in range(derivative + 2)]
            if derivative == 0:
                return -2.0 * r[1]
            return -2.0 * (r[2] - r[1] ** 2 if derivative == 1 else r[3] - 3.0 * r[1] * r[2] + 2.0 * r[1] ** 3)
        time, slope = timesteps / self._time_scale, self._beta_max - self._beta_min
        values = (self._beta_min + slope * time, np.full_like(time, slope), np.zeros_like(time))
        return values[derivative] / self._time_scale ** (derivative + 1)

    def drift(self, timesteps) -> np.ndarray:
        return -0.5 * self.diffusion(timesteps)

    def diffusion(self, timesteps) -> np.ndarray:
        return self.beta(timesteps)[..., None, None]

    def mean(self, timesteps) -> np.ndarray:
        return self.alpha(timesteps)[..., None, None]

    def covariance(self, timesteps) -> np.ndarray:
        return self.root(timesteps) ** 2

    def root(self, timesteps) -> np.ndarray:
        return self.sigma(timesteps)[..., None, None]

    def log_snr_derivative(self, timesteps) -> np.ndarray:
        """dλ/dt = −β/(2σ²), per unit of timestep."""
        return -self.beta(timesteps) / (2.0 * self.sigma(timesteps) ** 2)

    def timestep(self, log_snr) -> np.ndarray:
        """
        The inverse t(λ) of `log_snr`.

        Raises:
            ValueError: If a λ lies outside the range that the process reaches.
        """
        log_snr = np.asarray(log_snr, dtype=np.float64)
        lower = np.log(self.alpha(self.timestep_max) / self.sigma(self.timestep_max))
        if np.any(log_snr < lower - 1e-9):
            raise ValueError(
                f"`log_snr` must be at least {lower:.6g} (the noisiest timestep), got {log_snr.min():.6g}."
            )
        if not self.is_discrete:
            # ∫β = log(1 + e^{2λ}) − 2λ is a quadratic in τ.
            integral = np.logaddexp(0.0, -2.0 * log_snr)
            slope = self._beta_max - self._beta_min
            time = 2.0 * integral / (self._beta_min + np.sqrt(self._beta_min**2 + 2.0 * slope * integral))
            return time * self._time_scale
        # Bisection: t(λ) has an infinite slope at the data, where Newton's method overshoots.
        low, high = np.full(log_snr.shape, -1.0), np.full(log_snr.shape, self.timestep_max)
        alpha = 1.0 / np.sqrt(1.0 + np.exp(-2.0 * log_snr))
        for _ in range(64):
            middle = 0.5 * (low + high)
            too_clean = self._alpha(middle) > alpha
            low, high = np.where(too_clean, middle, low), np.where(too_clean, high, middle)
        return 0.5 * (low + high)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Draw from the marginal: x_t = α_t x_0 + σ_t z.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): Clean data x_0.
            noise (`torch.Tensor` of the same shape): Standard normal noise z.
            timesteps (`torch.Tensor` of shape `(batch,)`): Timesteps, integer or real.
        """
        alpha, sigma = self.coefficients(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def coefficients(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α_t and σ_t as tensors of shape `(batch, 1, ...)` with dtype and device of `like`."""
        on_host = timesteps.detach().cpu().double().numpy()
        smallest, largest = (-1.0 if self.is_discrete else 0.0), self.timestep_max * (1 + 1e-6)
        if on_host.size and not (smallest <= on_host.min() and on_host.max() <= largest):
            raise ValueError(
                f"`timesteps` must lie between {self.timestep_min:g} and {self.timestep_max:g}, got "
                f"{on_host.min():g} to {on_host.max():g}."
            )
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (
            torch.as_tensor(values(on_host), dtype=like.dtype, device=like.device).reshape(shape)
            for values in (self.alpha, self.sigma)
        )
        return alpha, sigma

    def _integral_beta(self, time: np.ndarray) -> np.ndarray:
        return self._beta_min * time + 0.5 * (self._beta_max - self._beta_min) * time**2


def named_betas(
    beta_schedule: str, num_train_timesteps: int, beta_start: float = 0.0001, beta_end: float = 0.02
) -> np.ndarray:
    """The variances β_t of diffusers' schedules in float64, shape `(num_train_timesteps,)`.

    Raises:
        ValueError: For a schedule other than `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` and `"sigmoid"`.
    """
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps)
    if beta_schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        edges = np.arange(num_train_timesteps + 1) / num_train_timesteps
        alphas_cumprod = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    if beta_schedule == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
    raise ValueError(f"`beta_schedule` must be one of {', '.join(BETA_SCHEDULES)}, got {beta_schedule!r}.")
