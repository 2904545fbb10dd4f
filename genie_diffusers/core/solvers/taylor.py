"""GENIE's second truncated Taylor method (Dockhorn, Vahdat & Kreis, 2022, https://huggingface.co/papers/2210.05475)."""

from ..interpolation import interpolation_weights, polynomial_moments
from ..table import Levels, Row


def taylor(levels: Levels, index: int, known: int, slopes: bool = False) -> Row:
    """
    The step x̄(γ + h) = x̄ + h ε + ½ h² dε/dγ in x̄ = x/α and γ = σ/α, either way (GENIE, Eq. 8).

    Without slopes the derivative is the finite difference of the last two predictions: two-step Adams–Bashforth.
    """
    alpha, alpha_next = levels.alphas[index : index + 2]
    gamma, gamma_next = levels.gammas[index : index + 2]
    terms, nodes, derivatives = [("prediction", 0)], [0.0], [0]
    if gamma > 0 and gamma_next > 0:  # the step to clean data is x_0 itself
        if slopes:
            terms, nodes, derivatives = [*terms, ("slope", 0)], [0.0, 0.0], [0, 1]
        elif known > 1 and levels.sigmas[index - 1] > 0:
            terms, nodes, derivatives = [*terms, ("prediction", 1)], [0.0, levels.gammas[index - 1] - gamma], [0, 0]
    weights = interpolation_weights(nodes, derivatives, polynomial_moments(gamma_next - gamma, len(nodes)))
    row: Row = {("sample", 0): float(alpha_next / alpha)}
    for term, weight in zip(terms, weights, strict=True):
        # the source gives dε/dλ, and dε/dγ = −(1/γ) dε/dλ
        row[term] = float(alpha_next * (-weight / gamma if term[0] == "slope" else weight))
    return row
