"""Class-conditional sampling with a diffusion transformer, of noise or of flows, in pixels or in latents."""

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .pipeline_genie import check_inputs, check_sampling, denoise, init_noise_sigma


class GenieDiTPipeline(DiffusionPipeline):
    """
    Pipeline for class-conditional image generation with a [`DiTTransformer2DModel`].

    The transformer may predict noise, v, pictures or flows, in pixels or in the latents of a VAE, of which the
    scheduler is told. A model of flows is sampled by diffusers' flow-matching schedulers, by the multistep ones with
    `use_flow_sigmas`, and by [`GenieScheduler`], made from the configuration of any of them. Checkpoints of diffusers'
    [`DiTPipeline`] load too.

    Args:
        transformer ([`DiTTransformer2DModel`]):
            The denoiser. The class after its `num_embeds_ada_norm` classes is the null class of classifier-free
            guidance. If it predicts variances too, they are for schedulers whose `variance_type` is `"learned"` or
            `"learned_range"`; others do not see them.
        scheduler ([`SchedulerMixin`]):
            The sampler.
        vae ([`AutoencoderKL`], *optional*):
            The autoencoder of the latents; none for a model in pixel space.

    Example:

    ```py
    >>> from genie_diffusers import GenieDiTPipeline, GenieScheduler

    >>> pipe = GenieDiTPipeline.from_pretrained("genie_diffusers/checkpoints/flow-cifar10-16")
    >>> pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    >>> image = pipe(class_labels=1, guidance_scale=2.0, num_inference_steps=10).images[0]
    ```
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
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
                Classes to draw, one per image or one for all. Without them the null class is drawn, that is,
                unconditionally.
            guidance_scale (`float`, defaults to 1.0):
                Weight w of classifier-free guidance, v_null + w (v_class − v_null) of whatever v the model predicts. 1
                is no guidance, and one model call on half the batch.
            num_inference_steps (`int`, defaults to 10):
                Number of steps of the scheduler; of model calls, for all but diffusers' Heun schedulers.
            generator (`torch.Generator` or list of them, *optional*):
                Source of the initial noise: one for the batch, or one per image (then the same images come out for
                any split into batches).
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Initial standard normal noise, instead of drawing it.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (batch, height, width, channels in [0, 1]), `"pt"` (batch, channels, height, width in
                [0, 1]) or `"latent"` (the sample itself, which no VAE has decoded).
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
        device, dtype, config = self._execution_device, self.transformer.dtype, self.transformer.config
        check_sampling(self, guidance_scale, class_labels, callback_on_step_end_tensor_inputs)
        null_class = config.num_embeds_ada_norm
        class_labels, batch_size = check_inputs(null_class + 1, class_labels, batch_size, latents, generator)
        null = torch.full((batch_size,), null_class)
        labels = null if class_labels is None else class_labels
        guided = guidance_scale != 1.0
        labels = (torch.cat([null, labels]) if guided else labels).to(device)

        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device=device, dtype=dtype) * init_noise_sigma(self.scheduler)
        takes_variances = self.scheduler.config.get("variance_type") in ("learned", "learned_range")

        def predict(model_input: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = self.transformer(model_input, t.expand(len(model_input)), labels, return_dict=False)[0]
            if not takes_variances:
                return output[:, : config.in_channels]
            if guided:  # the prediction is; variances are those of the class
                output[:batch_size, config.in_channels :] = output[batch_size:, config.in_channels :]
            return output

        tensors = callback_on_step_end_tensor_inputs
        latents = denoise(self, predict, latents, guidance_scale, generator, callback_on_step_end, tensors)
        if self.vae is not None and output_type != "latent":
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            latents = self.vae.decode(latents, return_dict=False)[0]
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
