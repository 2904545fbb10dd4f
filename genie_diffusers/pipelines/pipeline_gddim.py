"""Unconditional and class-conditional sampling of any linear diffusion."""

import torch
from diffusers import UNet2DModel

from ..schedulers import LinearDiffusionScheduler
from .pipeline_genie import GeniePipeline


class GDDIMPipeline(GeniePipeline):
    """
    Pipeline for unconditional and class-conditional image generation with a [`LinearDiffusion`].

    It draws the initial state from the prior of the scheduler's process and returns the images in the final state; all
    else is [`GeniePipeline`], whose call it has. For critically-damped Langevin diffusion `latents` is the standard
    normal noise of positions and velocities, with twice the channels of an image.

    Args:
        unet ([`UNet2DModel`]):
            The denoiser. If it is class-conditional, its last class is the null class of classifier-free guidance.
        scheduler ([`LinearDiffusionScheduler`]):
            The sampler: [`GDDIMScheduler`], [`GDDIMCLDScheduler`], [`GDDIMBlurringScheduler`] or one of your own.

    Raises:
        ValueError: If the UNet takes no states of the scheduler's process.
    """

    def __init__(self, unet: UNet2DModel, scheduler: LinearDiffusionScheduler):
        super().__init__(unet, scheduler)
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        # a state of the UNet's shape without its memory
        state = torch.empty(1, unet.config.in_channels, height, width, device="meta")
        scheduler.process.check_state(state)

    def _initial_state(self, noise: torch.Tensor) -> torch.Tensor:
        return self.scheduler.process.prior(noise)

    def _images(self, state: torch.Tensor) -> torch.Tensor:
        return self.scheduler.process.pictures(state)
