"""UNets that carry a head. Their output is that of the plain UNet."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here when a pipeline is loaded)

from ..processes import VariancePreserving
from .derivative_head import DerivativeHead, UNetHead
from .exact_slope import to_model_output
from .guidance import RunCheck, branch_weights, count_branches
from .step_head import StepHead

Model = TypeVar("Model", bound="_GenieUNet")


class HeadSlope:
    """
    The slope source of a UNet with a head: what the head makes of the UNet's last call, at the cost of the head.

    With a [`DerivativeHead`] that is dε/dλ; with a [`StepHead`] it is what its `tables` weigh in the place of a slope.
    """

    def __init__(self, unet: "_GenieUNet"):
        if unet.derivative_head is None:
            raise ValueError(f"This `{type(unet).__name__}` has no head; build it with `from_unet`.")
        self._unet, self._head = unet, unet.derivative_head
        self._check = RunCheck()

    @property
    def tables(self) -> dict | None:
        """The tables that the head was distilled with, by number of model calls; `None` for a derivative."""
        return self._head.config.tables if isinstance(self._head, StepHead) else None

    def bind(self, process: VariancePreserving, prediction_type: str):
        """Called by the scheduler; raises a `ValueError` if the head was distilled for another diffusion."""
        self._head.check_process(process, prediction_type)
        self._process, self._prediction_type = process, prediction_type

    def __call__(
        self,
        sample: torch.Tensor,
        noise_prediction: torch.Tensor,
        timestep: float,
        *,
        step: float | None = None,
        history_slope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The head's output at `sample`, along the velocity of `noise_prediction`; shape of `sample`.

        Raises:
            ValueError: If the UNet was not called with `sample`, or its outputs do not combine to the prediction.
        """
        call = self._unet.last_call
        if call is None:
            raise ValueError(
                "The UNet must be called before `step`, by the pipeline its head is attached to. A pipeline that "
                "builds a UNet of its own, such as AnimateDiff, samples without a head: `scheduler.attach(None)`."
            )
        check = self._check(timestep, sample.device)
        branches = count_branches(call["sample"], sample, check)
        alpha, sigma = float(self._process.alpha(timestep)), float(self._process.sigma(timestep))
        repeats = (branches, *(1,) * (sample.ndim - 1))
        dtype = self._head.dtype
        of_step = {}
        if isinstance(self._head, StepHead):
            history_slope = None if history_slope is None else history_slope.to(dtype).repeat(repeats)
            of_step = {"step": step, "history_slope": history_slope}
        slopes = self._head(
            sample.to(dtype).repeat(repeats),
            noise_prediction.to(dtype).repeat(repeats),
            call["features"].to(dtype),
            call["time_embedding"].to(dtype),
            alpha,
            sigma,
            **of_step,
        )
        if branches == 1:
            return slopes
        shape = (branches, sample.shape[0])
        outputs = call["output"][:, : sample.shape[1]].unflatten(0, shape)
        guided = to_model_output(noise_prediction, sample, alpha, sigma, self._prediction_type)
        return (branch_weights(outputs, guided, check) * slopes.unflatten(0, shape)).sum(0)


class _GenieUNet(torch.nn.Module):
    """What a UNet with a head adds to diffusers' UNet, whichever that is."""

    # of diffusers' UNets
    register_to_config: Callable
    time_embedding: torch.nn.Module
    conv_norm_out: torch.nn.Module
    config: Any

    derivative_head: UNetHead | None
    last_call: dict[str, torch.Tensor] | None

    def _add_head(self, config: dict | None):
        # The nested configuration is a plain dictionary, so that it is saved as JSON in the UNet's own.
        self.register_to_config(derivative_head_config=dict(config) if config is not None else None)
        self.derivative_head = None if config is None else _head_class(config).from_config(dict(config))
        self.last_call = None
        self._record_from_children()

    def _record_from_children(self):
        self.time_embedding.register_forward_hook(self._keep_time_embedding)
        self.conv_norm_out.register_forward_pre_hook(self._keep_features)

    def _keep_time_embedding(self, module, args, output):
        self._time_embedding = output

    def _keep_features(self, module, args):
        self._features = args[0]

    @property
    def slope_source(self) -> HeadSlope:
        """The head as a slope source, found by [`GenieScheduler.attach`]."""
        return HeadSlope(self)

    @classmethod
    def from_unet(
        cls: type[Model],
        unet: UNet2DModel | UNet2DConditionModel,
        derivative_head: UNetHead | str | os.PathLike,
        **kwargs,
    ) -> Model:
        """
        The same UNet with a head. Its weights are shared with `unet`, not copied, and so are its adapters.

        Args:
            unet: The plain UNet.
            derivative_head ([`DerivativeHead`], [`StepHead`] or `str`):
                The head, or the Hub id or folder to load it from. It is moved to device and precision of the UNet.
            kwargs:
                Passed to the head's `from_pretrained`, such as `subfolder`, `revision` or `token`.

        Raises:
            ValueError: If the head does not fit the UNet.
        """
        if isinstance(derivative_head, UNetHead):
            head = derivative_head
        elif isinstance(derivative_head, (str, os.PathLike)):
            config = UNetHead.load_config(derivative_head, **kwargs)
            head = _head_class(config).from_pretrained(derivative_head, **kwargs)
        else:
            raise ValueError(
                "`derivative_head` must be a `DerivativeHead`, a `StepHead`, a folder or a Hub id, got "
                f"{type(derivative_head).__name__}."
            )
        head.check_fits(unet)
        config = {key: value for key, value in unet.config.items() if key in inspect.signature(cls).parameters}
        with torch.device("meta"):
            model = cls(**{**config, "derivative_head_config": _plain(head)})
        # Children are shared whole, with whatever adapters and hooks they carry.
        for name, child in unet.named_children():
            if name != "derivative_head":
                setattr(model, name, child)
        # What adapters have noted beside the children: the names of LoRAs, the kind of an IP-Adapter.
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(unet):
                setattr(model, name, vars(unet)[name])
        if isinstance(unet, UNet2DConditionModel):
            model.config.encoder_hid_dim_type = unet.config.encoder_hid_dim_type
        model._record_from_children()
        # `ModelMixin.to` warns about float32 modules whenever it is given a dtype; the head has none.
        model.derivative_head = torch.nn.Module.to(head, device=unet.device, dtype=unet.dtype)
        return model.train(unet.training)


def _head_class(config: dict) -> type[UNetHead]:
    return StepHead if "tables" in config else DerivativeHead


def _plain(head: UNetHead) -> dict:
    return {key: value for key, value in head.config.items() if not key.startswith("_")}


def _with_head_argument(init, base):
    """
    Give `init` the signature of `base` and `derivative_head_config`: diffusers reads from it what a configuration may
    hold, and this follows every release of diffusers.
    """
    parameters = list(inspect.signature(base.__init__).parameters.values())
    head = inspect.Parameter("derivative_head_config", inspect.Parameter.KEYWORD_ONLY, default=None)
    init.__signature__ = inspect.Signature([*parameters, head])
    return init


def _recorded(forward):
    """The forward method of a plain UNet; what the head reads is kept until the next call."""

    @functools.wraps(forward)  # the signature too, by which `ExactSlope` and pipelines call
    def record(self, sample: torch.Tensor, *args, **kwargs):
        output = forward(self, sample, *args, **kwargs)
        self.last_call = {
            "sample": sample,
            "output": output[0],
            "features": self._features,
            "time_embedding": self._time_embedding,
        }
        return output

    return record


class GenieUNet2DModel(_GenieUNet, UNet2DModel):
    """
    A [`UNet2DModel`] with a head, for [`GenieScheduler.attach`].

    Takes the arguments of [`UNet2DModel`], and `derivative_head_config` (`dict`, *optional*), the configuration of the
    head. Its output is that of the plain UNet, so every scheduler and pipeline works with it. Usually built by
    [`~GenieUNet2DModel.from_unet`], saved and loaded like any model:

    ```py
    >>> pipe.unet = GenieUNet2DModel.from_unet(pipe.unet, derivative_head="user/genie-head")
    >>> pipe.scheduler.attach(pipe.unet)
    ```
    """

    def __init__(self, *args, derivative_head_config: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._add_head(derivative_head_config)

    __init__ = _with_head_argument(__init__, UNet2DModel)
    forward = _recorded(UNet2DModel.forward)


class GenieUNet2DConditionModel(_GenieUNet, UNet2DConditionModel):
    """
    A [`UNet2DConditionModel`] with a head: the denoiser of Stable Diffusion 1.x, 2.x and XL, inpainting or upscaling.

    Takes the arguments of [`UNet2DConditionModel`], and `derivative_head_config` (`dict`, *optional*), the
    configuration of the head. Whatever else the denoiser is given (masks and images on further channels, added
    conditions, residuals of a ControlNet, adapters) reaches it unchanged.

    ```py
    >>> pipe.unet = GenieUNet2DConditionModel.from_unet(pipe.unet, derivative_head="user/step-head")
    >>> pipe.scheduler.attach(pipe.unet)
    ```
    """

    def __init__(self, *args, derivative_head_config: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._add_head(derivative_head_config)

    __init__ = _with_head_argument(__init__, UNet2DConditionModel)
    forward = _recorded(UNet2DConditionModel.forward)
