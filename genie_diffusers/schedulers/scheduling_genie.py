"""GENIE: higher-order denoising diffusion solvers (Dockhorn, Vahdat & Kreis, 2022, https://huggingface.co/papers/2210.05475)."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.hermite import hermite, hermite_correction
from ..core.solvers.taylor import taylor
from ..core.table import Levels, Row
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler

METHODS = ("hermite", "taylor")


class GenieScheduler(GaussianDiffusionScheduler):
    """
    Higher-order solvers of the probability-flow ODE of diffusion and flow-matching models, with or without slopes.

    `method="taylor"` is the second truncated Taylor method of GENIE. In x̄ = x/α and γ = σ/α the ODE is
    dx̄/dγ = ε(x, t), and one step of length h in γ is

        x̄(γ + h) = x̄ + h ε + ½ h² dε/dγ

    where dε/dγ = −(1/γ) dε/dλ comes from a slope source (see [`~TableScheduler.attach`]): a distilled head, or exact
    forward-mode derivatives. Without a source the derivative is the finite difference of the last two predictions,
    which is the two-step Adams–Bashforth method.

    `method="hermite"` takes the data prediction D = (x − σ ε)/α to be a random function of λ, and integrates its mean
    given everything known of it, values and slopes dD/dλ = −(σ/α) dε/dλ at this point and earlier ones:

        x_{n+1} = (σ_{n+1}/σ_n) x_n + σ_{n+1} ∫ e^λ D(λ) dλ

    In short steps that is the polynomial through all conditions, and `interpolation_order`, their number, the order of
    this predictor; in long steps what is far away counts for less ([`core.solvers.hermite`]). When the model has been
    called at the new point, the step is corrected, at no further call, with values and slopes at both its ends, or
    without slopes with the values at both ends and at the point before. Without a source it is a multistep method of
    the family of DPM-Solver++ and UniPC.

    Learned `tables`, of the configuration or of the attached model's [`StepHead`], replace both methods for the
    numbers of model calls that they are for, time grid included. Every other number, custom timesteps, and runs that
    start mid-way where a table reaches back before its start, are solved.

    Either way the first step without a derivative, and the last one to clean data, are DDIM steps.

    Args:
        method (`str`, defaults to `"hermite"`):
            The solver: `"hermite"` or `"taylor"`.
        interpolation_order (`int`, defaults to 3):
            How many conditions the predictor of `method="hermite"` follows, 1 to 4, fewer while fewer are known: its
            order of convergence.

    All other arguments are those of [`GaussianDiffusionScheduler`].
    """

    choices = {"method": METHODS, "interpolation_order": (1, 2, 3, 4)}
    inherits_tables = True

    def __init__(self, method: str = "hermite", interpolation_order: int = 3, **kwargs):
        super().__init__(**kwargs)

    def row(self, levels: Levels, index: int, known: int) -> Row:
        if self.config["method"] == "taylor":
            return taylor(levels, index, known, slopes=self._has_slopes)
        return hermite(levels, index, known, self.config["interpolation_order"], slopes=self._has_slopes)

    def correction(self, levels: Levels, index: int, known: int, predictor: Row) -> Row:
        if self.config["method"] == "taylor":
            return {}
        return hermite_correction(levels, index, known, predictor, slopes=self._has_slopes)
