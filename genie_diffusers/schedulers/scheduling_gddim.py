"""gDDIM: DDIM for every linear diffusion (Zhang, Tao & Chen, 2023, https://huggingface.co/papers/2206.05564).

With a square root K of the covariance Σ and score = −K^{−T} ε, the probability-flow ODE is

    du/dt = F u + ½ G Gᵀ K^{−T} ε                                                                     (Eq. 10)

gDDIM is its exponential integrator for the root K = R with Ṙ = F R + ½ G Gᵀ R^{−T}, along which the ε of a single
data point is constant, so that a step of any length is exact for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (see scheduling_utils)

from ..processes import Blurring, CriticallyDampedLangevin, LinearDiffusion, VariancePreserving
from ..processes.linear_diffusion import inverse
from .interpolation import interpolation_weights
from .scheduling_utils import Column, Row, TableScheduler, _product

INTERPOLATIONS = ("timestep", "log_snr")
PARAMETRIZATIONS = ("R", "L")
MULTISTEP_ORDERS = (1, 2, 3, 4)

#: Gauss–Legendre points and weights of one panel
POINTS, QUADRATURE = np.polynomial.legendre.leggauss(32)
#: what the quadrature of a step may miss of the integral that is known, and in how many rounds panels are halved
TOLERANCE, HALVINGS = 1e-10, 8


class LinearDiffusionScheduler(TableScheduler):
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
        time_grid (`str`, defaults to `"quadratic"`):
            `"quadratic"` (even in √t, the paper's), `"linear"`, `"uniform_lambda"`, `"power_lambda"`,
            `"karras"` or `"beta"`.
        final_sigmas_type (`str`, defaults to `"zero"`):
            Where sampling ends: `"zero"`, clean data (the last model call is the final denoising step), or
            `"sigma_min"`, the smallest time of the process.
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

    Raises:
        ValueError: By `set_timesteps`, for an option that does not exist.
    """

    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        time_grid: str = "quadratic",
        final_sigmas_type: str = "zero",
        multistep_order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        interpolation: str = "timestep",
    ):
        super().__init__()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        foreign = "beta_schedule" not in cls.process_class.CONFIG_KEYS
        if foreign and isinstance(config, Mapping) and "beta_schedule" in config:
            raise ValueError(
                f"`config` must describe a model of {cls.process_class.__name__}, got that of a variance-preserving "
                f"one (`beta_schedule={config['beta_schedule']!r}`), which `GDDIMScheduler` samples."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _check_config(self):
        super()._check_config()
        for key, choices in (("interpolation", INTERPOLATIONS), ("multistep_order", MULTISTEP_ORDERS)):
            if self.config[key] not in choices:
                raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {self.config[key]!r}.")
        if not self.config.eta >= 0:
            raise ValueError(f"`eta` must not be negative, got {self.config.eta}.")
        if self.config.eta > 0 and (self.config.multistep_order > 1 or self.config.corrector):
            raise ValueError(
                f"`eta` must be 0 unless `multistep_order=1` and `corrector=False`, got `eta={self.config.eta}`, "
                f"`multistep_order={self.config.multistep_order}` and `corrector={self.config.corrector}`."
            )

    # --- the rows --------------------------------------------------------------------------------------------------

    def row(self, index: int, known: int) -> Row:
        process, start = self.process, self._point(index)
        weights: dict[Column, np.ndarray]
        if index + 1 == len(self._host_timesteps) and not self._end_is_noisy:
            # The final denoising step, u_0 = Ψ(t, 0)^{−1} (u − K ε).
            to_data = inverse(process.mean(start))
            weights = {("sample", 0): to_data, ("prediction", 0): -to_data @ self._root(start)}
        elif self.config.eta > 0:
            of_prediction, of_noise = stochastic_weights(process, start, self._point(index + 1), self.config.eta)
            weights = {("sample", 0): process.transition(self._point(index + 1), start), ("noise", 0): of_noise}
            # of ε for K = R, and K ε is the same for every K
            weights["prediction", 0] = of_prediction @ inverse(process.root(start)) @ self._root(start)
        else:
            lags = range(min(known, self.config.multistep_order))
            weights = {("sample", 0): process.transition(self._point(index + 1), start)}
            integrals = self._integrals(index, [index - lag for lag in lags])
            weights |= {("prediction", lag): weight for lag, weight in zip(lags, integrals, strict=True)}
        # A correction Δ of the state takes ε along as if the data were standard normal, ε = Kᵀ (Ψ Ψᵀ + Σ)^{−1} u. Near
        # pure noise, the ε of the uncorrected state would put the data off by Ψ^{−1} Δ. That spoils the first steps,
        # and Langevin diffusion diverges; what it costs where data are concentrated is little beside it.
        of_data = process.mean(start)[..., :1]
        total = of_data @ of_data.swapaxes(-1, -2) + process.covariance(start)
        of_change = weights["prediction", 0] @ self._root(start).swapaxes(-1, -2) @ inverse(total)
        for column, weight in self._corrections(index, known).items():
            weights[column] = weights.get(column, 0.0) + of_change @ weight
        return self._as_row(weights)

    def correction(self, index: int, known: int) -> Row:
        return self._as_row(self._corrections(index, known))

    def _corrections(self, index: int, known: int) -> dict[Column, np.ndarray]:
        if not self.config.corrector or known == 1:
            return {}
        # The arrival with the new prediction among the nodes, less the arrival without it.
        lags = range(min(known - 1, self.config.multistep_order) + 1)
        corrected = self._integrals(index - 1, [index - lag for lag in lags])
        predicted = self._integrals(index - 1, [index - lag for lag in lags[1:]])
        weights = corrected - np.concatenate([0 * corrected[:1], predicted])
        return {("prediction", lag): weight for lag, weight in zip(lags, weights, strict=True)}

    def _point(self, index: int) -> float:
        """The timestep of point `index`, the noisy end of sampling included."""
        return self._host_timesteps[index] if index < len(self._host_timesteps) else self.process.timestep_min

    def _integrals(self, index: int, nodes: Sequence[int]) -> np.ndarray:
        """The C_j of the step from point `index` to the next one, for predictions at the points `nodes`."""
        key = (index, *nodes)  # rows and corrections share them
        if key not in self._known_integrals:
            start, end, times = self._point(index), self._point(index + 1), [self._point(node) for node in nodes]
            self._known_integrals[key] = integral_weights(
                self.process, start, end, times, self.config.interpolation, self._parametrization
            )
        return self._known_integrals[key]

    @property
    def _parametrization(self) -> str:
        """The root K that the solver uses."""
        return "R"

    def _root(self, timestep: float) -> np.ndarray:
        return square_root(self.process, timestep, self._parametrization)

    def _as_row(self, weights: Mapping[Column, np.ndarray]) -> Row:
        if self.process.weight_shape == (1, 1):  # a weight that is one number acts fastest as a number
            return {column: float(weight.item()) for column, weight in weights.items()}
        return dict(weights)

    # --- the model -------------------------------------------------------------------------------------------------

    # The weights depend on the timestep, so that it has no default.
    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """What the model sees of the state `sample`: the state itself, unless the model is preconditioned."""
        if not self._preconditioned:
            return sample
        self.process.check_state(sample)
        return self._apply("model_input", self._locate(timestep), {"sample": (sample,)}).to(sample.dtype)

    @property
    def _preconditioned(self) -> bool:
        return self.config.get("preconditioned", False)

    def _build(self, begin: int):
        self._known_integrals: dict[tuple[int, ...], np.ndarray] = {}
        super()._build(begin)
        self._known_integrals.clear()
        if self._preconditioned:
            scaling, _, _ = self.process.preconditioning(self._host_timesteps)
            self._rows["model_input"] = [{("sample", 0): weight} for weight in scaling]

    def _conversion(self, index: int, to_data: bool) -> Row:
        """Model output → the ε of the solver's K. Rows weigh ε and nothing is clipped, so data are never asked for."""
        start = self._host_timesteps[index]
        weights: Row = {("output", 0): 1.0}
        if self._preconditioned:
            _, of_sample, of_output = self.process.preconditioning(start)
            weights = {("sample", 0): of_sample, ("output", 0): of_output}
        if self._parametrization == "R":
            return weights
        # the same score: K^{−T} ε_K = R^{−T} ε_R
        change = np.linalg.solve(self.process.root(start), self._root(start)).swapaxes(-1, -2)
        return {column: _product(change, weight) for column, weight in weights.items()}

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **kwargs):
        self.process.check_state(sample)
        return super().step(model_output, timestep, sample, generator, return_dict, **kwargs)

    step.__doc__ = TableScheduler.step.__doc__


class GDDIMScheduler(LinearDiffusionScheduler):
    """
    gDDIM for variance-preserving models, a drop-in for any checkpoint.

    Of order 1 it is DDIM, of higher orders DEIS (Zhang & Chen, 2023), in λ the one that diffusers has. A stochastic
    step adds noise of the variance σ_s² (1 − (γ_s/γ_t)^{2η²}), γ = σ/α: the DDPM posterior at `eta=1`, and equal to
    DDIM's η at 0 and 1 only.

    Args:
        time_grid (`str`, *optional*):
            As in [`GenieScheduler`]; `None` is what the inherited keys say.
        multistep_order (`int`, defaults to 2), corrector (`bool`, defaults to `False`),
        eta (`float`, defaults to 0.0):
            As in [`LinearDiffusionScheduler`].
        interpolation (`str`, defaults to `"log_snr"`):
            The variable of the polynomials, `"timestep"` (the paper's) or `"log_snr"`.

    All other arguments are those of [`GenieScheduler`].
    """

    _compatibles = TableScheduler._compatibles
    process_class = VariancePreserving

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
        analytical_first_step: bool = False,
        multistep_order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        interpolation: str = "log_snr",
    ):
        TableScheduler.__init__(self)  # the parent's would register these arguments once more, as if defaulted

    # All prediction types.
    _conversion = TableScheduler._conversion


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

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        langevin_beta: float = 4.0,
        friction: float = 1.0,
        initial_velocity_variance: float = 0.04,
        time_grid: str = "quadratic",
        final_sigmas_type: str = "zero",
        multistep_order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        interpolation: str = "timestep",
        parametrization: str = "R",
        preconditioned: bool = False,
    ):
        TableScheduler.__init__(self)  # the parent's would register these arguments once more, as if defaulted

    def _check_config(self):
        super()._check_config()
        if self.config.parametrization not in PARAMETRIZATIONS:
            choices = ", ".join(PARAMETRIZATIONS)
            raise ValueError(f"`parametrization` must be one of {choices}, got {self.config.parametrization!r}.")

    @property
    def _parametrization(self) -> str:
        return self.config.parametrization


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

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sample_size: int | Sequence[int] = 32,
        blur_sigma: float = 10.0,
        blur_minimum: float = 0.001,
        time_grid: str = "quadratic",
        final_sigmas_type: str = "zero",
        multistep_order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        interpolation: str = "timestep",
        preconditioned: bool = False,
    ):
        TableScheduler.__init__(self)  # the parent's would register these arguments once more, as if defaulted


def square_root(process: LinearDiffusion, timesteps, parametrization: str) -> np.ndarray:
    """K_t with K Kᵀ = Σ: gDDIM's `"R"`, or `"L"`, the Cholesky factor."""
    return process.root(timesteps) if parametrization == "R" else np.linalg.cholesky(process.covariance(timesteps))


def integral_weights(
    process: LinearDiffusion,
    start: float,
    end: float,
    nodes: Sequence[float],
    interpolation: str = "timestep",
    parametrization: str = "R",
) -> np.ndarray:
    """
    C_j = ∫_t^s ½ Ψ(s, τ) G Gᵀ K^{−T} ℓ_j(τ) dτ (gDDIM, Eq. 19b), of shape `(len(nodes), *process.weight_shape)`.

    Args:
        process ([`LinearDiffusion`]): The diffusion.
        start, end (`float`): The timesteps t and s.
        nodes (`Sequence[float]`): Timesteps at which ε is known, those of the Lagrange polynomials ℓ_j.
        interpolation (`str`): Their variable, `"timestep"` or `"log_snr"`.
        parametrization (`str`): K, `"R"` or `"L"`.
    """

    def variable(timesteps):
        return process.log_snr(timesteps) if interpolation == "log_snr" else np.asarray(timesteps)

    origin, span = variable(start), variable(end) - variable(start)
    times, quadrature, kernel = _resolved(process, start, end)
    if parametrization == "L":  # as smooth as that of R
        kernel = _kernel(process, end, times, "L")
    powers = ((variable(times) - origin) / span) ** np.arange(len(nodes))[:, None]
    moments = np.tensordot(powers * quadrature, kernel, axes=1)
    if parametrization == "R":  # Ψ(s, τ) R_τ is the antiderivative of the kernel
        moments[0] = process.root(end) - process.transition(end, start) @ process.root(start)
    scaled = [float((variable(node) - origin) / span) for node in nodes]
    weights = interpolation_weights(scaled, [0] * len(nodes), moments.reshape(len(nodes), -1))
    return weights.reshape(moments.shape)


def stochastic_weights(
    process: LinearDiffusion, start: float, end: float, eta: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    The weights of ε (for K = R) and of the noise in a stochastic step (gDDIM, Proposition 6),

        u_s = Ψ u_t + (Ψ̂ − Ψ) R_t ε + N(0, P),   Ψ̂ = R_s X R_t^{−1},   P = R_s (1 − X Xᵀ) R_sᵀ

    where Ψ̂ is the transition of F + ((1 + η²)/2) G Gᵀ Σ^{−1} and Ẋ = (η²/2) R^{−1} G Gᵀ R^{−T} X, X = 1 at t. That P
    solves the paper's equation for the covariance follows by substitution.
    """
    root_start, root_end = process.root(start), process.root(end)
    if process.weight_shape[-1] == 1:  # X = (γ_s/γ_t)^{η²} with γ = R/Ψ(·, 0)
        gain = ((root_end / process.mean(end)) / (root_start / process.mean(start))) ** eta**2
    else:
        gain = _collocated_gain(process, start, end, eta)
    directions, values, _ = np.linalg.svd(gain)
    # The singular values of X are at most one, up to rounding.
    spread = np.sqrt(np.maximum((1 - values) * (1 + values), 0.0))
    of_prediction = root_end @ gain - process.transition(end, start) @ root_start
    return of_prediction, root_end @ directions * spread[..., None, :]


def _collocated_gain(process: LinearDiffusion, start: float, end: float, eta: float) -> np.ndarray:
    """X of [`stochastic_weights`] for matrices, by collocation at the Gauss–Legendre points: spectrally accurate."""
    count = len(POINTS)
    legendre = np.polynomial.legendre.legvander(POINTS, count)
    # S_ij = ∫_{−1}^{x_i} ℓ_j / w_j, with ℓ_j = Σ_k ½ (2k + 1) w_j P_k(x_j) P_k and
    # ∫_{−1}^x P_k = (P_{k+1} − P_{k−1})/(2k + 1), P_{−1} := −1 at k = 0.
    before = np.concatenate([-legendre[:, :1], legendre[:, :-2]], axis=1)
    integration = 0.5 * (legendre[:, 1:] - before) @ legendre[:, :-1].T

    times, quadrature = _quadrature(process, start, end)
    inverse_root = inverse(process.root(times))
    rate = eta**2 / 2 * inverse_root @ process.diffusion(times) @ inverse_root.swapaxes(-1, -2)
    rate *= quadrature[:, None, None]
    # X_i = 1 + Σ_j S_ij w_j A_j X_j at all points at once
    identity = np.eye(process.weight_shape[-1])
    coupling = np.einsum("ij,jab->iajb", integration, rate).reshape(count * len(identity), -1)
    inside = np.linalg.solve(np.eye(len(coupling)) - coupling, np.tile(identity, (count, 1))).reshape(rate.shape)
    return identity + np.einsum("jab,jbc->ac", rate, inside)


def _kernel(process: LinearDiffusion, end: float, times: np.ndarray, parametrization: str) -> np.ndarray:
    """½ Ψ(s, τ) G Gᵀ K^{−T} at the timesteps τ."""
    transposed = inverse(square_root(process, times, parametrization)).swapaxes(-1, -2)
    return 0.5 * process.transition(end, times) @ process.diffusion(times) @ transposed


def _quadrature(process: LinearDiffusion, start, end) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and weights of ∫_start^end dτ, in the logarithm of the time since the data, where Σ is singular."""
    log_start, log_end = np.log(start - process.timestep_data), np.log(end - process.timestep_data)
    since_data = np.exp(log_start + (POINTS + 1) / 2 * (log_end - log_start))
    return process.timestep_data + since_data, QUADRATURE * since_data * (log_end - log_start) / 2


def _resolved(process: LinearDiffusion, start: float, end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Timesteps, weights and the kernel for K = R, whose antiderivative Ψ(s, τ) R_τ is known.

    A panel that misses it is halved: in a long step of blurring, a frequency fades within a small part of it.
    """
    origin, edges = process.timestep_data, np.array([start, end])
    for _ in range(HALVINGS):
        times, weights = _quadrature(process, edges[:-1, None], edges[1:, None])
        kernel = _kernel(process, end, times, "R")
        exact = process.transition(end, edges) @ process.root(edges)
        missed = np.diff(exact, axis=0) - np.einsum("pi,pi...->p...", weights, kernel)
        tolerated = TOLERANCE * np.abs(exact).max(axis=(0, -1, -2), keepdims=True)
        coarse = np.any(np.abs(missed) > tolerated, axis=tuple(range(1, missed.ndim)))
        if not coarse.any():
            break
        middles = origin + np.sqrt((edges[:-1] - origin) * (edges[1:] - origin))
        edges = np.insert(edges, np.flatnonzero(coarse) + 1, middles[coarse])
    return times.ravel(), weights.ravel(), kernel.reshape(-1, *process.weight_shape)
