"""gDDIM: the exponential integrator of a linear diffusion (Zhang, Tao & Chen, 2023, https://huggingface.co/papers/2206.05564).

With a square root K of the covariance Σ and score = −K^{−T} ε, the probability-flow ODE is

    du/dt = F u + ½ G Gᵀ K^{−T} ε                                                                     (Eq. 10)

gDDIM is its exponential integrator for the root K = R with Ṙ = F R + ½ G Gᵀ R^{−T}, along which the ε of a single
data point is constant, so that a step of any length is exact for it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ...processes import LinearDiffusion
from ...processes.linear_diffusion import inverse
from ..interpolation import interpolation_weights
from ..table import Levels, Row, Term

#: Gauss–Legendre points and weights of one panel
POINTS, QUADRATURE = np.polynomial.legendre.leggauss(32)
#: what the quadrature of a step may miss of the integral that is known, and in how many rounds panels are halved
TOLERANCE, HALVINGS = 1e-10, 8


def gddim(
    levels: Levels,
    index: int,
    known: int,
    order: int = 2,
    corrector: bool = False,
    eta: float = 0.0,
    interpolation: str = "timestep",
    parametrization: str = "R",
) -> Row:
    """
    The step u_s = Ψ(s, t) u_t + Σ_j C_j ε_j of Eq. (19), or the stochastic one of Proposition 6.

    Args:
        order (`int`): So many of the latest predictions are interpolated.
        corrector (`bool`): Whether [`gddim_correction`] is used as well.
        eta (`float`): Strength of the stochastic sampler, the paper's λ; it needs order 1.
        interpolation (`str`): The variable of the polynomials, `"timestep"` or `"log_snr"`.
        parametrization (`str`): The root K that the predictions belong to, `"R"` or `"L"`.
    """
    path, start = levels.path, _point(levels, index)
    root = square_root(path, start, parametrization)
    weights: dict[Term, np.ndarray]
    if levels.sigmas[index + 1] == 0:
        # The final denoising step, u_0 = Ψ(t, 0)^{−1} (u − K ε).
        to_data = inverse(path.mean(start))
        weights = {("sample", 0): to_data, ("prediction", 0): -to_data @ root}
    elif eta > 0:
        of_prediction, of_noise = stochastic_weights(path, start, _point(levels, index + 1), eta)
        weights = {("sample", 0): path.transition(_point(levels, index + 1), start), ("noise", 0): of_noise}
        # of ε for K = R, and K ε is the same for every K
        weights["prediction", 0] = of_prediction @ inverse(path.root(start)) @ root
    else:
        lags = range(min(known, order))
        weights = {("sample", 0): path.transition(_point(levels, index + 1), start)}
        integrals = _integrals(levels, index, tuple(index - lag for lag in lags), interpolation, parametrization)
        weights |= {("prediction", lag): weight for lag, weight in zip(lags, integrals, strict=True)}
    if corrector:
        # A correction Δ of the state takes ε along as if the data were standard normal, ε = Kᵀ (Ψ Ψᵀ + Σ)^{−1} u. Near
        # pure noise, the ε of the uncorrected state would put the data off by Ψ^{−1} Δ. That spoils the first steps,
        # and Langevin diffusion diverges (benchmarks/gddim_corrector.py); what it costs on concentrated data is less.
        of_data = path.mean(start)[..., :1]
        total = of_data @ of_data.swapaxes(-1, -2) + path.covariance(start)
        of_change = weights["prediction", 0] @ root.swapaxes(-1, -2) @ inverse(total)
        for term, weight in _corrections(levels, index, known, order, interpolation, parametrization).items():
            weights[term] = weights.get(term, 0.0) + of_change @ weight
    return _as_row(path, weights)


def gddim_correction(
    levels: Levels,
    index: int,
    known: int,
    predictor: Row,
    order: int = 2,
    interpolation: str = "timestep",
    parametrization: str = "R",
) -> Row:
    """What is added once the model was called: the step before again, with the new prediction among its nodes."""
    return _as_row(levels.path, _corrections(levels, index, known, order, interpolation, parametrization))


def _corrections(levels, index, known, order, interpolation, parametrization) -> dict[Term, np.ndarray]:
    if known == 1:
        return {}
    # The arrival with the new prediction among the nodes, less the arrival without it.
    nodes = tuple(index - lag for lag in range(min(known - 1, order) + 1))
    corrected = _integrals(levels, index - 1, nodes, interpolation, parametrization)
    predicted = _integrals(levels, index - 1, nodes[1:], interpolation, parametrization)
    weights = corrected - np.concatenate([0 * corrected[:1], predicted])
    return {("prediction", lag): weight for lag, weight in enumerate(weights)}


def _point(levels: Levels, index: int) -> float:
    """The timestep of point `index`, the noisy end of sampling included."""
    timestep = levels.timesteps[index] if index < len(levels) else levels.path.timestep_min
    return float(levels.path.inside(timestep))


@lru_cache(maxsize=32)  # rows and corrections share them
def _integrals(levels, index, nodes, interpolation, parametrization) -> np.ndarray:
    """The C_j of the step from point `index` to the next one, for predictions at the points `nodes`."""
    start, end, *times = (_point(levels, point) for point in (index, index + 1, *nodes))
    return integral_weights(levels.path, start, end, times, interpolation, parametrization)


def _as_row(path: LinearDiffusion, weights: Mapping[Term, np.ndarray]) -> Row:
    if path.weight_shape == (1, 1):  # a weight that is one number acts fastest as a number
        return {term: float(weight.item()) for term, weight in weights.items()}
    return dict(weights)


def square_root(process: LinearDiffusion, timesteps, parametrization: str) -> np.ndarray:
    """K_t with K Kᵀ = Σ: gDDIM's `"R"`, or `"L"`, the Cholesky factor."""
    return process.root(timesteps) if parametrization == "R" else np.linalg.cholesky(process.covariance(timesteps))


def integral_weights(
    process: LinearDiffusion,
    start: float,
    end: float,
    nodes: Sequence[float],
    interpolation: str = "timestep",
    parametrization: str = "R",
) -> np.ndarray:
    """
    C_j = ∫_t^s ½ Ψ(s, τ) G Gᵀ K^{−T} ℓ_j(τ) dτ (gDDIM, Eq. 19b), of shape `(len(nodes), *process.weight_shape)`.

    Args:
        process ([`LinearDiffusion`]): The diffusion.
        start, end (`float`): The timesteps t and s.
        nodes (`Sequence[float]`): Timesteps at which ε is known, those of the Lagrange polynomials ℓ_j.
        interpolation (`str`): Their variable, `"timestep"` or `"log_snr"`.
        parametrization (`str`): K, `"R"` or `"L"`.
    """

    def variable(timesteps):
        return process.log_snr(timesteps) if interpolation == "log_snr" else np.asarray(timesteps)

    origin, span = variable(start), variable(end) - variable(start)
    times, quadrature, kernel = _resolved(process, start, end)
    if parametrization == "L":  # as smooth as that of R
        kernel = _kernel(process, end, times, "L")
    powers = ((variable(times) - origin) / span) ** np.arange(len(nodes))[:, None]
    moments = np.tensordot(powers * quadrature, kernel, axes=1)
    if parametrization == "R":  # Ψ(s, τ) R_τ is the antiderivative of the kernel
        moments[0] = process.root(end) - process.transition(end, start) @ process.root(start)
    scaled = [float((variable(node) - origin) / span) for node in nodes]
    weights = interpolation_weights(scaled, [0] * len(nodes), moments.reshape(len(nodes), -1))
    return weights.reshape(moments.shape)


def stochastic_weights(
    process: LinearDiffusion, start: float, end: float, eta: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    The weights of ε (for K = R) and of the noise in a stochastic step (gDDIM, Proposition 6),

        u_s = Ψ u_t + (Ψ̂ − Ψ) R_t ε + N(0, P),   Ψ̂ = R_s X R_t^{−1},   P = R_s (1 − X Xᵀ) R_sᵀ

    where Ψ̂ is the transition of F + ((1 + η²)/2) G Gᵀ Σ^{−1} and Ẋ = (η²/2) R^{−1} G Gᵀ R^{−T} X, X = 1 at t. That P
    solves the paper's equation for the covariance follows by substitution.
    """
    root_start, root_end = process.root(start), process.root(end)
    if process.weight_shape[-1] == 1:  # X = (γ_s/γ_t)^{η²} with γ = R/Ψ(·, 0)
        gain = ((root_end / process.mean(end)) / (root_start / process.mean(start))) ** eta**2
    else:
        gain = _collocated_gain(process, start, end, eta)
    directions, values, _ = np.linalg.svd(gain)
    # The singular values of X are at most one, up to rounding.
    spread = np.sqrt(np.maximum((1 - values) * (1 + values), 0.0))
    of_prediction = root_end @ gain - process.transition(end, start) @ root_start
    return of_prediction, root_end @ directions * spread[..., None, :]


def _collocated_gain(process: LinearDiffusion, start: float, end: float, eta: float) -> np.ndarray:
    """X of [`stochastic_weights`] for matrices, by collocation at the Gauss–Legendre points: spectrally accurate."""
    count = len(POINTS)
    legendre = np.polynomial.legendre.legvander(POINTS, count)
    # S_ij = ∫_{−1}^{x_i} ℓ_j / w_j, with ℓ_j = Σ_k ½ (2k + 1) w_j P_k(x_j) P_k and
    # ∫_{−1}^x P_k = (P_{k+1} − P_{k−1})/(2k + 1), P_{−1} := −1 at k = 0.
    before = np.concatenate([-legendre[:, :1], legendre[:, :-2]], axis=1)
    integration = 0.5 * (legendre[:, 1:] - before) @ legendre[:, :-1].T

    times, quadrature = _quadrature(process, start, end)
    inverse_root = inverse(process.root(times))
    rate = eta**2 / 2 * inverse_root @ process.diffusion(times) @ inverse_root.swapaxes(-1, -2)
    rate *= quadrature[:, None, None]
    # X_i = 1 + Σ_j S_ij w_j A_j X_j at all points at once
    identity = np.eye(process.weight_shape[-1])
    coupling = np.einsum("ij,jab->iajb", integration, rate).reshape(count * len(identity), -1)
    inside = np.linalg.solve(np.eye(len(coupling)) - coupling, np.tile(identity, (count, 1))).reshape(rate.shape)
    return identity + np.einsum("jab,jbc->ac", rate, inside)


def _kernel(process: LinearDiffusion, end: float, times: np.ndarray, parametrization: str) -> np.ndarray:
    """½ Ψ(s, τ) G Gᵀ K^{−T} at the timesteps τ."""
    transposed = inverse(square_root(process, times, parametrization)).swapaxes(-1, -2)
    return 0.5 * process.transition(end, times) @ process.diffusion(times) @ transposed


def _quadrature(process: LinearDiffusion, start, end) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and weights of ∫_start^end dτ, in the logarithm of the time since the data, where Σ is singular."""
    log_start, log_end = np.log(start - process.timestep_data), np.log(end - process.timestep_data)
    since_data = np.exp(log_start + (POINTS + 1) / 2 * (log_end - log_start))
    return process.timestep_data + since_data, QUADRATURE * since_data * (log_end - log_start) / 2


def _resolved(process: LinearDiffusion, start: float, end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Timesteps, weights and the kernel for K = R, whose antiderivative Ψ(s, τ) R_τ is known.

    A panel that misses it is halved: in a long step of blurring, a frequency fades within a small part of it.
    """
    origin, edges = process.timestep_data, np.array([start, end])
    for _ in range(HALVINGS):
        times, weights = _quadrature(process, edges[:-1, None], edges[1:, None])
        kernel = _kernel(process, end, times, "R")
        exact = process.transition(end, edges) @ process.root(edges)
        missed = np.diff(exact, axis=0) - np.einsum("pi,pi...->p...", weights, kernel)
        tolerated = TOLERANCE * np.abs(exact).max(axis=(0, -1, -2), keepdims=True)
        coarse = np.any(np.abs(missed) > tolerated, axis=tuple(range(1, missed.ndim)))
        if not coarse.any():
            break
        middles = origin + np.sqrt((edges[:-1] - origin) * (edges[1:] - origin))
        edges = np.insert(edges, np.flatnonzero(coarse) + 1, middles[coarse])
    return times.ravel(), weights.ravel(), kernel.reshape(-1, *process.weight_shape)
