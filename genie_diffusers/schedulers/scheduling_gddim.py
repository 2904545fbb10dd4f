"""gDDIM: DDIM for every linear diffusion (Zhang, Tao & Chen, 2023, https://huggingface.co/papers/2206.05564)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.gddim import gddim, gddim_correction, square_root
from ..core.table import Levels, Row, Table, product
from ..processes import Blurring, CriticallyDampedLangevin, VariancePreserving
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler
from .scheduling_utils import TableScheduler

INTERPOLATIONS = ("timestep", "log_snr")
PARAMETRIZATIONS = ("R", "L")
MULTISTEP_ORDERS = (1, 2, 3, 4)


class _GDDIM(TableScheduler):
    """The rows of gDDIM, for whatever diffusion."""

    choices = {"interpolation": INTERPOLATIONS, "multistep_order": MULTISTEP_ORDERS}

    def __init__(
        self,
        multistep_order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        interpolation: str = "timestep",
        **kwargs,
    ):
        super().__init__(**kwargs)

    def _check_config(self):
        super()._check_config()
        if not self.config["eta"] >= 0:
            raise ValueError(f"`eta` must not be negative, got {self.config['eta']}.")
        if self.config["eta"] > 0 and (self.config["multistep_order"] > 1 or self.config["corrector"]):
            raise ValueError(
                f"`eta` must be 0 unless `multistep_order=1` and `corrector=False`, got `eta={self.config['eta']}`, "
                f"`multistep_order={self.config['multistep_order']}` and `corrector={self.config['corrector']}`."
            )

    def row(self, levels: Levels, index: int, known: int) -> Row:
        corrector, eta = self.config["corrector"], self.config["eta"]
        return gddim(levels, index, known, corrector=corrector, eta=eta, **self._options())

    def correction(self, levels: Levels, index: int, known: int, predictor: Row) -> Row:
        if not self.config["corrector"]:
            return {}
        return gddim_correction(levels, index, known, predictor, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "order": self.config["multistep_order"],
            "interpolation": self.config["interpolation"],
            "parametrization": self.config.get("parametrization", "R"),
        }


class LinearDiffusionScheduler(_GDDIM):
    """
    gDDIM for any [`LinearDiffusion`]: the subclass of a new process names it as its `process_class`.

    A step from time t to s multiplies the state by the transition Ψ(s, t) and adds the integral of Eq. (10) over a
    polynomial through the predictions that are known,

        u_s = Ψ(s, t) u_t + Σ_j C_j ε_j,   C_j = ∫_t^s ½ Ψ(s, τ) G Gᵀ K^{−T} ℓ_j(τ) dτ                  (Eq. 19)

    with the Lagrange polynomials ℓ_j. Of order 1 with K = R this is u_s = Ψ u_t + (R_s − Ψ R_t) ε. The model returns
    the ε that belongs to R, whichever K the solver uses.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            N; models are called with t = (N − 1)·τ.
        multistep_order (`int`, defaults to 2):
            Order of the deterministic predictor, 1 to 4: so many of the latest predictions are interpolated.
        corrector (`bool`, defaults to `False`):
            Correct every arrival with the prediction made there, at no further model call, which raises the order by
            one. The paper calls the model once more at the corrected state; here, as in UniPC, it is not.
        eta (`float`, defaults to 0.0):
            Strength of the stochastic sampler, the paper's λ, not negative: 0 is the probability-flow ODE, 1 the
            reverse SDE. For variance-preserving processes 1 is the DDPM posterior. It needs `multistep_order=1` and no
            corrector.
        interpolation (`str`, defaults to `"timestep"`):
            The variable of the polynomials: `"timestep"`, as in the paper, or `"log_snr"`, λ = log(α/σ) of the
            pictures.
        denoising_step (`bool`, defaults to `True`):
            As in [`TableScheduler`]; the paper's sampler ends with it.

    All other arguments are those of [`TableScheduler`].

    Raises:
        ValueError: By `set_timesteps`, for an option that does not exist.
    """

    def __init__(self, denoising_step: bool = True, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        if isinstance(config, Mapping) and "beta_schedule" in config:
            raise ValueError(
                f"`config` must describe a model of {cls.process_class.__name__}, got that of a variance-preserving "
                f"one (`beta_schedule={config['beta_schedule']!r}`), which `GDDIMScheduler` samples."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # The weights depend on the timestep, so that it has no default.
    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """What the model sees of the state `sample`: the state itself, unless the model is preconditioned."""
        if not self._preconditioned:
            return sample
        self.process.check_state(sample)
        return self._plan.apply("model_input", self._locate(timestep), sample=sample).to(sample.dtype)

    @property
    def _preconditioned(self) -> bool:
        return self.config.get("preconditioned", False)

    def _build(self, begin: int):
        super()._build(begin)
        if self._preconditioned:
            scaling, _, _ = self.process.preconditioning(self.levels.timesteps)
            self._plan.add_rows("model_input", [{("sample", 0): weight} for weight in scaling])

    def _conversion(self) -> "_ToRoot":
        return _ToRoot(self.process, self._preconditioned, self._options()["parametrization"])

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **kwargs):
        self.process.check_state(sample)
        return super().step(model_output, timestep, sample, generator, return_dict, **kwargs)

    step.__doc__ = TableScheduler.step.__doc__


class _ToRoot:
    """The model's output → the ε of the solver's root K. Rows weigh ε and nothing is clipped: nobody asks for x_0."""

    def __init__(self, process, preconditioned: bool, parametrization: str):
        self.process, self.preconditioned, self.parametrization = process, preconditioned, parametrization

    def conversions(self, table: Table) -> tuple[list[Row], list[Row]]:
        to_noise = [self._to_noise(float(timestep)) for timestep in table.timesteps]
        return to_noise, [{("sample", 0): 1.0}] * len(to_noise)

    def _to_noise(self, start: float) -> Row:
        weights: Row = {("output", 0): 1.0}
        if self.preconditioned:
            _, of_sample, of_output = self.process.preconditioning(start)
            weights = {("sample", 0): of_sample, ("output", 0): of_output}
        if self.parametrization == "R":
            return weights
        # the same score: K^{−T} ε_K = R^{−T} ε_R
        root = square_root(self.process, start, self.parametrization)
        change = np.linalg.solve(self.process.root(start), root).swapaxes(-1, -2)
        return {term: product(change, weight) for term, weight in weights.items()}


class GDDIMScheduler(_GDDIM, GaussianDiffusionScheduler):
    """
    gDDIM for variance-preserving and flow-matching models, a drop-in for any checkpoint.

    Of order 1 it is DDIM, of higher orders DEIS (Zhang & Chen, 2023), in λ the one that diffusers has. A stochastic
    step adds noise of the variance σ_s² (1 − (γ_s/γ_t)^{2η²}), γ = σ/α: the DDPM posterior at `eta=1`, and equal to
    DDIM's η at 0 and 1 only.

    Args:
        multistep_order (`int`, defaults to 2), corrector (`bool`, defaults to `False`),
        eta (`float`, defaults to 0.0):
            As in [`LinearDiffusionScheduler`].
        interpolation (`str`, defaults to `"log_snr"`):
            The variable of the polynomials, `"timestep"` (the paper's) or `"log_snr"`.

    All other arguments are those of [`GaussianDiffusionScheduler`].
    """

    process_class = VariancePreserving

    def __init__(self, interpolation: str = "log_snr", **kwargs):
        super().__init__(**kwargs)


class GDDIMCLDScheduler(LinearDiffusionScheduler):
    """
    gDDIM for critically-damped Langevin diffusion ([`CriticallyDampedLangevin`]), on states of channels `[x, v]`.

    Args:
        langevin_beta (`float`, defaults to 4.0), friction (`float`, defaults to 1.0),
        initial_velocity_variance (`float`, defaults to 0.04):
            The process, see [`CriticallyDampedLangevin`].
        parametrization (`str`, defaults to `"R"`):
            The root K of the covariance in which the solver takes ε as a polynomial: `"R"`, gDDIM's, or `"L"`, the
            Cholesky factor, for comparison: there ε turns with time even for a single data point.
        preconditioned (`bool`, defaults to `False`):
            Whether what the model sees and returns is that of [`~CriticallyDampedLangevin.preconditioning`], as
            `training/train_diffusion.py` trains it, instead of `[x, v]` and the ε of R. `scale_model_input` and `step`
            convert.

    All other arguments are those of [`LinearDiffusionScheduler`].
    """

    process_class = CriticallyDampedLangevin
    choices = {"parametrization": PARAMETRIZATIONS}

    def __init__(
        self,
        langevin_beta: float = 4.0,
        friction: float = 1.0,
        initial_velocity_variance: float = 0.04,
        parametrization: str = "R",
        preconditioned: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)


class GDDIMBlurringScheduler(LinearDiffusionScheduler):
    """
    gDDIM for blurring diffusion ([`Blurring`]): the weights act on the frequencies of the pictures.

    Args:
        sample_size (`int` or pair of `int`, defaults to 32):
            Height and width of the pictures, of any parity.
        blur_sigma (`float`, defaults to 10.0), blur_minimum (`float`, defaults to 0.001):
            The process, see [`Blurring`].
        preconditioned (`bool`, defaults to `False`):
            Whether what the model returns is that of [`~Blurring.preconditioning`], as `training/train_diffusion.py`
            trains it, instead of ε.

    All other arguments are those of [`LinearDiffusionScheduler`].
    """

    process_class = Blurring

    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        blur_sigma: float = 10.0,
        blur_minimum: float = 0.001,
        preconditioned: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
