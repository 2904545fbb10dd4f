"""DDIM (Song, Meng & Ermon, 2021, https://huggingface.co/papers/2010.02502), on any path x = α x_0 + σ z."""

import numpy as np

from ..table import Levels, Row


def ddim(levels: Levels, index: int, known: int = 1, eta: float = 0.0) -> Row:
    """
    The weights of x, x_0 and noise in a step of DDIM (Eq. 12 and 16).

    Args:
        eta (`float`): Noise of η times the standard deviation of the DDPM posterior, σ_next √(1 − γ_next²/γ²).
    """
    (alpha, alpha_next), (sigma, sigma_next) = levels.alphas[index : index + 2], levels.sigmas[index : index + 2]
    ratio = levels.gammas[index + 1] / levels.gammas[index]
    noise = eta * sigma_next * np.sqrt((1.0 - ratio) * (1.0 + ratio))
    direction = np.sqrt((sigma_next - noise) * (sigma_next + noise)) / sigma
    row = {("sample", 0): direction, ("data", 0): alpha_next - direction * alpha, ("noise", 0): noise}
    return {term: float(weight) for term, weight in row.items() if weight}
