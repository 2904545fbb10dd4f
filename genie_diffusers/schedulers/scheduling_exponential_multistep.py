"""The analytic multistep solvers of diffusion models, deterministic and stochastic, in one scheduler."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..core.solvers.adams_bashforth import gradient_estimation, ipndm, lms
from ..core.solvers.ddim import ddim
from ..core.solvers.deis import deis
from ..core.solvers.dpmpp import dpmpp
from ..core.solvers.er_sde import er_sde
from ..core.solvers.res import res
from ..core.solvers.sa_solver import sa_solver, sa_solver_correction
from ..core.solvers.unipc import unipc, unipc_correction
from ..core.table import Levels, Row
from .scheduling_gaussian_diffusion import GaussianDiffusionScheduler

#: runs of so many steps and more end at full order where diffusers' DPM-Solver++ and DEIS do
MANY_STEPS = 15
#: the part of all timesteps in which SA-Solver adds noise
NOISY_PART = (0.2, 0.8)


class MultistepSolver(NamedTuple):
    """
    What a name of `solver` stands for.

    Args:
        row (`Callable`): `row(levels, index, known, …)`.
        order (`int`, *optional*): Its argument `order`.
        options (mapping): Its other arguments.
        correction (`Callable`, *optional*): `correction(levels, index, known, predictor, …)`, with the same arguments.
        lowers (`str`, *optional*):
            Whether `lower_order_final` lowers its order: `"always"`, in `"few"` steps, or that of the `"predictor"`.
        noise (`str`, *optional*): The argument that is `eta`.
        eta (`float`): Its default.
    """

    row: Callable
    order: int | None = None
    options: Mapping[str, Any] = {}
    correction: Callable | None = None
    lowers: str | None = None
    noise: str | None = None
    eta: float = 0.0


MULTISTEP_SOLVERS = {
    "ddim": MultistepSolver(ddim, noise="eta"),
    "dpmpp_2m": MultistepSolver(dpmpp, 2, lowers="few"),
    "dpmpp_2m_heun": MultistepSolver(dpmpp, 2, {"variant": "heun"}, lowers="few"),
    "dpmpp_3m": MultistepSolver(dpmpp, 3, lowers="few"),
    "dpmpp_2m_sde": MultistepSolver(dpmpp, 2, lowers="few", noise="tau", eta=1.0),
    "dpmpp_3m_sde": MultistepSolver(dpmpp, 3, lowers="few", noise="tau", eta=1.0),
    "unipc_1": MultistepSolver(unipc, 1, correction=unipc_correction, lowers="always"),
    "unipc_2": MultistepSolver(unipc, 2, correction=unipc_correction, lowers="always"),
    "unipc_3": MultistepSolver(unipc, 3, correction=unipc_correction, lowers="always"),
    "unipc_1_bh1": MultistepSolver(unipc, 1, {"variant": "bh1"}, unipc_correction, lowers="always"),
    "unipc_2_bh1": MultistepSolver(unipc, 2, {"variant": "bh1"}, unipc_correction, lowers="always"),
    "unipc_3_bh1": MultistepSolver(unipc, 3, {"variant": "bh1"}, unipc_correction, lowers="always"),
    "deis_1": MultistepSolver(deis, 1, lowers="few"),
    "deis_2": MultistepSolver(deis, 2, lowers="few"),
    "deis_3": MultistepSolver(deis, 3, lowers="few"),
    "ipndm_1": MultistepSolver(ipndm, 1),
    "ipndm_2": MultistepSolver(ipndm, 2),
    "ipndm_3": MultistepSolver(ipndm, 3),
    "ipndm_4": MultistepSolver(ipndm, 4),
    "lms_1": MultistepSolver(lms, 1),
    "lms_2": MultistepSolver(lms, 2),
    "lms_3": MultistepSolver(lms, 3),
    "lms_4": MultistepSolver(lms, 4),
    "res_2m": MultistepSolver(res, 2, noise="tau"),
    "res_3m": MultistepSolver(res, 3, noise="tau"),
    "er_sde_1": MultistepSolver(er_sde, 1),
    "er_sde_2": MultistepSolver(er_sde, 2),
    "er_sde_3": MultistepSolver(er_sde, 3),
    "sa_solver_2": MultistepSolver(
        sa_solver, 2, correction=sa_solver_correction, lowers="predictor", noise="tau", eta=1.0
    ),
    "sa_solver_3": MultistepSolver(
        sa_solver, 3, correction=sa_solver_correction, lowers="predictor", noise="tau", eta=1.0
    ),
    "gradient_estimation": MultistepSolver(gradient_estimation),
}


class ExponentialMultistepScheduler(GaussianDiffusionScheduler):
    """
    The solvers that need nothing but the model's last predictions, on every path and for every `prediction_type`.

    | `solver` | what it is |
    |---|---|
    | `"ddim"` | DDIM, the first order of all below but UniPC and ER-SDE; with `eta` stochastic |
    | `"dpmpp_2m"`, `"dpmpp_3m"` | DPM-Solver++; `"dpmpp_2m_heun"` is diffusers' `solver_type="heun"` |
    | `"dpmpp_2m_sde"`, `"dpmpp_3m_sde"` | SDE-DPM-Solver++, stochastic |
    | `"unipc_1"`, `"unipc_2"`, `"unipc_3"` | UniPC with its corrector and B(h) = e^h − 1; with `_bh1` behind, h |
    | `"deis_1"`, `"deis_2"`, `"deis_3"` | DEIS in log γ |
    | `"ipndm_1"` to `"ipndm_4"` | iPNDM |
    | `"lms_1"` to `"lms_4"` | Adams–Bashforth in γ, diffusers' `LMSDiscreteScheduler` |
    | `"res_2m"`, `"res_3m"` | RES multistep; with `eta` stochastic |
    | `"er_sde_1"`, `"er_sde_2"`, `"er_sde_3"` | ER-SDE, stochastic, with the noise scale that its paper recommends |
    | `"sa_solver_2"`, `"sa_solver_3"` | SA-Solver, stochastic, with its corrector |
    | `"gradient_estimation"` | gradient estimation with γ = 2 |

    Papers and equations stand with each in `core/solvers`. Every one calls the model once a step.

    The last step, to clean data, is x_0 itself, but for iPNDM and LMS, whose polynomials reach there. Where diffusers
    has the solver, the pictures are the same at the same noise levels, except that

    - diffusers' DEIS and SA-Solver stop at the smallest noise level, as `final_sigmas_type="sigma_min"` does here;
    - its UniPC with `"bh1"` has no step to clean data;
    - its SDE-DPM-Solver++ of third order has a wrong sign in the weight of the second difference.

    `from_config` of another scheduler takes over the model: noise schedule, path, prediction, timesteps and
    `lower_order_final`. It chooses no solver: that of a UniPC, DEIS or DPM-Solver++ configuration, its order and its
    `solver_type` stay behind, and `solver` is the default unless it is given.

    Args:
        solver (`str`, defaults to `"unipc_2"`):
            One of the above.
        eta (`float`, *optional*):
            How much noise is added. 0 is the ODE, 1 the reverse SDE, which of `"ddim"` is the DDPM posterior. In
            between, and above, η of DDIM (at most 1) multiplies the standard deviation of a step's noise, and that of
            the others the noise of the SDE (τ of SA-Solver, which adds it from 80% to 20% of the timesteps). Default:
            1 for `"dpmpp_2m_sde"`, `"dpmpp_3m_sde"`, `"sa_solver_2"` and `"sa_solver_3"`, 0 for `"ddim"`, `"res_2m"`
            and `"res_3m"`. The others have no such option.
        lower_order_final (`bool`, defaults to `True`):
            Lower the order towards the last step, to at most the number of steps that are left: for UniPC and
            SA-Solver, and in runs of fewer than 15 steps for DPM-Solver++ and DEIS, as diffusers does. It means
            nothing to the others.

    All other arguments are those of [`GaussianDiffusionScheduler`].

    Raises:
        ValueError: For a solver that does not exist, or an `eta` that the solver does not have.
    """

    choices = {"solver": tuple(MULTISTEP_SOLVERS)}

    def __init__(self, solver: str = "unipc_2", eta: float | None = None, lower_order_final: bool = True, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        solver = config_dict.get("solver")
        if solver is None or kwargs.get("solver", solver) != solver:  # it is that of another one
            config_dict = {key: value for key, value in config_dict.items() if key != "eta"}
        return super().extract_init_dict(config_dict, **kwargs)

    def _check_config(self):
        super()._check_config()
        name, eta = self.config["solver"], self.config["eta"]
        stochastic = [other for other, solver in MULTISTEP_SOLVERS.items() if solver.noise is not None]
        if eta and name not in stochastic:
            raise ValueError(
                f"`eta` must be `None` for `solver={name!r}`, which has no such option, got {eta}; "
                f"{', '.join(stochastic)} have one."
            )
        if eta is not None and not 0 <= eta <= (1 if name == "ddim" else float("inf")):
            limits = "between 0 and 1 for `solver='ddim'`" if name == "ddim" else "at least 0"
            raise ValueError(f"`eta` must be {limits}, got {eta}.")

    def row(self, levels: Levels, index: int, known: int) -> Row:
        return self._solver.row(levels, index, known, **self._options(levels, index))

    def correction(self, levels: Levels, index: int, known: int, predictor: Row) -> Row:
        solver = self._solver
        if solver.correction is None or known == 1:
            return {}
        options = self._options(levels, index - 1)
        if solver.lowers == "predictor":
            options["order"] = solver.order
        return solver.correction(levels, index, known, predictor, **options)

    @property
    def _solver(self) -> MultistepSolver:
        return MULTISTEP_SOLVERS[self.config["solver"]]

    def _options(self, levels: Levels, index: int) -> dict[str, Any]:
        """The options of the step from point `index`."""
        solver, options = self._solver, dict(self._solver.options)
        if solver.order is not None:
            left = len(levels) - index
            lowers = solver.lowers is not None and (solver.lowers != "few" or len(levels) < MANY_STEPS)
            lowers = lowers and self.config["lower_order_final"]
            options["order"] = min(solver.order, left) if lowers else solver.order
        if solver.noise is not None:
            eta = solver.eta if self.config["eta"] is None else self.config["eta"]
            share = levels.timesteps[index] / self.config["num_train_timesteps"]
            noisy = solver.row is not sa_solver or NOISY_PART[0] <= share <= NOISY_PART[1]
            options[solver.noise] = eta if noisy else 0.0
        return options
