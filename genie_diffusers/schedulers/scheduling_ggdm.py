"""GGDM: samplers that are learned (Watson, Chan, Ho & Norouzi, 2022, https://huggingface.co/papers/2202.05830)."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..core.engine import SOURCED
from ..core.parametrisation import PREDICTION_TYPES
from ..core.solvers.ddim import ddim
from ..core.table import Levels, Table, build, entries
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler


class GGDMScheduler(GaussianDiffusionScheduler):
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
        tables (`dict`, *optional*):
            Samplers by the number of model calls, see [`TableScheduler`]. Others cannot be asked for.

    All other arguments are those of [`GaussianDiffusionScheduler`]; grids, spacings and ends mean nothing here.
    """

    inherits_tables = True

    @classmethod
    def from_scheduler(
        cls,
        scheduler: GaussianDiffusionScheduler,
        num_inference_steps: int | Sequence[int],
        mu: float | None = None,
    ) -> "GGDMScheduler":
        """
        The sampler that `scheduler` is, correctors included, as tables.

        Args:
            scheduler ([`GaussianDiffusionScheduler`]):
                A scheduler of this package, with its slope source attached if it has one. Attach it to the result as
                well.
            num_inference_steps (`int` or `Sequence[int]`):
                The numbers of model calls to make tables for.
            mu (`float`, *optional*):
                As in `set_timesteps`, for schedulers with `use_dynamic_shifting`.

        Raises:
            ValueError:
                If `scheduler` is of another kind, does not end at clean data (`final_sigmas_type="sigma_min"`) or
                scales the initial noise (`analytical_first_step=True`).
        """
        if not isinstance(scheduler, GaussianDiffusionScheduler):
            raise ValueError(
                "`scheduler` must be a scheduler of this package for variance-preserving or flow-matching models, got "
                f"{type(scheduler).__name__} with `prediction_type={scheduler.config.get('prediction_type')!r}`."
            )
        origin, tables = copy.copy(scheduler), {}
        for steps in np.atleast_1d(num_inference_steps).tolist():
            origin.set_timesteps(steps, mu=mu)
            if origin.sigmas[-1] > 0 or origin.init_noise_sigma != 1:
                raise ValueError(
                    "`scheduler` must go from pure noise to clean data with model calls alone, got "
                    f"`final_sigmas_type={origin.config.final_sigmas_type!r}` and "
                    f"`analytical_first_step={origin.config.analytical_first_step}`."
                )
            tables[str(steps)] = origin.table.fold().to_dict()
        return cls._from_tables(scheduler.config, tables)

    @classmethod
    def from_ddim(
        cls,
        scheduler: SchedulerMixin,
        num_inference_steps: int | Sequence[int],
        eta: float = 0.0,
        mu: float | None = None,
    ) -> "GGDMScheduler":
        """
        DDIM (Song et al., 2021) at the timesteps of another scheduler.

        Args:
            scheduler ([`SchedulerMixin`]):
                Whose configuration and timesteps are taken: any of diffusers or of this package that visits timesteps
                of a variance-preserving or flow-matching model.
            num_inference_steps (`int` or `Sequence[int]`):
                The numbers of model calls to make tables for.
            eta (`float`, defaults to 0.0):
                η in [0, 1]: 0 is deterministic, 1 is DDPM with the posterior's variance.
            mu (`float`, *optional*):
                As in `set_timesteps`, for schedulers with `use_dynamic_shifting`.

        Raises:
            ValueError: If `eta` is outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, got {eta}.")
        if scheduler.config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
            raise ValueError(
                f"`scheduler` must have a `prediction_type` of {', '.join(PREDICTION_TYPES)}, got "
                f"{scheduler.config['prediction_type']!r}."
            )
        tables, process = {}, cls.from_config(scheduler.config).process
        for steps in np.atleast_1d(num_inference_steps).tolist():
            visited = copy.copy(scheduler)
            visited.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
            timesteps = np.array(visited.timesteps.tolist(), dtype=np.float64)
            alphas, sigmas = np.append(process.alpha(timesteps), 1.0), np.append(process.sigma(timesteps), 0.0)
            levels = Levels(timesteps, alphas, sigmas, process)
            tables[str(steps)] = build(levels, partial(ddim, eta=eta)).to_dict()
        return cls._from_tables(scheduler.config, tables)

    @classmethod
    def _from_tables(cls, config, tables: dict[str, dict[str, Any]]) -> "GGDMScheduler":
        learned = cls.from_config(config, tables=tables)
        for steps, entry in tables.items():
            Table.from_dict(entry, learned.process, int(steps))
        return learned

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        if sigmas is not None and self.is_default_ramp(sigmas):
            num_inference_steps, sigmas = len(sigmas), None
        if timesteps is not None or sigmas is not None:
            raise ValueError(
                "`num_inference_steps` is all that a learned sampler can be asked for: its timesteps are learned, got "
                f"{f'`timesteps={timesteps}`' if sigmas is None else f'`sigmas={sigmas}`'}."
            )
        super().set_timesteps(num_inference_steps, device, mu=mu)

    set_timesteps.__doc__ = GaussianDiffusionScheduler.set_timesteps.__doc__

    def learned_table(self, num_inference_steps: int) -> Table:
        tables = {int(steps): entry for steps, entry in entries(self.config["tables"]).items()}
        if num_inference_steps not in tables:
            learned = ", ".join(map(str, sorted(tables))) or "none: the configuration has no `tables`"
            raise ValueError(
                f"`num_inference_steps` must be one that was learned ({learned}), got {num_inference_steps!r}."
            )
        return Table.from_dict(tables[num_inference_steps], self.process, num_inference_steps)

    def _follows(self, begin: int) -> bool:
        missing = self._learned.needs() & set(SOURCED) - {self._term}
        if missing:
            raise ValueError(
                f"This table weighs {' and '.join(f'{term}s' for term in sorted(missing))}: `attach` their source "
                "before `set_timesteps`."
            )
        reach = self._learned.reaches_before(begin)
        if reach is not None:
            raise ValueError(
                f"This run cannot start at step {begin}: its step {reach[0]} weighs what was seen at step {reach[1]}. "
                "Start at step 0, or use a scheduler or table without such weights."
            )
        return True

    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """[`Table.marginals`] of the run."""
        return self.table.marginals()
