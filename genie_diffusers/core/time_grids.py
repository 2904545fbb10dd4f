"""Where a sampler calls the model: grids of timesteps between the noisiest and the cleanest one."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..processes import LinearDiffusion

#: diffusers' own spacings of integer timesteps (Lin et al., 2023, Table 2)
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
#: diffusers' own grids in noise level
SIGMA_GRIDS = ("karras", "exponential", "beta")
#: grids that reach both ends of the process
NOISE_LEVEL_GRIDS = ("uniform_lambda", "power_lambda", *SIGMA_GRIDS)
TIME_GRIDS = ("linear", "quadratic", *NOISE_LEVEL_GRIDS)


def time_grid(process: LinearDiffusion, name: str, num_points: int, last: float | None = None) -> np.ndarray:
    """
    `num_points` real timesteps, decreasing from `process.timestep_max` to `last`.

    Args:
        process ([`LinearDiffusion`]): The diffusion.
        name (`str`): What is spaced evenly; the noise level s is γ = σ/α, and σ on the path of flow matching:
            - `"linear"`: t (GENIE, linear striding);
            - `"quadratic"`: √t (GENIE, quadratic striding);
            - `"uniform_lambda"`: λ = log(α/σ) (Lu et al., 2022);
            - `"power_lambda"`: (λ − λ_T)^{2/3}, short steps near the noise, where multistep solvers know little yet;
            - `"karras"`: s^{1/7} (Karras et al., 2022, Eq. 5);
            - `"exponential"`: log s, the same as `"uniform_lambda"` where s is γ;
            - `"beta"`: s at the quantiles of Beta(0.6, 0.6) between its ends (Lee et al., 2024).
        num_points (`int`): At least 1; a single point is the noisiest one.
        last (`float`, *optional*): The last timestep. Default: `process.timestep_min`.

    Raises:
        ValueError: For an unknown name.
    """
    ramp = np.linspace(0.0, 1.0, num_points)
    first, last = process.timestep_max, process.timestep_min if last is None else last
    most, least = process.noise_level(first), process.noise_level(last)
    if name == "linear":
        timesteps = first + ramp * (last - first)
    elif name == "quadratic":
        timesteps = (np.sqrt(first) + ramp * (np.sqrt(last) - np.sqrt(first))) ** 2
    elif name in ("uniform_lambda", "power_lambda"):
        ramp = ramp**1.5 if name == "power_lambda" else ramp
        lambda_first, lambda_last = process.log_snr(first), process.log_snr(last)
        timesteps = process.timestep(lambda_first + ramp * (lambda_last - lambda_first))
    elif name == "karras":
        rho = 7.0
        root_most, root_least = most ** (1 / rho), least ** (1 / rho)
        timesteps = process.at_noise_level((root_most + ramp * (root_least - root_most)) ** rho)
    elif name == "exponential":
        timesteps = process.at_noise_level(np.exp(np.log(most) + ramp * (np.log(least) - np.log(most))))
    elif name == "beta":
        timesteps = process.at_noise_level(least + beta_quantiles(1.0 - ramp, 0.6) * (most - least))
    else:
        raise ValueError(f"`time_grid` must be one of {', '.join(TIME_GRIDS + TIMESTEP_SPACINGS)}, got {name!r}.")
    # The ends are known exactly; powers and inversions are only accurate to rounding.
    timesteps[0], timesteps[num_points - 1 :] = first, last if num_points > 1 else first
    return timesteps


def beta_quantiles(shares: np.ndarray, shape: float) -> np.ndarray:
    """Where the distribution function of Beta(`shape`, `shape`) has the values `shares`, by bisection."""
    # the series of the incomplete beta function, which halves its terms at ½; the other half follows by symmetry
    orders = np.arange(1, 60)
    series = np.concatenate([[1.0], np.cumprod((orders - shape) / orders)]) / (shape + np.arange(60))
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    smaller = np.minimum(shares, 1.0 - shares)
    low, high = np.zeros(len(shares)), np.full(len(shares), 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle**shape * (middle[:, None] ** np.arange(60) @ series) / total < smaller
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares < 0.5, low, 1.0 - low)


def spaced_timesteps(process: LinearDiffusion, spacing: str, num_points: int, steps_offset: int = 0) -> np.ndarray:
    """
    `num_points` decreasing timesteps in one of diffusers' spacings, as its multistep solvers define them.

    Args:
        process ([`LinearDiffusion`]): The diffusion.
        spacing (`str`): `"linspace"`, `"leading"` or `"trailing"`.
        num_points (`int`): At least 1.
        steps_offset (`int`): Added to `"leading"` timesteps.

    Raises:
        ValueError: For an unknown spacing, or `"leading"` on a process without integer timesteps.
    """
    count = process.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(process.timestep_min, process.timestep_max, num_points + 1)[:0:-1]
    if spacing == "trailing":
        ends = count - np.arange(num_points) * (count / num_points)
        return np.round(ends) - 1 if process.is_discrete else ends / count * process.timestep_max
    if spacing == "leading":
        if not process.is_discrete:
            raise ValueError("`timestep_spacing='leading'` counts integer timesteps, which `continuous=True` has not.")
        stride = max(1, count // (num_points + 1))
        return np.arange(num_points, 0, -1) * stride + steps_offset
    raise ValueError(f"`timestep_spacing` must be one of {', '.join(TIMESTEP_SPACINGS)}, got {spacing!r}.")


def distinct_integers(timesteps: np.ndarray, largest: int) -> np.ndarray:
    """Round to integers inside [0, largest] that strictly decrease, moving as few as possible."""
    rounded = np.clip(np.round(timesteps), 0, largest).astype(np.int64)
    ramp = np.arange(len(rounded))
    # strictly decreasing ⇔ t_i + i is non-increasing; the first pass moves up what collides, the second moves down
    # what the first pushed past the largest.
    rounded = np.maximum.accumulate((rounded + ramp)[::-1])[::-1] - ramp
    return np.minimum(rounded, largest - ramp)


def custom_timesteps(process, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> np.ndarray:
    """
    The timesteps of a run that somebody has chosen, checked.

    Args:
        process ([`LinearDiffusion`]): The path.
        timesteps (`Sequence[float]`, *optional*): Strictly decreasing timesteps.
        sigmas (`Sequence[float]`, *optional*):
            Instead, strictly decreasing noise levels γ = σ/α; each is moved to the nearest timestep.

    Raises:
        ValueError: If they do not decrease, are no numbers, or lie outside of the path.
    """
    name = "timesteps" if timesteps is not None else "sigmas"
    given = timesteps if timesteps is not None else sigmas
    points = np.asarray(given.cpu() if torch.is_tensor(given) else given, dtype=np.float64)
    if points.ndim != 1 or len(points) == 0 or not np.all(np.isfinite(points)):
        raise ValueError(f"`{name}` must be a sequence of at least one finite number, got {given}.")
    if timesteps is None:
        largest = process.gamma(process.timestep_max)
        # 1e-3: a tenth of a timestep, since diffusers computes the largest one in float32
        if not np.all((points > 0) & (points <= largest * (1 + 1e-3))):
            raise ValueError(
                f"`sigmas` must be positive and at most {largest:g}, the noise level of the first timestep; got "
                f"{given}."
            )
        points = process.timestep(-np.log(np.minimum(points, largest)))
        points = np.round(points) if process.is_discrete else points
    elif process.is_discrete and np.any(points != np.round(points)):
        raise ValueError(f"`timesteps` must be integers, got {given}.")
    # 1e-6: a real timestep that went through float32
    low, high = process.timestep_min * (1 - 1e-6), process.timestep_max * (1 + 1e-6)
    if np.any(np.diff(points) >= 0) or points[0] > high or points[-1] < low:
        raise ValueError(
            f"`{name}` must strictly decrease and lie between the timesteps {process.timestep_max:g} and "
            f"{process.timestep_min:g}; got {given}, which are the timesteps {points.tolist()}."
        )
    return points
