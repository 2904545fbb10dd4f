"""What models predict, on any path."""

import numpy as np
import pytest
import torch

from genie_diffusers.core import Parametrisation
from genie_diffusers.core.parametrisation import PREDICTION_TYPES

#: α and σ: variance preserving, flow matching, neither
LEVELS = [(0.6, 0.8), (0.3, 0.7), (0.9, 1.4)]


def predicted(kind: str, noise, data, alpha, sigma):
    return {
        "epsilon": noise,
        "sample": data,
        "v_prediction": alpha * noise - sigma * data,
        "flow_prediction": noise - data,
    }[kind]


@pytest.mark.parametrize("alpha, sigma", LEVELS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_conversions_invert_the_definition_on_every_path(kind, alpha, sigma, noise):
    epsilon, data = noise(5), noise(5, seed=1)
    sample, parametrisation = alpha * data + sigma * epsilon, Parametrisation(kind)
    output = predicted(kind, epsilon, data, alpha, sigma)
    torch.testing.assert_close(parametrisation.noise(output, sample, alpha, sigma), epsilon)
    of_sample, of_output = parametrisation.to_data(alpha, sigma)
    torch.testing.assert_close(of_sample * sample + of_output * output, data)
    torch.testing.assert_close(parametrisation.output(epsilon, sample, alpha, sigma), output)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_slopes_of_the_noise_are_those_of_the_chain_rule(kind):
    """ε, x_0, α and σ as made-up functions of λ; everything else follows."""

    def at(u):
        alpha, sigma = 0.5 + 0.3 * u + 0.1 * u**2, 0.8 - 0.2 * u
        noise, data = torch.sin(2 * u) + 0.3, torch.cos(u) - 0.2 * u
        return alpha, sigma, noise, alpha * data + sigma * noise, predicted(kind, noise, data, alpha, sigma)

    point = torch.tensor(0.37, dtype=torch.float64)
    values, derivatives = torch.func.jvp(at, (point,), (torch.ones_like(point),))
    alpha, sigma, _, sample, output = values
    alpha_dot, sigma_dot, noise_dot, sample_dot, output_dot = derivatives
    found = Parametrisation(kind).noise_slope(
        output, output_dot, sample, sample_dot, alpha, sigma, alpha_dot, sigma_dot
    )
    torch.testing.assert_close(found, noise_dot)


def test_weights_may_be_arrays():
    alpha, sigma = np.array([0.6, 0.3]), np.array([0.8, 0.7])
    of_sample, of_output = Parametrisation("flow_prediction").to_noise(alpha, sigma)
    np.testing.assert_allclose(of_sample, 1 / (alpha + sigma))
    np.testing.assert_allclose(of_output, alpha / (alpha + sigma))


def test_others_are_refused():
    with pytest.raises(ValueError, match=r"`prediction_type` must be one of epsilon, sample.*got 'score'"):
        Parametrisation("score")
