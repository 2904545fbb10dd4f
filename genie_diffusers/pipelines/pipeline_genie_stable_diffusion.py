"""Text-to-image sampling with a head: diffusers' pipelines, whose schedulers know the head of their UNet."""

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from .pipeline_genie import AttachesHead


class GenieStableDiffusionPipeline(AttachesHead, StableDiffusionPipeline):
    """
    [`StableDiffusionPipeline`], in all its arguments and methods, for Stable Diffusion 1.x and 2.x with a head.

    If the UNet has a head ([`GenieUNet2DConditionModel`]) and the scheduler takes one ([`GenieScheduler`]), the two
    are attached when the pipeline is built or loaded and when either is assigned. Under guidance the slope is that
    along the guided path, rescaled or not.

    Example:

    ```py
    >>> pipe = GenieStableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    >>> pipe.unet = GenieUNet2DConditionModel.from_unet(pipe.unet, derivative_head="user/step-head")
    >>> image = pipe("a photo of a cat", num_inference_steps=8).images[0]
    ```
    """


class GenieStableDiffusionXLPipeline(AttachesHead, StableDiffusionXLPipeline):
    """
    [`StableDiffusionXLPipeline`], in all its arguments and methods, with a head; see [`GenieStableDiffusionPipeline`].
    """
