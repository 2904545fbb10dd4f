"""Paths of a diffusion model's ODE, and rows of weights fitted to them: what the scripts share that learn samplers."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DModel

from genie_diffusers import GenieScheduler, GenieUNet2DModel
from genie_diffusers.models.exact_slope import to_noise_prediction, velocity_of

#: predictions a row weighs, this one and earlier ones
HISTORY = 4
#: of the mean square of the columns: enough to keep nearly equal predictions from large opposite weights
RIDGE = 1e-7


@dataclass
class Noises:
    """Where paths start: noise, labels if there are classes, and guidance scales if they are guided."""

    noise: torch.Tensor
    labels: torch.Tensor | None
    scales: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Noises":
        return Noises(
            *(None if values is None else values[index] for values in (self.noise, self.labels, self.scales))
        )

    def to(self, device: torch.device) -> "Noises":
        return Noises(*(None if values is None else values.to(device) for values in vars(self).values()))


def draw(unet: UNet2DModel, count: int, seed: int, label_dropout: float, max_guidance_scale: float = 1.0) -> Noises:
    """Noises of `count` paths: guided, with scales uniform from 1 to `max_guidance_scale`, if that is more than 1."""
    generator = torch.Generator().manual_seed(seed)
    size, classes = unet.config.sample_size, unet.config.num_class_embeds
    noise = torch.randn((count, unet.config.in_channels, size, size), generator=generator)
    labels = scales = None
    if classes is not None:
        has_null_class = label_dropout > 0 or max_guidance_scale > 1
        labels = torch.randint(classes - has_null_class, (count,), generator=generator)
        if max_guidance_scale > 1:
            scales = 1.0 + (max_guidance_scale - 1.0) * torch.rand(count, generator=generator)
        else:
            dropped = torch.rand(count, generator=generator) < label_dropout
            labels = torch.where(dropped, null_labels(unet, labels), labels)
    return Noises(noise, labels, scales)


def null_labels(unet: UNet2DModel, labels: torch.Tensor) -> torch.Tensor:
    """Those of the branch without a class: the last class, or what a denoiser of captions or pictures says."""
    if hasattr(unet, "null_labels"):
        return unet.null_labels(labels)
    return torch.full_like(labels, unet.config.num_class_embeds - 1)


def draw_guided(unet: UNet2DModel, count: int, seed: int, guidance_scale: float) -> Noises:
    """Noises of `count` paths of one guidance scale, with the same labels for every scale; 1 is no guidance."""
    noises = draw(unet, count, seed, label_dropout=0.0, max_guidance_scale=2.0)
    noises.scales = None if guidance_scale == 1.0 else torch.full((count,), guidance_scale)
    return noises


def predict(unet: GenieUNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, noises: Noises) -> torch.Tensor:
    """The model's output, guided where the paths are."""
    if noises.scales is None:
        return unet(sample, timestep, class_labels=noises.labels).sample[:, : sample.shape[1]]
    labels = torch.cat([null_labels(unet, noises.labels), noises.labels])
    output = unet(torch.cat([sample, sample]), timestep, class_labels=labels).sample[:, : sample.shape[1]]
    null, conditional = output.chunk(2)
    return null + noises.scales[:, None, None, None] * (conditional - null)


def noise_of(output: torch.Tensor, sample: torch.Tensor, scheduler: GenieScheduler, index: int) -> torch.Tensor:
    """ε from the model's output in step `index`."""
    alpha, sigma = float(scheduler.alphas[index]), float(scheduler.noise_stds[index])
    return to_noise_prediction(output, sample, alpha, sigma, scheduler.config.prediction_type)


def solve(unet: GenieUNet2DModel, scheduler: GenieScheduler, steps: int, noises: Noises) -> torch.Tensor:
    """The pictures that `scheduler` draws in `steps` model calls."""
    scheduler.set_timesteps(steps, device=noises.noise.device)
    sample = noises.noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.step(predict(unet, sample, timestep, noises), timestep, sample).prev_sample
    return sample


def in_batches(function, noises: Noises, batch_size: int, device: torch.device) -> torch.Tensor:
    """`function` of all paths, without gradients, a batch at a time; the result stays on the host."""
    with torch.no_grad():
        parts = [
            function(noises[start : start + batch_size].to(device)).cpu()
            for start in range(0, len(noises), batch_size)
        ]
    return torch.cat(parts)


class TablesAlone:
    """The slope source of a head without its network: nothing is added to what the tables weigh."""

    term = "residual"

    def __init__(self, tables: dict[str, dict]):
        self.tables = {steps: {**table, "residuals": [0.0] * int(steps)} for steps, table in tables.items()}

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope):
        raise NotImplementedError("No step of these tables weighs a slope.")


class Trajectories:
    """
    Converged solutions at every noise level: cubic Hermite interpolation in λ of a densely stepped solver.

    Args:
        unet ([`GenieUNet2DModel`]): The denoiser.
        scheduler ([`GenieScheduler`]): A converging solver without a source.
        steps (`int`): Its model calls.
        noises ([`Noises`]): Where the paths start.
        batch_size (`int`): Paths at a time.
        device (`torch.device`): Where the denoiser is.
    """

    def __init__(self, unet, scheduler: GenieScheduler, steps: int, noises: Noises, batch_size: int, device):
        def states_and_velocities(batch: Noises) -> torch.Tensor:
            scheduler.set_timesteps(steps, device=device)
            sample, kept = batch.noise, []
            for index, timestep in enumerate(scheduler.timesteps):
                output = predict(unet, sample, timestep, batch)
                noise, sigma = noise_of(output, sample, scheduler, index), float(scheduler.noise_stds[index])
                velocity = velocity_of(sample, noise, sigma, scheduler.config.prediction_type)
                kept.append(torch.stack([sample, velocity], dim=1))  # x and dx/dλ
                sample = scheduler.step(output, timestep, sample).prev_sample
            kept.append(torch.stack([sample, torch.zeros_like(sample)], dim=1))
            return torch.stack(kept, dim=1)

        self.states, self.velocities = in_batches(states_and_velocities, noises, batch_size, device).unbind(2)
        self.log_snrs = scheduler.lambdas

    def at(self, log_snr: float) -> torch.Tensor:
        """The states at λ, or the clean pictures at infinity."""
        if np.isinf(log_snr):
            return self.states[:, -1]
        index = int(np.clip(np.searchsorted(self.log_snrs, log_snr) - 1, 0, len(self.log_snrs) - 3))
        width = float(self.log_snrs[index + 1] - self.log_snrs[index])
        u = float(log_snr - self.log_snrs[index]) / width
        (x_0, x_1), (v_0, v_1) = (values[:, index : index + 2].unbind(1) for values in (self.states, self.velocities))
        values = (2 * u**3 - 3 * u**2 + 1) * x_0 + (3 * u**2 - 2 * u**3) * x_1
        return values + width * ((u**3 - 2 * u**2 + u) * v_0 + (u**3 - u**2) * v_1)


def relative_error(sample: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """‖x − reference‖ / ‖reference‖ of each sample, shape `(batch,)`."""
    return (sample - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


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
    sample, predictions, rows, residuals = noises.noise, [], [], []
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
    table = {"timesteps": scheduler.timesteps.tolist(), "weights": rows, "residuals": residuals}
    error = relative_error(sample[fitted:], trajectories.at(np.inf)[fitted:]).mean()
    return table, float(error)


def solver_of(scheduler_config: dict, **options) -> GenieScheduler:
    """The solver of the model, without clipping: it would hide what there is to learn."""
    return GenieScheduler.from_config(
        scheduler_config,
        **{"clip_sample": False, "thresholding": False, "final_sigmas_type": "zero", "analytical_first_step": False},
        **{"method": "hermite", "denoising_step": False, **options},
    )


def teacher_of(scheduler_config: dict) -> GenieScheduler:
    return solver_of(scheduler_config, time_grid="uniform_lambda", denoising_step=True)
