"""Paths of a diffusion model's ODE: where they start, how they are solved, how far two of them are apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DModel

from genie_diffusers import GenieScheduler, GenieUNet2DModel
from genie_diffusers.models.exact_slope import to_noise_prediction, velocity_of


@dataclass
class Noises:
    """Where paths start: noise, labels if there are classes, and guidance scales if they are guided."""

    noise: torch.Tensor
    labels: torch.Tensor | None
    scales: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Noises":
        return self._each(lambda values: values[index])

    def to(self, device: torch.device) -> "Noises":
        return self._each(lambda values: values.to(device))

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Noises":
        labels, scales = (None if values is None else function(values) for values in (self.labels, self.scales))
        return Noises(function(self.noise), labels, scales)

    def at_scale(self, guidance_scale: float) -> "Noises":
        """The same paths, all guided by this scale; 1 is no guidance, and so is any without classes."""
        guided = self.labels is not None and guidance_scale != 1.0
        return Noises(self.noise, self.labels, torch.full((len(self),), guidance_scale) if guided else None)


def draw(unet: UNet2DModel, count: int, seed: int, label_dropout: float, max_guidance_scale: float = 1.0) -> Noises:
    """Noises of `count` paths and what [`labelled`] says, a pure function of all arguments."""
    generator, size = torch.Generator().manual_seed(seed), unet.config.sample_size
    noise = torch.randn((count, unet.config.in_channels, size, size), generator=generator)
    return labelled(noise, unet, generator, label_dropout, max_guidance_scale)


def labelled(
    noise: torch.Tensor,
    unet: UNet2DModel,
    generator: torch.Generator,
    label_dropout: float = 0.0,
    max_guidance_scale: float = 1.0,
    null_class: bool = False,
) -> Noises:
    """
    Paths from `noise`, with labels if there are classes.

    Args:
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): Where they start.
        unet ([`UNet2DModel`] or `Conditioned`): The denoiser.
        generator (`torch.Generator`): What labels and scales are drawn from.
        label_dropout (`float`, defaults to 0.0): Share of the null class among unguided paths.
        max_guidance_scale (`float`, defaults to 1.0):
            If it is more than 1 all paths are guided, with scales uniform from 1 to this.
        null_class (`bool`, defaults to `False`): Whether the last class is a null class though none is dropped.
    """
    classes, count = unet.config.num_class_embeds, len(noise)
    if classes is None:
        return Noises(noise, None, None)
    null_class = null_class or label_dropout > 0 or max_guidance_scale > 1
    labels = torch.randint(classes - null_class, (count,), generator=generator)
    uniform = torch.rand(count, generator=generator)
    if max_guidance_scale > 1:
        return Noises(noise, labels, 1.0 + (max_guidance_scale - 1.0) * uniform)
    return Noises(noise, torch.where(uniform < label_dropout, null_labels(unet, labels), labels), None)


def draw_numbered(
    unet: UNet2DModel, numbers: Sequence[int], seed: int, label_dropout: float, guidance_scale: float
) -> Noises:
    """
    Noises of the paths with these numbers, each a pure function of `seed` and its number.

    So any part of an endless sequence of paths can be drawn, in any order. A batch of [`draw`] is drawn as a whole.
    """
    size, channels, classes = unet.config.sample_size, unet.config.in_channels, unet.config.num_class_embeds
    height, width = (size, size) if isinstance(size, int) else size
    noise = np.empty((len(numbers), channels, height, width), dtype=np.float32)
    labels = np.zeros(len(numbers), dtype=np.int64)
    for i, number in enumerate(numbers):
        generator = np.random.default_rng([seed, number])
        generator.standard_normal(out=noise[i], dtype=np.float32)
        if classes is not None:
            has_null_class = label_dropout > 0 or guidance_scale != 1.0
            label = generator.integers(classes - has_null_class)
            labels[i] = classes - 1 if generator.random() < label_dropout else label
    if classes is None:
        return Noises(torch.from_numpy(noise), None, None)
    return Noises(torch.from_numpy(noise), torch.from_numpy(labels), None).at_scale(guidance_scale)


def null_labels(unet: UNet2DModel, labels: torch.Tensor) -> torch.Tensor:
    """Those of the branch without a class: the last class, or what a denoiser of captions or pictures says."""
    if hasattr(unet, "null_labels"):
        return unet.null_labels(labels)
    return torch.full_like(labels, unet.config.num_class_embeds - 1)


def draw_guided(unet: UNet2DModel, count: int, seed: int, guidance_scale: float) -> Noises:
    """Noises of `count` paths of one guidance scale, with the same labels for every scale; 1 is no guidance."""
    return draw(unet, count, seed, label_dropout=0.0, max_guidance_scale=2.0).at_scale(guidance_scale)


def predict(unet: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, noises: Noises) -> torch.Tensor:
    """The model's output, guided where the paths are."""
    if noises.scales is None or noises.labels is None:
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
        sample = scheduler.step(predict(unet, sample, timestep, noises), timestep, sample, return_dict=False)[0]
    return sample


def in_batches(function, noises: Noises, batch_size: int, device: torch.device) -> torch.Tensor:
    """`function` of all paths, without gradients, a batch at a time; the result stays on the host."""
    with torch.no_grad():
        parts = [
            function(noises[start : start + batch_size].to(device)).cpu()
            for start in range(0, len(noises), batch_size)
        ]
    return torch.cat(parts)


def cubic(u: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """
    The weights of both ends of an interval in the cubic's value at `u` of it, from 0 to 1.

    First those of the states, then those of the velocities, to be multiplied by the length of the interval.
    """
    return (2 * u**3 - 3 * u**2 + 1, 3 * u**2 - 2 * u**3), (u**3 - 2 * u**2 + u, u**3 - u**2)


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
                sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
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
        (a_0, a_1), (b_0, b_1) = cubic(float(log_snr - self.log_snrs[index]) / width)
        (x_0, x_1), (v_0, v_1) = (values[:, index : index + 2].unbind(1) for values in (self.states, self.velocities))
        return a_0 * x_0 + a_1 * x_1 + width * (b_0 * v_0 + b_1 * v_1)


def relative_error(sample: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """‖x − reference‖ / ‖reference‖ of each sample, shape `(batch,)`."""
    return (sample - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def solver_of(scheduler_config: dict, **options) -> GenieScheduler:
    """The solver of the model, without clipping: it would hide what there is to learn."""
    return GenieScheduler.from_config(
        scheduler_config,
        **{"clip_sample": False, "thresholding": False, "final_sigmas_type": "zero", "analytical_first_step": False},
        **{"method": "hermite", "denoising_step": False, **options},
    )


def teacher_of(scheduler_config: dict) -> GenieScheduler:
    return solver_of(scheduler_config, time_grid="uniform_lambda", denoising_step=True)
