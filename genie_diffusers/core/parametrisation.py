"""What a model predicts of x = α x_0 + σ ε, on whatever path α and σ follow."""

import dataclasses
from typing import Any

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclasses.dataclass(frozen=True)
class Parametrisation:
    """
    One of ε, x_0, v = α ε − σ x_0 (Salimans & Ho, 2022) and the flow ε − x_0 (Lipman et al., 2023).

    All are linear in x_0 and ε, so conversions are two weights. α and σ may be numbers, arrays or tensors, of any
    path: v and flow are inverted by α² + σ² and α + σ, which are one on the paths that they are usually used with.

    Args:
        prediction_type (`str`): `"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`.

    Raises:
        ValueError: For another one.
    """

    prediction_type: str = "epsilon"

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}."
            )

    def to_noise(self, alpha, sigma) -> tuple[Any, Any]:
        """The weights of the sample x and of the model's output in ε."""
        if self.prediction_type == "epsilon":
            return 0.0, 1.0
        if self.prediction_type == "sample":
            return 1 / sigma, -alpha / sigma
        if self.prediction_type == "v_prediction":
            norm = alpha**2 + sigma**2
            return sigma / norm, alpha / norm
        return 1 / (alpha + sigma), alpha / (alpha + sigma)

    def to_data(self, alpha, sigma) -> tuple[Any, Any]:
        """The weights of the sample x and of the model's output in x_0."""
        if self.prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "sample":
            return 0.0, 1.0
        if self.prediction_type == "v_prediction":
            norm = alpha**2 + sigma**2
            return alpha / norm, -sigma / norm
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)

    def from_noise(self, alpha, sigma) -> tuple[Any, Any]:
        """The weights of the sample x and of ε in the model's output."""
        if self.prediction_type == "epsilon":
            return 0.0, 1.0
        if self.prediction_type == "sample":
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "v_prediction":
            return -sigma / alpha, (alpha**2 + sigma**2) / alpha
        return -1 / alpha, (alpha + sigma) / alpha

    def noise(self, output, sample, alpha, sigma):
        """ε from the model's output."""
        of_sample, of_output = self.to_noise(alpha, sigma)
        if self.prediction_type == "epsilon":
            return output
        return of_sample * sample + of_output * output

    def output(self, noise, sample, alpha, sigma):
        """ε as the model would have said it, the inverse of `noise`."""
        of_sample, of_noise = self.from_noise(alpha, sigma)
        if self.prediction_type == "epsilon":
            return noise
        return of_sample * sample + of_noise * noise

    def noise_slope(self, output, output_dot, sample, sample_dot, alpha, sigma, alpha_dot, sigma_dot):
        """dε/dλ from the model's output, the sample and both their derivatives in λ, on a path with dα/dλ, dσ/dλ."""
        if self.prediction_type == "epsilon":
            return output_dot
        if self.prediction_type == "sample":  # ε = (x − α x_0)/σ
            noise = self.noise(output, sample, alpha, sigma)
            return (sample_dot - alpha_dot * output - alpha * output_dot - sigma_dot * noise) / sigma
        noise = self.noise(output, sample, alpha, sigma)
        if self.prediction_type == "v_prediction":  # (α² + σ²) ε = σ x + α v
            norm, norm_dot = alpha**2 + sigma**2, 2 * (alpha * alpha_dot + sigma * sigma_dot)
            total_dot = sigma_dot * sample + sigma * sample_dot + alpha_dot * output + alpha * output_dot
        else:  # (α + σ) ε = x + α v
            norm, norm_dot = alpha + sigma, alpha_dot + sigma_dot
            total_dot = sample_dot + alpha_dot * output + alpha * output_dot
        return (total_dot - norm_dot * noise) / norm
