"""GENIE from data to noise: the probability-flow ODE of `GenieScheduler`, solved the other way."""

from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.hermite_inverse import hermite_inverse, hermite_inverse_correction
from ..core.solvers.taylor import taylor
from ..core.table import Levels, Row, Table, entries
from .scheduling_genie import GenieScheduler


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

    Where `tables` has rows for the number of model calls, and nothing is attached, these are followed instead. They
    were learned (`training/train_encoding.py`) so that `GenieScheduler.from_config(encoder.config)` finds back to the
    data. With a [`StepHead`] the points are those of its tables.

    A decoder loses what it cannot restore in its last step to clean data, and what its first step from pure noise does
    is known only from the noise. Round trips are therefore closest with `final_sigmas_type="sigma_min"`, which takes
    data to be at the smallest noise level, and `analytical_first_step=True`, which is undone exactly, as a part of the
    last step here; on `time_grid="uniform_lambda"`, which has short steps near the data.

    Args:
        tables (`dict`, *optional*):
            As in [`TableScheduler`]. `"learned_for"` of an entry holds what else of the configuration it was learned
            for.

    All other arguments are those of [`GenieScheduler`].
    """

    encodes = True

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # the key that earlier versions wrote
        if "encoding" in kwargs:
            kwargs["tables"] = kwargs.pop("encoding")
        config_dict = dict(config_dict)
        encoding = config_dict.pop("encoding", None)
        if encoding is not None:
            config_dict["tables"] = encoding
        return super().extract_init_dict(config_dict, **kwargs)

    def learned_table(self, num_inference_steps: int) -> Table | None:
        """That of an attached [`StepHead`], whose points are visited backwards."""
        entry = (getattr(self._slope_source, "tables", None) or {}).get(str(num_inference_steps))
        return None if entry is None else Table.from_dict(entry, self.process, num_inference_steps)

    def _levels_for(self, num_inference_steps, timesteps, sigmas) -> Levels:
        levels = super()._levels_for(num_inference_steps, timesteps, sigmas)
        # The analytical first step scales the noise that a decoder is given.
        self._noise_scale, self.init_noise_sigma = self.init_noise_sigma, 1.0
        visited = np.append(levels.timesteps, self.process.timestep_min)[:0:-1]
        return Levels(visited, levels.alphas[::-1], levels.sigmas[::-1], levels.path)

    def _build(self, begin: int):
        entry = entries(self.config.get("tables")).get(str(len(self.levels)))
        self._learned = None
        if entry is not None and begin == 0 and self._slope_source is None:
            self._learned = self._checked(Table.from_dict(entry, self.process, len(self.levels)))
        super()._build(begin)

    def _checked(self, learned: Table) -> Table:
        """Raise a `ValueError` if these rows are for other points, or for another decoder."""
        gammas = np.asarray(learned.sigmas) / np.asarray(learned.alphas)
        options = learned.learned_for or {}
        others = {key: value for key, value in options.items() if self.config.get(key) != value}
        if others or not np.allclose(gammas, self.levels.gammas, rtol=1e-4):
            raise ValueError(
                f"`tables` was learned for {len(learned)} model calls at the noise levels {gammas.tolist()} with "
                f"{dict(options)}; this run has {len(self.levels)} calls at {self.levels.gammas.tolist()} with "
                f"{ {key: self.config.get(key) for key in others} }. Keep the configuration that it was learned for, "
                "or set `tables=None`."
            )
        return learned

    def _model_levels(self) -> tuple[Any, Any]:
        # Clean data are said to be at the smallest timestep.
        path, alphas, sigmas = self.process, self.alphas[:-1].copy(), self.noise_stds[:-1].copy()
        clean = sigmas == 0
        alphas[clean], sigmas[clean] = path.alpha(path.timestep_min), path.sigma(path.timestep_min)
        return alphas, sigmas

    def row(self, levels: Levels, index: int, known: int) -> Row:
        if self.config["method"] == "taylor":
            row = taylor(levels, index, known, slopes=self._has_slopes)
        else:
            order = self.config["interpolation_order"]
            row = hermite_inverse(levels, index, known, order, slopes=self._has_slopes)
        scale = self._noise_scale if index + 1 == len(levels) else 1.0
        return {term: weight / scale for term, weight in row.items()}

    def correction(self, levels: Levels, index: int, known: int, predictor: Row) -> Row:
        if self.config["method"] == "taylor":
            return {}
        return hermite_inverse_correction(levels, index, known, predictor, slopes=self._has_slopes)
