"""Unconditional and class-conditional sampling in pixel space."""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..models.genie_unet import HeadSlope
from ..schedulers.scheduling_utils import TableScheduler

logger = logging.get_logger(__name__)


class AttachesHead:
    """What our pipelines add to diffusers': whenever UNet or scheduler are assigned, the two are attached."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name in ("unet", "scheduler"):
            unet, scheduler = vars(self).get("unet"), vars(self).get("scheduler")
            if not isinstance(scheduler, TableScheduler):
                return
            if getattr(unet, "derivative_head", None) is not None:
                if scheduler.takes_source:
                    scheduler.attach(unet)
                else:
                    logger.warning(f"`{type(scheduler).__name__}` samples without the head of this UNet.")
            elif isinstance(scheduler._slope_source, HeadSlope):  # that of the UNet before
                scheduler.attach(None)


class GeniePipeline(AttachesHead, DiffusionPipeline):
    """
    Pipeline for unconditional and class-conditional image generation.

    If the UNet has a head ([`GenieUNet2DModel`]) and the scheduler takes one ([`GenieScheduler`]), the two are
    attached when the pipeline is built and when either is assigned; `pipe.scheduler.attach(None)` samples without the
    head. Every scheduler of diffusers works too, flow-matching ones with a model of flows.

    Args:
        unet ([`UNet2DModel`] or [`GenieUNet2DModel`]):
            The denoiser. If it is class-conditional, its last class is the null class of classifier-free guidance.
        scheduler ([`SchedulerMixin`]):
            The sampler.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw images.

        Args:
            batch_size (`int`, *optional*):
                Number of images; that of `class_labels` by default, or one.
            class_labels (`int`, sequence of `int` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Classes to draw, one per image or one for all. A class-conditional model without them draws its null
                class, that is, unconditionally.
            guidance_scale (`float`, defaults to 1.0):
                Weight w of classifier-free guidance, ε_null + w (ε_class − ε_null). 1 is no guidance, and one model
                call on half the batch.
            num_inference_steps (`int`, defaults to 10):
                Number of model calls.
            generator (`torch.Generator` or list of them, *optional*):
                Source of the initial noise: one for the batch, or one per image (then the same images come out for
                any split into batches).
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Initial standard normal noise, instead of drawing it.
            image (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                For a model that takes pictures on further input channels, such as the low-resolution ones of an
                upscaler: these pictures, in height and width of the sample, as the model was trained with them.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (batch, height, width, channels in [0, 1]), `"pt"` (batch, channels, height, width in
                [0, 1]) or `"latent"` (the sample itself, in [−1, 1] but for overshoots).
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after every step as `callback(pipeline, step_index, timestep, {"latents": ...})`; may return a
                dictionary with changed `latents`.
            callback_on_step_end_tensor_inputs (sequence of `str`):
                What to pass to it; only `"latents"`.

        Raises:
            ValueError: If arguments contradict each other or do not fit the model.
        """
        device, dtype = self._execution_device, self.unet.dtype
        class_labels, batch_size = self._check_inputs(
            class_labels, batch_size, guidance_scale, image, latents, generator, callback_on_step_end_tensor_inputs
        )
        guided = guidance_scale != 1.0
        num_classes = self.unet.config.num_class_embeds
        if num_classes is not None:
            null = torch.full((batch_size,), num_classes - 1, device=device)
            labels = null if class_labels is None else class_labels.to(device)
            class_labels = torch.cat([null, labels]) if guided else labels

        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        further = max(0, self.unet.config.in_channels - self.unet.config.out_channels)
        shape = (batch_size, self.unet.config.in_channels - further, height, width)
        found = None if image is None else tuple(image.shape)
        if found != ((batch_size, further, height, width) if further else None):
            raise ValueError(
                f"`image` must have shape {(batch_size, further, height, width)} for this UNet, got {found}."
                if further
                else f"`image` must be left out for a UNet without channels for it, got shape {found}."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._initial_state(latents.to(device=device, dtype=dtype))

        def predict(model_input: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if image is not None:
                pictures = image.to(model_input).repeat(1 + guided, 1, 1, 1)
                model_input = torch.cat([model_input, pictures], dim=1)
            return self.unet(model_input, t, class_labels=class_labels, return_dict=False)[0]

        tensors = callback_on_step_end_tensor_inputs
        latents = denoise(self, predict, latents, guidance_scale, generator, callback_on_step_end, tensors)
        images = self.image_processor.postprocess(self._images(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_state(self, noise: torch.Tensor) -> torch.Tensor:
        """The state at the first timestep, from standard normal noise."""
        return noise * init_noise_sigma(self.scheduler)

    def _images(self, state: torch.Tensor) -> torch.Tensor:
        """The images in the final state."""
        return state

    def _check_inputs(
        self, class_labels, batch_size, guidance_scale, image, latents, generator, callback_tensors
    ) -> tuple[torch.Tensor | None, int]:
        check_sampling(self, guidance_scale, class_labels, callback_tensors)
        return check_inputs(self.unet.config.num_class_embeds, class_labels, batch_size, latents, generator, image)


def init_noise_sigma(scheduler: SchedulerMixin) -> torch.Tensor | float:
    """The standard deviation of the initial state: 1 for diffusers' flow-matching schedulers, which do not say it."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def denoise(
    pipeline: DiffusionPipeline,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | list[torch.Generator] | None,
    callback: Callable[[DiffusionPipeline, int, int, dict], dict] | None,
    callback_tensors: Sequence[str],
) -> torch.Tensor:
    """
    The loop of our pipelines over the timesteps that their scheduler has set.

    Args:
        pipeline (`DiffusionPipeline`): Whose scheduler and progress bar are used.
        predict (`Callable`):
            The model, of model input and timestep. Under guidance the input is twice the batch, null classes first.
        latents (`torch.Tensor`): The initial state.
        guidance_scale (`float`), generator, callback, callback_tensors: As in the call of the pipeline.

    Returns:
        `torch.Tensor`: The final state.
    """
    scheduler, guided = pipeline.scheduler, guidance_scale != 1.0
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for i, t in enumerate(pipeline.progress_bar(scheduler.timesteps)):
        model_input = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):  # diffusers' flow-matching schedulers have none
            model_input = scheduler.scale_model_input(model_input, t)
        model_output = predict(model_input, t)
        if guided:
            null_output, class_output = model_output.chunk(2)
            model_output = null_output + guidance_scale * (class_output - null_output)
        latents = scheduler.step(model_output, t, latents, return_dict=False, **extra)[0]
        if callback is not None:
            kwargs = {"latents": latents} if "latents" in callback_tensors else {}
            latents = (callback(pipeline, i, t, kwargs) or {}).get("latents", latents)
    return latents


def check_sampling(pipeline, guidance_scale: float, class_labels, callback_tensors: Sequence[str]) -> None:
    """Raise a `ValueError` if guidance or callback of [`denoise`] make no sense."""
    unknown = set(callback_tensors) - set(pipeline._callback_tensor_inputs)
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may only hold 'latents', got {sorted(unknown)}.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale}.")
    if class_labels is None and guidance_scale != 1.0:
        raise ValueError(f"`guidance_scale={guidance_scale}` needs `class_labels` to guide towards.")


def check_inputs(
    num_classes: int | None, class_labels, batch_size: int | None, latents, generator, image=None
) -> tuple[torch.Tensor | None, int]:
    """The class of each image, if classes are given, and the number of images, on which all arguments agree."""
    if class_labels is not None:
        if num_classes is None:
            raise ValueError("`class_labels` are given, but the model is not class-conditional.")
        given, class_labels = class_labels, torch.as_tensor(class_labels).cpu()
        if class_labels.ndim > 1 or class_labels.numel() == 0 or class_labels.is_floating_point():
            raise ValueError(f"`class_labels` must be an integer or a sequence of at least one, got {given}.")
        class_labels = class_labels.long()
        if class_labels.min() < 0 or class_labels.max() >= num_classes:
            raise ValueError(f"`class_labels` must be between 0 and {num_classes - 1}, got {class_labels.tolist()}.")
        if class_labels.ndim == 0:
            class_labels = class_labels.expand(batch_size or 1)
    sizes = {
        "batch_size": batch_size,
        "class_labels": None if class_labels is None else len(class_labels),
        "image": None if image is None else image.shape[0],
        "latents": None if latents is None else latents.shape[0],
        "generator": len(generator) if isinstance(generator, list) else None,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"These must agree on the number of images: {given}.")
    batch_size = next(iter(given.values()), 1)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    return class_labels, batch_size
