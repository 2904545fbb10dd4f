"""ER-SDE solvers (Cui et al., 2023, https://huggingface.co/papers/2309.06169)."""

import numpy as np
from scipy.integrate import fixed_quad

from ..table import Levels, Row


def noise_scale(gamma):
    """φ(γ) = γ (exp γ^0.3 + 10) of the paper's ER-SDE 5, which it recommends (Eq. 23)."""
    return gamma * (np.exp(gamma**0.3) + 10.0)


def er_sde(levels: Levels, index: int, known: int, order: int = 2) -> Row:
    """
    A step of the extended reverse-time SDE in x̄ = x/α and γ = σ/α, of order 1 or 2 (Eq. 24).

    x̄' = r x̄ + (1 − r) D + (γ' − γ + φ(γ') ∫_{γ'}^γ dγ/φ) dD/dγ + √(γ'² − r² γ²) z with r = φ(γ')/φ(γ).
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    (alpha, alpha_next), (gamma, gamma_next) = levels.alphas[index : index + 2], levels.gammas[index : index + 2]
    ratio = noise_scale(gamma_next) / noise_scale(gamma)
    noise = np.sqrt(max(gamma_next**2 - (gamma * ratio) ** 2, 0.0))
    row = {("sample", 0): alpha_next / alpha * ratio, ("data", 0): alpha_next * (1 - ratio)}
    row["noise", 0] = alpha_next * noise
    if min(order, known) > 1:  # dD/dγ by the last two data predictions
        # in log γ, where φ varies by a power
        integral, _ = fixed_quad(lambda u: np.exp(u) / noise_scale(np.exp(u)), *np.log([gamma_next, gamma]), n=32)
        slope = alpha_next * (gamma_next - gamma + noise_scale(gamma_next) * integral)
        slope /= gamma - levels.gammas[index - 1]
        row["data", 0], row["data", 1] = row["data", 0] + slope, -slope
    return {term: float(weight) for term, weight in row.items()}
