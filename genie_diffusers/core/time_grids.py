"""Where a sampler calls the model: grids of timesteps between the noisiest and the cleanest one."""

import math
import re
from collections.abc import Sequence

import numpy as np
import torch

from ..processes import LinearDiffusion

#: diffusers' own spacings of integer timesteps (Lin et al., 2023, Table 2)
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
#: grids in noise level that spend, where they come from, the last model call at the smallest one
SIGMA_GRIDS = ("karras", "exponential", "beta", "kl_optimal")
#: grids that are shares of the largest noise level
SHARE_GRIDS = ("linear_quadratic", "bong_tangent")
#: grids whose points are noise levels and not timesteps
NOISE_LEVEL_GRIDS = ("uniform_lambda", "power_lambda", *SIGMA_GRIDS, *SHARE_GRIDS)
TIME_GRIDS = ("linear", "quadratic", "sgm_uniform", "simple", "beta57", *NOISE_LEVEL_GRIDS)

#: by name, the kind of a grid at quantiles of a Beta distribution, and the two shapes of that
BETA_SHAPES = {"beta": ("beta", (0.6, 0.6)), "beta57": ("beta_timesteps", (0.5, 0.7))}
#: any other two shapes
BETA_NAME = re.compile(r"(beta|beta_timesteps)\(([0-9.]+), ?([0-9.]+)\)")
#: up to which the series of `beta_quantiles` is accurate
LARGEST_SHAPE = 10.0


def parse_grid(name: str | None, names: Sequence[str | None] = TIME_GRIDS) -> tuple[str | None, tuple[float, ...]]:
    """
    The kind of a grid, and the two shapes of its Beta distribution if it has one.

    Args:
        name (`str`): A grid of [`time_grid`], or another one of `names`.
        names (sequence of `str`): Those that exist.

    Raises:
        ValueError: For a name that does not exist.
    """
    if name in names:
        return BETA_SHAPES.get(name or "", (name, ()))
    match = BETA_NAME.fullmatch(name) if isinstance(name, str) else None
    try:
        shapes = tuple(map(float, match.groups()[1:])) if match else ()
    except ValueError:  # 0.5.7
        shapes = ()
    if match and shapes and all(0 < shape <= LARGEST_SHAPE for shape in shapes):
        return match.group(1), shapes
    known = [str(known) for known in names]
    raise ValueError(
        f"`time_grid` must be one of {', '.join(known)}, or beta(α,β) or beta_timesteps(α,β) with two numbers between "
        f"0 and {LARGEST_SHAPE:g}; got {name!r}."
    )


def time_grid(process: LinearDiffusion, name: str, num_points: int, last: float | None = None) -> np.ndarray:
    """
    `num_points` real timesteps, decreasing from `process.timestep_max` to `last`.

    A run of n calls that ends at clean data has the first n of n + 1 points or, on `SIGMA_GRIDS`, all of n: so do
    diffusers and ComfyUI, whose noise levels these are, a 0 at their end aside.

    Args:
        process ([`LinearDiffusion`]): The diffusion, with N = `num_train_timesteps`.
        name (`str`):
            What is spaced evenly. The noise level s is γ = σ/α, and the shifted σ on the path of flow matching; u is
            the share of the points that are passed, from 0 to 1. Timesteps t of flow matching are shifted afterwards:
            - `"linear"`: t (GENIE, linear striding);
            - `"quadratic"`: √t (GENIE, quadratic striding);
            - `"uniform_lambda"`: λ = log(α/σ) (Lu et al., 2022);
            - `"power_lambda"`: (λ − λ_T)^{2/3}, short steps near the noise, where multistep solvers know little yet;
            - `"karras"`: s^{1/7} (Karras et al., 2022, Eq. 5; diffusers' `use_karras_sigmas`);
            - `"exponential"`: log s, which is −λ where s is γ (diffusers' `use_exponential_sigmas`, and what its
              `use_lu_lambdas` computes);
            - `"beta"`: s = s_min + (s_max − s_min) Q(1 − u), Q the quantiles of Beta(0.6, 0.6) (Lee et al., 2024;
              diffusers' `use_beta_sigmas`), and `"beta(α,β)"` those of another Beta distribution;
            - `"kl_optimal"`: arctan s (Sabour et al., 2024, Theorem 3.1; ComfyUI);
            - `"sgm_uniform"`: t (ComfyUI). Its difference from `"linear"` is that on a shifted flow the smallest
              timestep is shifted before the others are;
            - `"simple"`: every (N/n)th of the N timesteps, ⌊iN/n⌋ below the first one for call i of n (ComfyUI);
            - `"beta57"`: t at the quantiles Q(1 − i/n) of Beta(0.5, 0.7), rounded to one of the N timesteps
              (RES4LYF), and `"beta_timesteps(α,β)"` for others: ComfyUI's beta is `"beta_timesteps(0.6,0.6)"`;
            - `"linear_quadratic"`: s/s_max = 1 − 0.025 i/m for the calls i < m = ⌊n/2⌋, then a parabola that goes on
              from there, value and slope, and is 0 at i = n (Mochi and LTX-Video; on γ as in ComfyUI);
            - `"bong_tangent"`: s/s_max is 1 at i = 0, ½ at i = m − 1, m = ⌊0.6 (n + 2)⌋, and 0 at i = n, and between
              them −arctan(8 (i − c)/(n + 2)) but for a factor and a constant, with c = m before ½ and m − 1 after it
              (RES4LYF, which knows s_max = 1 alone).
        num_points (`int`): At least 1; a single point is the noisiest one.
        last (`float`, *optional*): The last timestep. Default: `process.timestep_min`.

    Raises:
        ValueError: For an unknown name.
    """
    kind, shapes = parse_grid(name)
    ramp, calls = np.linspace(0.0, 1.0, num_points), max(num_points - 1, 1)
    first, end = process.timestep_max, process.timestep_min if last is None else last
    most, least = process.noise_level(first), process.noise_level(end)
    if kind in ("linear", "sgm_uniform"):
        timesteps = first + ramp * (end - first)
    elif kind == "quadratic":
        timesteps = (np.sqrt(first) + ramp * (np.sqrt(end) - np.sqrt(first))) ** 2
    elif kind == "simple":
        timesteps = numbered(process, np.arange(calls) * process.num_train_timesteps // calls, end)
    elif kind == "beta_timesteps":
        largest = process.num_train_timesteps - 1
        places = beta_quantiles(1.0 - np.arange(calls) / calls, *shapes) * largest
        timesteps = numbered(process, largest - distinct_integers(places, largest), end)
    elif kind in ("uniform_lambda", "power_lambda"):
        ramp = ramp**1.5 if kind == "power_lambda" else ramp
        lambda_first, lambda_last = process.log_snr(first), process.log_snr(end)
        timesteps = process.timestep(lambda_first + ramp * (lambda_last - lambda_first))
    elif kind == "karras":
        rho = 7.0
        root_most, root_least = most ** (1 / rho), least ** (1 / rho)
        timesteps = process.at_noise_level((root_most + ramp * (root_least - root_most)) ** rho)
    elif kind == "exponential":
        timesteps = process.at_noise_level(np.exp(np.log(most) + ramp * (np.log(least) - np.log(most))))
    elif kind == "kl_optimal":
        timesteps = process.at_noise_level(np.tan(np.arctan(most) + ramp * (np.arctan(least) - np.arctan(most))))
    elif kind == "beta":
        timesteps = process.at_noise_level(least + beta_quantiles(1.0 - ramp, *shapes) * (most - least))
    else:
        shares = linear_quadratic_shares(calls) if kind == "linear_quadratic" else bong_tangent_shares(calls)
        # They lead to 0, except where another end is asked for, or so many calls that they went below the smallest.
        to = 0.0 if last is None and shares[-1] * most > least else least
        timesteps = np.append(process.at_noise_level(to + shares * (most - to)), end)
    timesteps = timesteps[:num_points]
    # The ends are known exactly; powers and inversions are only accurate to rounding.
    timesteps[0], timesteps[num_points - 1 :] = first, end if num_points > 1 else first
    return timesteps


def numbered(process: LinearDiffusion, places: np.ndarray, end: float) -> np.ndarray:
    """Those of the N timesteps of a model that are `places` below the first one, and `end`."""
    spacing = (process.timestep_max - process.timestep_min) / (process.num_train_timesteps - 1)
    return np.append(process.timestep_max - spacing * places, end)


def linear_quadratic_shares(calls: int) -> np.ndarray:
    """The grid `"linear_quadratic"` of [`time_grid`]: what is left of the noise at each call."""
    if calls == 1:
        return np.ones(1)
    straight, threshold = calls // 2, 0.025
    slope, remaining = threshold / straight, calls - straight
    beyond = np.arange(calls) - straight
    curvature = (1.0 - threshold - slope * remaining) / remaining**2
    return 1.0 - threshold - slope * beyond - curvature * np.maximum(beyond, 0) ** 2


def bong_tangent_shares(calls: int) -> np.ndarray:
    """The grid `"bong_tangent"` of [`time_grid`]: what is left of the noise at each call."""
    if calls == 1:
        return np.ones(1)
    middle, slope = int(0.6 * (calls + 2)), 8.0 / (calls + 2)
    early = np.arctan(slope * np.arange(middle, 0, -1))
    late = np.arctan(slope * np.arange(calls + 2 - middle))
    early = 0.5 + 0.5 * (early - early[-1]) / (early[0] - early[-1])
    return np.concatenate([early[:-1], 0.5 - 0.5 * late[:-1] / late[-1]])


def resampled_grid(process: LinearDiffusion, levels: Sequence[float], num_points: int) -> np.ndarray:
    """
    As [`time_grid`], through a list of noise levels γ that are for another number of points: log-linear between them.

    Args:
        process ([`LinearDiffusion`]): The diffusion.
        levels (`Sequence[float]`): Decreasing γ; the first and, after them, the last point are those of the path.
        num_points (`int`): At least 1.
    """
    logs = np.log([*levels, float(process.gamma(process.timestep_min))])
    log_levels = np.interp(np.linspace(0.0, 1.0, num_points), np.linspace(0.0, 1.0, len(logs)), logs)
    timesteps = process.timestep(-np.minimum(log_levels, np.log(process.gamma(process.timestep_max))))
    timesteps[num_points - 1 :], timesteps[0] = process.timestep_min, process.timestep_max
    return timesteps


def beta_quantiles(shares: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Where the distribution function of Beta(`alpha`, `beta`) has the values `shares`."""
    lower, upper = smaller_beta_quantiles(shares, alpha, beta), smaller_beta_quantiles(1.0 - shares, beta, alpha)
    return np.where(lower < 0.5, lower, 1.0 - upper)


def smaller_beta_quantiles(shares: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """`beta_quantiles` by bisection, ½ for those that are larger."""
    # the series of the incomplete beta function, which halves its terms at ½
    orders = np.arange(1, 60)
    series = np.concatenate([[1.0], np.cumprod((orders - beta) / orders)]) / (alpha + np.arange(60))
    total = math.exp(math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta))
    low, high = np.zeros(len(shares)), np.full(len(shares), 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle**alpha * (middle[:, None] ** np.arange(60) @ series) / total < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


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
            Instead, strictly decreasing noise levels γ = σ/α; each is moved to the nearest timestep. A 0 at their end
            is left out, see `calls_of`.

    Raises:
        ValueError: If they do not decrease, are no numbers, or lie outside of the path.
    """
    name = "timesteps" if timesteps is not None else "sigmas"
    given = timesteps if timesteps is not None else sigmas
    points = np.asarray(given.cpu() if torch.is_tensor(given) else given, dtype=np.float64)
    points = points if timesteps is not None else calls_of(points)
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


def calls_of(sigmas: np.ndarray) -> np.ndarray:
    """Noise levels without the 0 that lists of diffusers and ComfyUI end with: it is where a run ends, and no call."""
    return sigmas[:-1] if sigmas.ndim == 1 and len(sigmas) > 1 and sigmas[-1] == 0 else sigmas
