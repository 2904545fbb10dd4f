"""Tables of weights for few model calls, fitted step after step to converged solutions."""

import numpy as np
import torch

from genie_diffusers import GenieScheduler, GenieUNet2DModel
from genie_diffusers.learning.paths import Noises, Trajectories, in_batches, noise_of, predict, relative_error

#: predictions a row weighs, this one and earlier ones
HISTORY = 4
#: of the mean square of the columns: enough to keep nearly equal predictions from large opposite weights
RIDGE = 1e-7


class TablesAlone:
    """The source of a head without its network: nothing is added to what the tables weigh."""

    term = "residual"

    def __init__(self, tables: dict[str, dict]):
        self.tables = {steps: without_residuals(table) for steps, table in tables.items()}

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope):
        raise NotImplementedError("No step of these tables weighs a residual.")


def without_residuals(table: dict) -> dict:
    """An entry of `tables` that does not call the network of its head, in either format."""
    if "residuals" in table:
        return {**table, "residuals": [0.0] * len(table["residuals"])}
    return {
        **table,
        "rows": [{what: by_lag for what, by_lag in row.items() if what != "residual"} for row in table["rows"]],
    }


def fit_table(
    unet: GenieUNet2DModel,
    scheduler: GenieScheduler,
    steps: int,
    noises: Noises,
    trajectories: Trajectories,
    fitted: int,
    batch_size: int,
    device: torch.device,
) -> tuple[dict, float]:
    """
    Learn the rows of a run of `steps` model calls at the timesteps that `scheduler` sets.

    Step after step, the weights of x_n, ε_n, ε_{n−1}, … are those whose sum is nearest to the converged solutions at
    the next point. They are pulled a little towards those of DDIM. All paths, fitted or not, are then moved by them.

    Returns:
        `tuple[dict, float]`:
            The table, with the root mean squares of what it misses, and the mean relative error of the paths from
            number `fitted` on, which it was not fitted to.
    """
    scheduler.set_timesteps(steps)
    predictions: list[torch.Tensor] = []
    sample, rows, residuals = noises.noise, [], []
    for index, timestep in enumerate(scheduler.timesteps):
        moving = Noises(sample, noises.labels, noises.scales)
        output = in_batches(lambda batch, t=timestep: predict(unet, batch.noise, t, batch), moving, batch_size, device)
        predictions = [noise_of(output, sample, scheduler, index), *predictions][:HISTORY]
        columns = torch.stack([sample, *predictions], dim=-1)
        target = trajectories.at(scheduler.lambdas[index + 1])
        ddim = torch.zeros(columns.shape[-1], dtype=torch.float64)
        ratio = scheduler.alphas[index + 1] / scheduler.alphas[index]
        ddim[0], ddim[1] = ratio, scheduler.noise_stds[index + 1] - ratio * scheduler.noise_stds[index]
        matrix = columns[:fitted].flatten(0, -2).double()
        missed = target[:fitted].flatten().double() - matrix @ ddim
        gram = matrix.T @ matrix
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weights = ddim + torch.linalg.solve(gram + ridge, matrix.T @ missed)
        sample = columns @ weights.to(columns.dtype)
        rows.append([float(f"{weight:.9g}") for weight in weights])
        residuals.append(float(f"{(target - sample)[:fitted].square().mean().sqrt():.4g}"))
    table = {
        "timesteps": scheduler.timesteps.tolist(),
        "alphas": scheduler.alphas.tolist(),
        "sigmas": scheduler.noise_stds.tolist(),
        "rows": [
            {"sample": row[:1], "prediction": row[1:], "residual": [missed]}
            for row, missed in zip(rows, residuals, strict=True)
        ],
    }
    error = relative_error(sample[fitted:], trajectories.at(np.inf)[fitted:]).mean()
    return table, float(error)
