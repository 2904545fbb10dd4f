"""GENIE from data to noise: the probability-flow ODE of `GenieScheduler`, solved the other way."""

from typing import Any

import numpy as np
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from .hermite import conditional_integral
from .scheduling_genie import GenieScheduler
from .scheduling_utils import Row, TableScheduler


class GenieInverseScheduler(GenieScheduler):
    """
    Encodes: solves the probability-flow ODE from data to the noise that [`GenieScheduler`] turns back into the data.

    It visits the points of a [`GenieScheduler`] of the same configuration and source backwards. That one calls the
    model at t_0 > … > t_{N−1} and ends at clean data; this one starts at clean data, where it calls the model with its
    smallest timestep, then at t_{N−1}, …, t_1, and arrives at t_0: as many calls for as many steps. Pipelines
    that take `latents` run it like any other scheduler, with the data in their place:

    ```py
    pipe.scheduler = GenieInverseScheduler.from_config(decoder.config)
    noise = pipe(latents=pictures, num_inference_steps=20, output_type="latent").images
    pipe.scheduler = decoder
    ```

    In x̄ = x/α and γ = σ/α the ODE is dx̄/dγ = ε. The step from clean data is x̄_1 = x_0 + γ_1 ε_0, with a prediction on
    clean data, for which no model was trained; a single call, which has no other, therefore encodes badly.

    - `method="hermite"` integrates the mean of ε given everything known of it, values and slopes
      (`interpolation_order` conditions), x̄_{n+1} = x̄_n − ∫ e^{−λ} ε(λ) dλ. The step is corrected at no further call,
      that from clean data with x_0 = x̄_1 − γ_1 ε_1, the last step of the decoder, others with values and slopes at
      both ends, or without slopes with the values at both ends and at the point before;
    - `method="taylor"` takes the steps of GENIE's second truncated Taylor method, with γ growing.

    Where `encoding` has rows for the number of model calls, and nothing is attached, these are followed instead. They
    were learned (`training/train_encoding.py`) so that `GenieScheduler.from_config(encoder.config)` finds back to the
    data. With a [`StepHead`] the points are those of its tables.

    A decoder loses what it cannot restore in its last step to clean data, and what its first step from pure noise does
    is known only from the noise. Round trips are therefore closest with `final_sigmas_type="sigma_min"`, which takes
    data to be at the smallest noise level, and `analytical_first_step=True`, which is undone exactly, as a part of the
    last step here; on `time_grid="uniform_lambda"`, which has short steps near the data.

    Args:
        encoding (`dict`, *optional*):
            For each number of model calls, as a string: `"sigmas"`, the noise levels γ from data to noise that it was
            learned for, `"options"`, what else of the configuration it was learned for, and `"weights"`, a list for
            each step of the weights of x_n, ε_n, ε_{n−1}, … back to ε_0.
        others: Those of [`GenieScheduler`].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        continuous: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        final_sigmas_type: str = "zero",
        time_grid: str | None = None,
        denoising_step: bool = False,
        method: str = "hermite",
        flow_shift: float = 1.0,
        interpolation_order: int | None = None,
        analytical_first_step: bool = False,
        encoding: dict[str, dict[str, Any]] | None = None,
    ):
        TableScheduler.__init__(self)  # that of GenieScheduler would register its own defaults

    @property
    def data_form(self) -> bool:
        return False

    @property
    def _follows_table(self) -> bool:
        return self._encoding is not None

    def _build(self, begin: int):
        learned = (self.config.encoding or {}).get(str(len(self.lambdas) - 1))
        self._encoding: Any = learned if begin == 0 and self._slope_source is None else None
        if self._encoding is not None:
            self._check_encoding(self._encoding)
        super()._build(begin)

    def _check_encoding(self, learned: dict[str, Any]):
        """Raise a `ValueError` if these rows are for other points, or for another decoder."""
        sigmas, count = self.sigmas.numpy(), len(self.lambdas) - 1
        others = {key: value for key, value in learned.get("options", {}).items() if self.config[key] != value}
        fits = len(learned["sigmas"]) == count + 1 and np.allclose(learned["sigmas"], sigmas, rtol=1e-4)
        if others or not fits or len(learned["weights"]) != count:
            raise ValueError(
                f"`encoding` was learned for {len(learned['weights'])} model calls at the noise levels "
                f"{learned['sigmas']} with {learned.get('options', {})}; this run has {count} calls at "
                f"{sigmas.tolist()} with { {key: self.config[key] for key in others} }. Keep the configuration that "
                "it was learned for, or set `encoding=None`."
            )

    def _route(self, timesteps, alphas, noise_stds):
        # The analytical first step scales the noise that a decoder is given.
        self._noise_scale, self.init_noise_sigma = self.init_noise_sigma, 1.0
        timesteps = np.append(timesteps, self.process.timestep_min)
        return timesteps[:0:-1], alphas[::-1], noise_stds[::-1]

    def _levels(self, index: int) -> tuple[float, float]:
        if self.noise_stds[index] > 0:
            return super()._levels(index)
        process = self.process
        return float(process.alpha(process.timestep_min)), float(process.sigma(process.timestep_min))

    def row(self, index: int, known: int) -> Row:
        if self._follows_table:
            return self._learned_row(index)
        if self.config.method == "taylor":
            row = self._taylor_row(index, known)
        else:
            row = {("sample", 0): float(self.alphas[index + 1] / self.alphas[index])}
            kinds = ("prediction", "slope") if self._has_slopes else ("prediction",)
            points = range(index, index - known, -1)
            conditions = self._usable([(what, point) for point in points for what in kinds])[: self._order]
            conditions = conditions or [("prediction", index)]  # that of clean data, where there is no other
            row |= {(what, index - point): weight for (what, point), weight in self._integral(index, conditions)}
        scale = self._noise_scale if index + 2 == len(self.alphas) else 1.0
        return {column: weight / scale for column, weight in row.items()}

    def _known_around(self, start: int, known: int) -> list[tuple[str, int]]:
        if self.noise_stds[start] == 0:
            return [("prediction", start + 1)]  # x_0 = x̄_1 − γ_1 ε_1
        if self._has_slopes:
            return self._usable([(what, point) for point in (start + 1, start) for what in ("prediction", "slope")])
        return self._usable([("prediction", point) for point in (start + 1, start, start - 1)[:known]])

    def correction(self, index: int, known: int) -> Row:
        if known == 1 or self.config.method == "taylor" or self._follows_table:
            return {}
        start = index - 1
        conditions = self._known_around(start, known)
        correction = {(what, index - point): weight for (what, point), weight in self._integral(start, conditions)}
        for (what, lag), weight in self.table[start].items():  # what the predictor has already added
            if what != "sample":
                correction[what, lag + 1] = correction.get((what, lag + 1), 0.0) - weight
        return correction

    def _usable(self, conditions: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Without those at clean data, and at a point that is visited again at once (a noisy end at a timestep)."""
        newest = max(point for _, point in conditions)
        return [
            (what, point)
            for what, point in conditions
            if self.noise_stds[point] > 0 and (point == newest or self.lambdas[point] > self.lambdas[point + 1])
        ]

    def _integral(self, start: int, conditions: list[tuple[str, int]]) -> list[tuple[tuple[str, int], float]]:
        """The weights of `conditions` (what, at which point) in the step from point `start` to the next one."""
        if self.noise_stds[start] == 0:
            return [(conditions[0], float(self.noise_stds[start + 1]))]
        known = [("slope" if what == "slope" else "value", self.lambdas[point]) for what, point in conditions]
        weights = conditional_integral(known, self.lambdas[start], self.lambdas[start + 1], rate=-1.0)
        weights *= -self.alphas[start + 1] * np.exp(-self.lambdas[start])
        return [(condition, float(weight)) for condition, weight in zip(conditions, weights, strict=True)]

    def _learned_row(self, index: int) -> Row:
        of_sample, *of_predictions = self._encoding["weights"][index]
        return {("sample", 0): of_sample} | {("prediction", lag): weight for lag, weight in enumerate(of_predictions)}
