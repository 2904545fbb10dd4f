"""GGDM: samplers that are learned (Watson, Chan, Ho & Norouzi, 2022, https://huggingface.co/papers/2202.05830)."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_utils import Column, Row, TableScheduler

#: what a row may weigh, now and in earlier steps
WEIGHED = ("sample", "prediction", "slope")


class GGDMScheduler(TableScheduler):
    """
    Generalised Gaussian diffusion models: a step is any weighted sum of what the run has seen so far, and noise.

    From x_K, pure noise, to the clean x_0 in K model calls,

        x_{k−1} = Σ_{u ≥ k} μ_{k,u} x_u + Σ_{u ≥ k} μ'_{k,u} x̂_0(x_u, t_u) + σ_k z

    Of the paper are the weights μ_{k,u} of all earlier states, μ'_{k,k} of the latest prediction, and σ_k ≥ 0. With
    μ_{k,k} free, that includes the paper's +PRED, free coefficients of x̂_0 in x_k and ε. The timesteps t_k that the
    model is called with may be real numbers, the paper's +TIME. Weights of earlier predictions make the multistep
    solvers part of the family, and weights of slopes (see [`~TableScheduler.attach`]) those of GENIE.

    The numbers are learned for each K, by `training/train_ggdm.py`, and stored in the configuration. Nothing else is
    needed to sample. [`~GGDMScheduler.from_ddim`] and [`~GGDMScheduler.from_scheduler`] make the tables that learning
    starts from.

    A run may start mid-way (image-to-image) where no row that follows weighs what lies before its start.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps the model was trained with.
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02):
            First and last variance of the noise schedule.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*):
            The variances themselves, instead of the three above.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale to zero terminal signal-to-noise ratio.
        continuous (`bool`, defaults to `False`):
            As in [`GenieScheduler`], for models trained in continuous time.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the model predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        variance_type (`str`, *optional*):
            With `"learned"` or `"learned_range"` the second half of the model's output channels is dropped.
        clip_sample (`bool`, defaults to `False`), clip_sample_range (`float`, defaults to 1.0):
            Clip the predicted x_0.
        thresholding (`bool`, defaults to `False`), dynamic_thresholding_ratio (`float`, defaults to 0.995),
        sample_max_value (`float`, defaults to 1.0):
            Dynamic thresholding of the predicted x_0, for models in pixel space.
        tables (`dict`, *optional*):
            For each number of model calls, as a string, a dictionary of
            - `"timesteps"`: a strictly decreasing list, of integers or real numbers;
            - `"sample"`, `"prediction"`, `"slope"`: for each step a list of the weights of that tensor in this step,
              one step ago, and so on, at most back to the first step. What is left out has weight zero;
            - `"noise"`: the σ_k, zero where left out;
            - `"data_form"`: whether predictions are x̂_0 instead of ε, `False` where left out.
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
        tables: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__()

    @classmethod
    def from_scheduler(cls, scheduler: TableScheduler, num_inference_steps: int | Sequence[int]) -> "GGDMScheduler":
        """
        The sampler that `scheduler` is, correctors included, as tables.

        Args:
            scheduler ([`TableScheduler`]):
                A scheduler of this package for variance-preserving models, with its slope source attached if it has
                one. Attach it to the result as well.
            num_inference_steps (`int` or `Sequence[int]`):
                The numbers of model calls to make tables for.

        Raises:
            ValueError:
                If `scheduler` is of another kind, does not end at clean data (`final_sigmas_type="sigma_min"`) or
                scales the initial noise (`analytical_first_step=True`).
        """
        if not isinstance(scheduler, TableScheduler) or scheduler._process_class is not cls.process_class:
            raise ValueError(
                "`scheduler` must be a scheduler of this package for variance-preserving models, got "
                f"{type(scheduler).__name__} with `prediction_type={scheduler.config.get('prediction_type')!r}`."
            )
        origin, tables = copy.copy(scheduler), {}
        for steps in np.atleast_1d(num_inference_steps).tolist():
            origin.set_timesteps(steps)
            if origin.sigmas[-1] > 0 or origin.init_noise_sigma != 1:
                raise ValueError(
                    "`scheduler` must go from pure noise to clean data with model calls alone, got "
                    f"`final_sigmas_type={origin.config.final_sigmas_type!r}` and "
                    f"`analytical_first_step={origin.config.analytical_first_step}`."
                )
            rows = [origin.corrected_row(index) for index in range(steps)]
            tables[str(steps)] = as_table(origin._host_timesteps, rows, origin.data_form)
        return cls._from_tables(scheduler.config, tables)

    @classmethod
    def from_ddim(
        cls, scheduler: SchedulerMixin, num_inference_steps: int | Sequence[int], eta: float = 0.0
    ) -> "GGDMScheduler":
        """
        DDIM (Song et al., 2021) at the timesteps of another scheduler.

        Args:
            scheduler ([`SchedulerMixin`]):
                Whose configuration and timesteps are taken: any of diffusers or of this package that visits integer
                timesteps of a variance-preserving model.
            num_inference_steps (`int` or `Sequence[int]`):
                The numbers of model calls to make tables for.
            eta (`float`, defaults to 0.0):
                η in [0, 1]: 0 is deterministic, 1 is DDPM with the posterior's variance.

        Raises:
            ValueError: If `eta` is outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, got {eta}.")
        if scheduler.config.get("prediction_type", "epsilon") not in cls.prediction_types:
            raise ValueError(
                f"`scheduler` must have a `prediction_type` of {', '.join(cls.prediction_types)}, got "
                f"{scheduler.config['prediction_type']!r}."
            )
        tables, process = {}, cls.process_class.from_config(scheduler.config)
        for steps in np.atleast_1d(num_inference_steps).tolist():
            visited = copy.copy(scheduler)
            visited.set_timesteps(steps)
            timesteps = visited.timesteps.tolist()
            alphas, sigmas = np.append(process.alpha(timesteps), 1.0), np.append(process.sigma(timesteps), 0.0)
            levels = zip(alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:], strict=True)
            tables[str(steps)] = as_table(timesteps, [ddim_row(*level, eta) for level in levels], data_form=True)
        return cls._from_tables(scheduler.config, tables)

    @classmethod
    def _from_tables(cls, config, tables: dict[str, dict[str, Any]]) -> "GGDMScheduler":
        learned = cls.from_config(config, tables=tables)
        for steps, table in tables.items():
            learned._check_table(int(steps), table)
        return learned

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None):
        if timesteps is not None or sigmas is not None:
            raise ValueError(
                "`num_inference_steps` is all that a learned sampler can be asked for: its timesteps are learned, got "
                f"{f'`timesteps={timesteps}`' if sigmas is None else f'`sigmas={sigmas}`'}."
            )
        super().set_timesteps(num_inference_steps, device)

    set_timesteps.__doc__ = TableScheduler.set_timesteps.__doc__

    def learned_table(self, num_inference_steps: int) -> dict:
        tables = {int(steps): table for steps, table in (self.config.tables or {}).items()}
        if num_inference_steps not in tables:
            learned = ", ".join(map(str, sorted(tables))) or "none: the configuration has no `tables`"
            raise ValueError(
                f"`num_inference_steps` must be one that was learned ({learned}), got {num_inference_steps!r}."
            )
        table = tables[num_inference_steps]
        self._check_table(num_inference_steps, table)
        return table

    def _check_table(self, steps: int, table: dict):
        timesteps, process = np.asarray(table["timesteps"], dtype=np.float64), self.process
        low, high = process.timestep_min, process.timestep_max
        if (
            timesteps.shape != (steps,)
            or np.any(np.diff(timesteps) >= 0)
            or timesteps[0] > high
            or timesteps[-1] < low
        ):
            raise ValueError(
                f"`tables` must have {steps} strictly decreasing timesteps between {high:g} and {low:g} for {steps} "
                f"model calls, got {table['timesteps']}."
            )
        for name in WEIGHED:
            rows = table.get(name, [[]] * steps)
            if len(rows) != steps or any(len(row) > index + 1 for index, row in enumerate(rows)):
                raise ValueError(
                    f"`tables` must weigh {name!r} in each of {steps} steps, at most back to the first one, got rows "
                    f"of {[len(row) for row in rows]} weights."
                )
        noise = table.get("noise", [0.0] * steps)
        if len(noise) != steps or min(noise) < 0:
            raise ValueError(f"`tables` must have {steps} values of 'noise', none negative, got {noise}.")

    @property
    def _end_is_noisy(self) -> bool:
        return False

    @property
    def data_form(self) -> bool:
        return self._learned.get("data_form", False)

    def _build(self, begin: int):
        rows = [self.row(index, known=0) for index in range(len(self._host_timesteps))]
        for index, row in enumerate(rows[begin:], start=begin):
            furthest = max((lag for _, lag in row), default=0)
            if furthest > index - begin:
                raise ValueError(
                    f"This run cannot start at step {begin}: its step {index} weighs what was seen at step "
                    f"{index - furthest}. Start at step 0, or use a scheduler or table without such weights."
                )
        if self._term != "slope" and any(what == "slope" for row in rows for what, _ in row):
            raise ValueError("This table weighs slopes: `attach` their source before `set_timesteps`.")
        super()._build(begin)

    def row(self, index: int, known: int) -> Row:
        table = self._learned
        row = {
            (what, lag): weight
            for what in WEIGHED
            if what in table
            for lag, weight in enumerate(table[what][index])
            if weight != 0.0
        }
        sigma = table["noise"][index] if "noise" in table else 0.0
        return row | {("noise", 0): sigma} if sigma else row

    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """
        α_k and σ_k of x_k = α_k x_0 + σ_k z, k = K … 0, that the sampler has when every prediction is x_0.

        A model meets at x_k what it was trained on where they are those of its process at t_k, which are
        `self.alphas` and `self.noise_stds`. DDPM and DDIM have that property; a learned sampler need not.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Two arrays of shape `(num_inference_steps + 1,)`.
        """
        steps = len(self.table)
        alphas, covariance = np.zeros(steps + 1), np.zeros((steps + 1, steps + 1))
        alphas[0], covariance[0, 0] = self.alphas[0], self.noise_stds[0] ** 2
        for index, row in enumerate(self.table):
            weights, of_data = np.zeros(steps + 1), 0.0
            for (what, lag), weight in row.items():
                point = index - lag
                if what == "sample":
                    weights[point] += weight
                elif what == "prediction" and self.data_form:
                    of_data += weight
                elif what == "prediction":  # ε = (x − α x_0)/σ; the slope of a single data point is zero
                    weights[point] += weight / self.noise_stds[point]
                    of_data -= weight * self.alphas[point] / self.noise_stds[point]
            alphas[index + 1] = weights @ alphas + of_data
            covariance[index + 1] = covariance[:, index + 1] = covariance @ weights
            covariance[index + 1, index + 1] = weights @ covariance @ weights + row.get(("noise", 0), 0.0) ** 2
        return alphas, np.sqrt(covariance.diagonal())


def ddim_row(alpha: float, sigma: float, alpha_next: float, sigma_next: float, eta: float) -> Row:
    """
    The weights of x_k, x̂_0 and noise in a step of DDIM, Eq. (12) and (16) of Song et al. (2021).

    The noise has η times the standard deviation of the DDPM posterior, σ_k² = η² (σ_next²/σ²)(1 − α²/α_next²).
    """
    noise = eta * sigma_next / sigma * np.sqrt((1.0 - alpha / alpha_next) * (1.0 + alpha / alpha_next))
    direction = np.sqrt((sigma_next - noise) * (sigma_next + noise)) / sigma
    row = {("sample", 0): direction, ("prediction", 0): alpha_next - direction * alpha, ("noise", 0): noise}
    return {column: float(weight) for column, weight in row.items()}


def as_table(timesteps: Sequence[float], rows: Sequence[Row], data_form: bool) -> dict[str, Any]:
    """The entry of the configuration key `tables` that has these rows."""
    visited = [int(timestep) if timestep == int(timestep) else float(timestep) for timestep in timesteps]
    table: dict[str, Any] = {"timesteps": visited, "data_form": data_form}

    def weights_of(what: str, row: dict[Column, Any]) -> list[float]:
        lags = [lag for name, lag in row if name == what]
        return [float(row.get((what, lag), 0.0)) for lag in range(max(lags, default=-1) + 1)]

    for what in WEIGHED:
        if any(name == what for row in rows for name, _ in row):
            table[what] = [weights_of(what, row) for row in rows]
    table["noise"] = [float(row.get(("noise", 0), 0.0)) for row in rows]
    return table
