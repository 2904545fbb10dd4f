"""Tables as functions of what is learned of them, and differentiable runs of them (DDSS, Watson et al., 2022)."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from genie_diffusers import GGDMScheduler, Table, VariancePreserving
from genie_diffusers.core import Parametrisation, run
from genie_diffusers.core.table import TERMS, Term
from genie_diffusers.learning.paths import Noises, predict

#: what a family of tables may have besides the weights of the latest state and prediction
FAMILY = ("states", "history", "slope", "noise", "time", "pred")
#: of the mean square of the columns: directions in which they move the next state by less than 1% hardly count
FLOOR = 1e-4


class LearnedTable(torch.nn.Module):
    """
    One table of a [`GGDMScheduler`] with free numbers, zero for the table it starts from.

    The columns that a row weighs, states and predictions, are nearly parallel, and their weights near pure noise are
    large. So what is learned are not the weights but the coordinates that [`~LearnedTable.whiten`] makes of them: one
    unit of any of them moves the next state by a root mean square of one.

    Timesteps are the boundaries of intervals between the largest and the smallest one, whose logarithms are learned.
    An interval of length zero, such as that above a first timestep at the very top, stays.

    Args:
        table (`dict` or [`Table`]): An entry of the configuration key `tables`, or what it says.
        process ([`VariancePreserving`]): The diffusion.
        family (`list[str]`):
            What is free: of the columns that the table weighs all, and besides `"states"`, all earlier states,
            `"history"`, all earlier predictions, `"slope"`, the latest slope, `"noise"`, σ_k but that of the last
            step, `"time"`, the timesteps.
    """

    base: torch.Tensor
    base_noise: torch.Tensor
    base_timesteps: torch.Tensor
    intervals: torch.Tensor

    def __init__(self, table: dict | Table, process: VariancePreserving, family: list[str]):
        super().__init__()
        self.process = process
        self.origin = (table if isinstance(table, Table) else Table.from_dict(table, process)).fold()
        #: in what the table weighs predictions, x_0 or ε
        self.prediction = "data" if "data" in self.origin.needs() else "prediction"
        steps = len(self.origin)
        self.columns: list[list[Term]] = []
        weights: list[float] = []
        for index, origin in enumerate(self.origin):
            row = {term: weight for term, weight in origin.items() if term[0] != "noise"}
            for what, lags in (
                ("sample", index + 1 if "states" in family else 1),
                (self.prediction, index + 1 if "history" in family else 1),
                ("slope", int("slope" in family)),
            ):
                row = {(what, lag): 0.0 for lag in range(lags)} | row
            self.columns.append(sorted(row, key=lambda term: (TERMS.index(term[0]), term[1])))
            weights += [row[term] for term in self.columns[-1]]
        sizes = [len(columns) for columns in self.columns]
        noise = [row.get(("noise", 0), 0.0) for row in self.origin]
        timesteps = torch.tensor([float(timestep) for timestep in self.origin.timesteps], dtype=torch.float64)
        self.register_buffer("base", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("base_noise", torch.tensor(noise, dtype=torch.float64))
        self.register_buffer("base_timesteps", timesteps)
        for index, size in enumerate(sizes):
            self.register_buffer(f"unwhitened_{index}", torch.eye(size, dtype=torch.float64))
        edges = [process.timestep_max, *timesteps.tolist(), process.timestep_min]
        self.register_buffer("intervals", -torch.tensor(edges, dtype=torch.float64).diff())
        self.weights = torch.nn.Parameter(torch.zeros(sum(sizes), dtype=torch.float64))
        if "noise" in family:
            self.noise = torch.nn.Parameter(torch.zeros(steps - 1, dtype=torch.float64))
        if "time" in family:
            self.log_intervals = torch.nn.Parameter(torch.zeros(steps + 1, dtype=torch.float64))
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def is_stochastic(self) -> bool:
        return hasattr(self, "noise") or bool(self.base_noise.any())

    def forward(self) -> Table:
        """The table, whose numbers are tensors; the sign of a standard deviation of the noise means nothing."""
        timesteps = self.base_timesteps
        if hasattr(self, "log_intervals"):
            lengths = self.intervals * torch.exp(self.log_intervals)
            reach = self.process.timestep_max - self.process.timestep_min
            timesteps = self.process.timestep_max - (reach * lengths / lengths.sum()).cumsum(0)[:-1]
        alphas = Alpha.apply(timesteps, self.process)
        sigmas = ((1 - alphas) * (1 + alphas)).sqrt()
        noise = self.base_noise
        if hasattr(self, "noise"):
            noise = noise + torch.nn.functional.pad(self.noise, (0, 1))
        weights, noise = self._weights(alphas, sigmas, noise)
        rows = [
            dict(zip(columns, row.unbind(), strict=True)) for columns, row in zip(self.columns, weights, strict=True)
        ]
        if self.is_stochastic:
            rows = [row | {("noise", 0): sigma} for row, sigma in zip(rows, noise.unbind(), strict=True)]
        if self.origin.model_levels is not None:  # an encoder starts at clean data, of which the model is told else
            return dataclasses.replace(self.origin, timesteps=timesteps, rows=rows, model_levels=(alphas, sigmas))
        alpha_end, sigma_end = (alphas.new_tensor([end]) for end in (self.origin.alphas[-1], self.origin.sigmas[-1]))
        return Table(timesteps, torch.cat([alphas, alpha_end]), torch.cat([sigmas, sigma_end]), rows)

    def _weights(self, alphas, sigmas, noise) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self._moved(), noise

    def _moved(self) -> list[torch.Tensor]:
        parts = zip(self.base.split(self._sizes), self.weights.split(self._sizes), strict=True)
        return [base + self._unwhitened(index) @ moved for index, (base, moved) in enumerate(parts)]

    def _unwhitened(self, index: int) -> torch.Tensor:
        return getattr(self, f"unwhitened_{index}")

    def whiten(self, grams: list[torch.Tensor], units: Sequence[float] | None = None):
        """
        Choose the coordinates of the rows, before anything is learned.

        Args:
            grams (`list[torch.Tensor]`): Mean products of the columns of each row, see [`mean_products`].
            units (`Sequence[float]`, *optional*): By how much one unit is to move the next state, instead of by one.
        """
        for index, gram in enumerate(grams):
            values, vectors = torch.linalg.eigh(gram)
            values = values.clamp(min=0)
            # 1/√value, but what the columns hardly span is left alone instead of being blown up
            scales = values.sqrt() / (values + FLOOR * gram.diagonal().mean())
            unit = 1.0 if units is None else units[index]
            self._unwhitened(index).copy_(unit * (vectors * scales) @ vectors.T)

    @torch.no_grad()
    def as_table(self) -> dict:
        """The entry of the configuration key `tables`."""
        table = self()
        noise = ("noise", 0)
        rows = [{term: abs(w) if term == noise else w for term, w in row.items()} for row in table.rows]
        return dataclasses.replace(table, rows=rows).to_dict()


class MarginalTable(LearnedTable):
    """
    A table that keeps the marginals q(x_k|x_0) of the diffusion, whatever is learned.

    Given x_0, the earlier states have means α_u x_0 and a covariance C. With σ(t) the noise level of the diffusion,
    x_{k−1} has mean α(t_{k−1}) x_0 and variance σ(t_{k−1})² if

        μᵀ C μ + σ_k² = σ(t_{k−1})²,    μ_{k,0} = α(t_{k−1}) − Σ_u μ_{k,u} α(t_u)

    which fix the length of μ and the weight μ_{k,0} of x̂_0. Free are the mutual proportions of the μ_{k,u}, and the
    angle φ with σ_k = σ(t_{k−1}) sin φ. With `"pred"` in the family, x̂_0 is a free combination of x_k and the model's.

    Raises:
        ValueError: If the table has other marginals, or weighs what is no state and no estimate of x_0.
    """

    angles: torch.Tensor

    def __init__(self, table: dict | Table, process: VariancePreserving, family: list[str]):
        super().__init__(table, process, family)
        others = {column for columns in self.columns for column in columns if column[0] != "sample"}
        if others != {("data", 0)}:
            raise ValueError("`--keep_marginals` needs states and the latest x̂_0 alone: an `--origin` of DDIM.")
        steps = len(self)
        reached = torch.from_numpy(process.sigma(self.base_timesteps[1:].numpy()))
        self.register_buffer("angles", torch.asin((self.base_noise[:-1] / reached).clamp(max=1.0)))
        if "pred" in family:
            self.of_data = torch.nn.Parameter(torch.zeros(steps, 2, dtype=torch.float64))
        found = [weight for row in self().rows for term, weight in row.items() if term[0] != "noise"]
        if not torch.allclose(torch.stack(found), self.base, rtol=0, atol=1e-9):
            raise ValueError(
                "`--keep_marginals` needs an `--origin` with the marginals of the diffusion, as DDIM has."
            )

    def _weights(self, alphas, sigmas, noise):
        angles = self.angles + (noise - self.base_noise)[:-1]
        covariance, rows, kept = (sigmas[:1] ** 2)[:, None], [], []
        for index, row in enumerate(self._moved()):
            lags = [lag for what, lag in self.columns[index] if what == "sample"]
            if index + 1 < len(self):
                alpha_next, sigma_next, angle = alphas[index + 1], sigmas[index + 1], angles[index]
                # of all states, from the first one on, as in `covariance`
                towards = torch.zeros_like(alphas[: index + 1])
                towards = towards.index_copy(0, index - torch.tensor(lags, device=row.device), row[: len(lags)])
                mu = towards * (sigma_next * angle.cos() / (towards @ covariance @ towards).sqrt())
                kept.append(sigma_next * angle.sin())
            else:
                alpha_next, sigma_next, mu = 1.0, 0.0, torch.zeros_like(alphas)
                kept.append(torch.zeros_like(alphas[0]))
            of_data = alpha_next - mu @ alphas[: index + 1]
            of_states = [mu[index - lag] for lag in lags]
            if hasattr(self, "of_data"):
                of_states[0] = of_states[0] + of_data * self.of_data[index, 0]
                rows.append(torch.stack([*of_states, of_data * (1.0 + self.of_data[index, 1])]))
            else:
                rows.append(torch.stack([*of_states, of_data]))
            column = (covariance @ mu)[:, None]
            corner = torch.zeros_like(column[:1]) + sigma_next**2
            covariance = torch.cat([torch.cat([covariance, column], 1), torch.cat([column.T, corner], 1)])
        return rows, torch.stack(kept)


class Alpha(torch.autograd.Function):
    """α at real timesteps, dα/dt = −½ β α."""

    @staticmethod
    def forward(ctx, timesteps: torch.Tensor, process: VariancePreserving) -> torch.Tensor:
        on_host = timesteps.detach().cpu().numpy()
        alphas = timesteps.new_tensor(process.alpha(on_host))
        ctx.save_for_backward(-0.5 * timesteps.new_tensor(process.beta(on_host)) * alphas)
        return alphas

    @staticmethod
    def backward(ctx, gradient):
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def sample_by(
    unet,
    learned: LearnedTable,
    noises: Noises,
    fresh: torch.Tensor | None,
    prediction_type: str,
    slope_source=None,
    rematerialise: bool = True,
    visit=None,
) -> torch.Tensor:
    """
    The pictures of a table, differentiable in what is learned of it.

    Args:
        unet ([`UNet2DModel`]): The denoiser, frozen.
        learned ([`LearnedTable`]): The table.
        noises ([`Noises`]): Where the paths start.
        fresh (`torch.Tensor` of shape `(steps, *noises.noise.shape)`, *optional*):
            The noise that the steps add; not needed by a deterministic table.
        prediction_type (`str`): What the denoiser predicts.
        slope_source (*optional*):
            As for [`~TableScheduler.attach`], already bound. A head must be `differentiable()` to learn through it.
        rematerialise (`bool`, defaults to `True`):
            Keep of each call of the denoiser only what goes in, and call it again in the backward pass, so that memory
            is that of one call. With `False` everything is kept.
        visit (`Callable`, *optional*): Called in each step with the index and the tensors that its row weighs.
    """
    table, dtype, parametrisation = learned(), noises.noise.dtype, Parametrisation(prediction_type)
    sloped = any(what == "slope" for columns in learned.columns for what, _ in columns)
    if sloped and slope_source is None:
        raise ValueError("This table weighs slopes, and there is no `slope_source`.")
    if learned.is_stochastic and fresh is None:
        raise ValueError("This table adds noise, and there is no `fresh`.")
    steps = iter(range(len(learned)))
    slopes: dict[int, torch.Tensor] = {}
    pairs = zip(map(float, table.alphas), map(float, table.sigmas), strict=True)
    levels = [math.log(alpha / sigma) if sigma > 0 else math.inf for alpha, sigma in pairs]

    def call(sample, timestep, alpha, sigma, index):
        if hasattr(slope_source, "forget"):  # what other steps have called, or a backward pass again
            slope_source.forget()
        output = predict(unet, sample, timestep, noises).to(dtype)
        if not sloped:
            return output, None
        # here, so that what the source reads of the model is computed again with it
        epsilon = parametrisation.noise(output, sample, alpha, sigma)
        options = {"step": levels[index + 1] - levels[index], "history_slope": None}
        return output, slope_source(sample, epsilon, float(timestep.detach()), **options).to(dtype)

    def model(sample, timestep):
        index = next(steps)
        alpha, sigma = (values.to(dtype) for values in table.model_level(index))
        once = functools.partial(checkpoint, call, use_reentrant=False) if rematerialise else call
        output, slopes[index] = once(sample, timestep.float(), alpha, sigma, index)
        return output

    return run(
        table,
        model,
        noises.noise,
        parametrisation,
        noise=None if fresh is None else lambda index, sample: fresh[index],
        source=lambda term, index, *asked: slopes[index],
        visit=None if visit is None else lambda index, tensors: visit(index, tensors[: len(learned.columns[index])]),
        fold=False,
    )


@torch.no_grad()
def mean_products(unet, learned: LearnedTable, noises: Noises, fresh, prediction_type: str, slope_source=None):
    """The mean products of the columns of each row, over all numbers of all `noises`."""
    grams: list[torch.Tensor] = []

    def visit(index: int, weighed: list[torch.Tensor]):
        columns = torch.stack([tensor.flatten() for tensor in weighed]).double()
        grams.append(columns @ columns.T / columns.shape[1])

    sample_by(unet, learned, noises, fresh, prediction_type, slope_source, visit=visit)
    return grams


def learned_scheduler(scheduler_config: dict, tables: dict[str, dict]) -> GGDMScheduler:
    """The sampler with these tables, without clipping, which they were learned without."""
    # what the configuration says of other solvers would only be warned of wherever the result is loaded
    known = set(inspect.signature(GGDMScheduler.__init__).parameters)
    config = {key: value for key, value in scheduler_config.items() if key in known}
    return GGDMScheduler.from_config(config, clip_sample=False, thresholding=False, tables=tables)
