"""Tables as functions of what is learned of them, and differentiable runs of them (DDSS, Watson et al., 2022)."""

import inspect
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from genie_diffusers import GGDMScheduler, VariancePreserving
from genie_diffusers.learning.paths import Noises, predict
from genie_diffusers.models.exact_slope import to_noise_prediction
from genie_diffusers.schedulers.scheduling_ggdm import WEIGHED, as_table
from genie_diffusers.schedulers.scheduling_utils import Column, Row

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
        table (`dict`): An entry of the configuration key `tables` of a [`GGDMScheduler`].
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

    def __init__(self, table: dict, process: VariancePreserving, family: list[str]):
        super().__init__()
        self.process, self.data_form = process, table.get("data_form", False)
        self.origin, steps = table, len(table["timesteps"])
        self.columns: list[list[Column]] = []
        weights: list[float] = []
        for index in range(steps):
            row = {
                (what, lag): weight
                for what in WEIGHED
                for lag, weight in enumerate(table.get(what, [[]] * steps)[index])
            }
            for what, lags in (
                ("sample", index + 1 if "states" in family else 1),
                ("prediction", index + 1 if "history" in family else 1),
                ("slope", int("slope" in family)),
            ):
                row = {(what, lag): 0.0 for lag in range(lags)} | row
            self.columns.append(sorted(row, key=lambda column: (WEIGHED.index(column[0]), column[1])))
            weights += [row[column] for column in self.columns[-1]]
        sizes = [len(columns) for columns in self.columns]
        self.register_buffer("base", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("base_noise", torch.tensor(table.get("noise", [0.0] * steps), dtype=torch.float64))
        self.register_buffer("base_timesteps", torch.tensor(table["timesteps"], dtype=torch.float64))
        for index, size in enumerate(sizes):
            self.register_buffer(f"unwhitened_{index}", torch.eye(size, dtype=torch.float64))
        edges = [process.timestep_max, *table["timesteps"], process.timestep_min]
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

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Timesteps, α and σ there, the rows and the standard deviations of the noise, whose sign means nothing."""
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
        return timesteps, alphas, sigmas, *self._weights(alphas, sigmas, noise)

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
        timesteps, _, _, rows, noise = self()
        named: list[Row] = [
            dict(zip(columns, row.tolist(), strict=True)) | {("noise", 0): abs(sigma)}
            for columns, row, sigma in zip(self.columns, rows, noise.tolist(), strict=True)
        ]
        return as_table(timesteps.tolist(), named, self.data_form)


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

    def __init__(self, table: dict, process: VariancePreserving, family: list[str]):
        super().__init__(table, process, family)
        others = {column for columns in self.columns for column in columns if column[0] != "sample"}
        if others != {("prediction", 0)} or not self.data_form:
            raise ValueError("`--keep_marginals` needs states and the latest x̂_0 alone: an `--origin` of DDIM.")
        steps = len(self)
        reached = torch.from_numpy(process.sigma(table["timesteps"][1:]))
        self.register_buffer("angles", torch.asin((self.base_noise[:-1] / reached).clamp(max=1.0)))
        if "pred" in family:
            self.of_data = torch.nn.Parameter(torch.zeros(steps, 2, dtype=torch.float64))
        _, _, _, rows, noise = self()
        if not torch.allclose(torch.cat([*rows, noise]), torch.cat([self.base, self.base_noise]), rtol=0, atol=1e-9):
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
        slope_source (*optional*): As for [`~TableScheduler.attach`], already bound.
        rematerialise (`bool`, defaults to `True`):
            Keep of each call of the denoiser only what goes in, and call it again in the backward pass, so that memory
            is that of one call. With `False` everything is kept.
        visit (`Callable`, *optional*): Called in each step with the index and the tensors that its row weighs.
    """
    timesteps, alphas, sigmas, rows, noise = learned()
    dtype = noises.noise.dtype
    levels = torch.log(alphas / sigmas).detach().tolist()
    samples, predictions, slopes = [noises.noise], [], []
    # the steps whose slope some row weighs, then or later
    sloped = {index - lag for index, columns in enumerate(learned.columns) for what, lag in columns if what == "slope"}
    if sloped and slope_source is None:
        raise ValueError("This table weighs slopes, and there is no `slope_source`.")
    if learned.is_stochastic and fresh is None:
        raise ValueError("This table adds noise, and there is no `fresh`.")

    def call(sample, timestep, alpha, sigma, index):
        output = predict(unet, sample, timestep, noises).to(dtype)
        if index not in sloped:
            return output, None
        epsilon = to_noise_prediction(output, sample, alpha, sigma, prediction_type)
        step = levels[index + 1] - levels[index] if index + 1 < len(levels) else float("inf")
        slope = slope_source(sample, epsilon, float(timestep.detach()), step=step, history_slope=None)
        return output, slope.to(dtype)

    for index, columns in enumerate(learned.columns):
        sample, timestep = samples[-1], timesteps[index].float()
        alpha, sigma = alphas[index].to(dtype), sigmas[index].to(dtype)
        arguments = (sample, timestep, alpha, sigma, index)
        output, slope = checkpoint(call, *arguments, use_reentrant=False) if rematerialise else call(*arguments)
        prediction = to_noise_prediction(output, sample, alpha, sigma, prediction_type)
        if learned.data_form:
            prediction = sample * (1 / alpha) - prediction * (sigma / alpha)  # keeps nothing new for the backward pass
        predictions.append(prediction)
        slopes.append(slope)
        history = {"sample": samples, "prediction": predictions, "slope": slopes}
        weighed = [history[what][-1 - lag] for what, lag in columns]
        if visit is not None:
            visit(index, weighed)
        row = rows[index].to(dtype)
        following = sum(weight * tensor for weight, tensor in zip(row, weighed, strict=True))
        if fresh is not None and learned.is_stochastic:
            following = following + noise[index].to(dtype) * fresh[index]
        samples.append(following)
    return samples[-1]


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
