"""ER-SDE solvers (Cui et al., 2023, https://huggingface.co/papers/2309.06169)."""

import numpy as np

from ..table import Levels, Row

#: Gauss–Legendre points and weights on [0, 1]
_ER_POINTS, _ER_SHARES = np.polynomial.legendre.leggauss(32)
_ER_POINTS, _ER_SHARES = (_ER_POINTS + 1) / 2, _ER_SHARES / 2


def noise_scale(gamma):
    """φ(γ) = γ (exp γ^0.3 + 10) of the paper's ER-SDE 5, which it recommends (Eq. 23)."""
    return gamma * (np.exp(gamma**0.3) + 10.0)


def er_sde(levels: Levels, index: int, known: int, order: int = 3) -> Row:
    """
    A step of the extended reverse-time SDE in x̄ = x/α and γ = σ/α, of order 1 to 3 (Eq. 24 and Algorithms 1 to 3).

    x̄' = r x̄ + (1 − r) D + (δ + φ' ∫ du/φ) D' + (δ²/2 + φ' ∫ (u − γ) du/φ) D'' + √(γ'² − r² γ²) z with δ = γ' − γ,
    r = φ'/φ and integrals from γ' to γ. D' is the last difference quotient, D'' that of the last two, as published.
    """
    if levels.sigmas[index + 1] == 0:
        return {("data", 0): 1.0}
    (alpha, alpha_next), (gamma, gamma_next) = levels.alphas[index : index + 2], levels.gammas[index : index + 2]
    ratio = noise_scale(gamma_next) / noise_scale(gamma)
    of_data = np.zeros(3)
    of_data[0] = 1 - ratio
    # in log γ, where φ varies by a power
    span = np.log(gamma / gamma_next)
    between = gamma_next * np.exp(_ER_POINTS * span)
    shares = noise_scale(gamma_next) * _ER_SHARES * span * between / noise_scale(between)
    quotient = np.zeros(3)
    if min(order, known) > 1:
        quotient[:2] = np.array([1.0, -1.0]) / (gamma - levels.gammas[index - 1])
        of_data += (gamma_next - gamma + shares.sum()) * quotient
    if min(order, known) > 2:
        before = np.array([0.0, 1.0, -1.0]) / (levels.gammas[index - 1] - levels.gammas[index - 2])
        second = (quotient - before) / ((gamma - levels.gammas[index - 2]) / 2)
        of_data += ((gamma_next - gamma) ** 2 / 2 + shares @ (between - gamma)) * second
    row: Row = {("sample", 0): float(alpha_next / alpha * ratio)}
    row["noise", 0] = float(alpha_next * np.sqrt(max(gamma_next**2 - (gamma * ratio) ** 2, 0.0)))
    return row | {("data", lag): float(alpha_next * weight) for lag, weight in enumerate(of_data) if weight}
