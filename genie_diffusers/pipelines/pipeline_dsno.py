"""Class-conditional and unconditional sampling in one model call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..models import DSNOUNet2DModel
from .pipeline_genie import check_inputs


@dataclass
class DSNOPipelineOutput(ImagePipelineOutput):
    """
    Args:
        images: The pictures, in the requested `output_type`.
        trajectory (`list`, *optional*):
            With `return_trajectory=True`, the states at each solution timestep in the same type, the pictures last.
    """

    trajectory: list | None = None


class DSNOPipeline(DiffusionPipeline):
    """
    Pipeline that draws images by one call of a neural operator.

    Guidance, if there is any, is that of the solutions which the operator has learned.

    Args:
        unet ([`DSNOUNet2DModel`]): The operator.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: DSNOUNet2DModel):
        super().__init__()
        self.register_modules(unet=unet)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        return_trajectory: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DSNOPipelineOutput | tuple:
        """
        Draw images.

        Args:
            batch_size (`int`, *optional*):
                Number of images; that of `class_labels` by default, or one.
            class_labels (`int`, sequence of `int` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Classes to draw, one per image or one for all. A class-conditional model without them draws its null
                class, the last one, that is, unconditionally.
            generator (`torch.Generator` or list of them, *optional*):
                Source of the initial noise: one for the batch, or one per image (then the same images come out for
                any split into batches).
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Initial standard normal noise, instead of drawing it.
            return_trajectory (`bool`, defaults to `False`):
                Whether to return the states at the earlier solution timesteps too. They cost nothing.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (batch, height, width, channels in [0, 1]), `"pt"` (batch, channels, height, width in
                [0, 1]) or `"latent"` (the sample itself, in [−1, 1] but for overshoots).
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DSNOPipelineOutput`] or a tuple.

        Raises:
            ValueError: If arguments contradict each other or do not fit the model.
        """
        device, dtype, config = self._execution_device, self.unet.dtype, self.unet.config
        class_labels, batch_size = check_inputs(config.num_class_embeds, class_labels, batch_size, latents, generator)
        if config.num_class_embeds is not None:
            null = torch.full((batch_size,), config.num_class_embeds - 1)
            class_labels = (null if class_labels is None else class_labels).to(device)
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        shape = (batch_size, config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        states = self.unet(latents.to(device=device, dtype=dtype), class_labels, return_dict=False)[0]
        kept = states.unbind(1) if return_trajectory else states[:, -1:].unbind(1)
        pictures = [self.image_processor.postprocess(state, output_type=output_type) for state in kept]
        self.maybe_free_model_hooks()
        trajectory = pictures if return_trajectory else None
        if not return_dict:
            return (pictures[-1],) if trajectory is None else (pictures[-1], trajectory)
        return DSNOPipelineOutput(images=pictures[-1], trajectory=trajectory)
