"""UNets that carry a head. Their output is that of the plain UNet."""

import copy
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here when a pipeline is loaded)

from .derivative_head import DerivativeHead, UNetHead
from .exact_slope import to_model_output
from .sources import CallRecord, ModelCall, ModelSource
from .step_head import StepHead

Model = TypeVar("Model", bound="_GenieUNet")


class HeadSlope(ModelSource):
    """
    The slope source of a UNet with a head: what the head makes of the UNet's last call, at the cost of the head.

    With a [`DerivativeHead`] that is dε/dλ, the term "slope" of a row; with a [`StepHead`] it is its "residual".

    Args:
        unet ([`GenieUNet2DModel`] or [`GenieUNet2DConditionModel`]):
            The UNet.
        keeps_graph (`bool`, defaults to `False`):
            Whether gradients flow back through what the head has read of the UNet, to the sample of the step. Only for
            training through several steps: until a step has used them, all activations of a call are kept.
    """

    #: heads and their tables are learned without clipping
    learned_unclipped = True

    def __init__(self, unet: "_GenieUNet", keeps_graph: bool = False):
        if unet.derivative_head is None:
            raise ValueError(f"This `{type(unet).__name__}` has no head; build it with `from_unet`.")
        self._unet, self._head, self._keeps_graph = unet, unet.derivative_head, keeps_graph
        super().__init__(unet._calls)

    def _start(self) -> Callable[[], None]:
        record, keeps_graph = self._record, self._keeps_graph
        record.start(keeps_graph)
        return lambda: record.stop(keeps_graph)

    @property
    def term(self) -> str:  # type: ignore[override]
        return "residual" if isinstance(self._head, StepHead) else "slope"

    @property
    def tables(self) -> dict | None:
        """The tables that the head was distilled with, by number of model calls; `None` for a derivative."""
        return self._head.config.tables if isinstance(self._head, StepHead) else None

    def differentiable(self) -> "HeadSlope":
        """A source like this one, but with `keeps_graph=True`."""
        return HeadSlope(self._unet, keeps_graph=True)

    def bind(self, process, prediction_type: str):
        """Called by the scheduler; raises a `ValueError` if the head was distilled for another diffusion."""
        self._head.check_process(process, prediction_type)
        super().bind(process, prediction_type)

    def __call__(
        self,
        sample: torch.Tensor,
        noise_prediction: torch.Tensor,
        timestep: float,
        *,
        step: float | None = None,
        history_slope: torch.Tensor | None = None,
        model_output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The head's output at `sample`, along the velocity of `noise_prediction`; shape of `sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): What the UNet was called with.
            noise_prediction (`torch.Tensor` of the same shape): ε, the guided one under guidance.
            timestep (`float`): Of the sample.
            step (`float`): Step in λ about to be taken, infinite for the last one. Of a [`StepHead`] alone.
            history_slope (`torch.Tensor`, *optional*): Slope of the history; of a [`StepHead`] alone.
            model_output (`torch.Tensor` of the same shape, *optional*):
                What the pipeline has made of the UNet's outputs. Without it, it is computed from `noise_prediction`,
                less exactly.

        Raises:
            ValueError: If the UNet was not called with `sample`, or its outputs do not combine to the prediction.
        """
        if not self._record.calls() or self._process is None:
            raise ValueError(
                "The UNet must be called before `step`, by the pipeline its head is attached to. A pipeline that "
                "builds a UNet of its own, such as AnimateDiff, samples without a head: `scheduler.attach(None)`."
            )
        check = self._check(sample.device)
        calls, counts = self._branches(sample, check)
        branches = sum(counts)
        alpha, sigma = float(self._process.alpha(timestep)), float(self._process.sigma(timestep))
        outputs = self._stacked([call.output for call in calls], sample)
        if model_output is None:
            model_output = to_model_output(noise_prediction, sample, alpha, sigma, self._prediction_type)
        weights = self._weights(outputs, model_output, check)
        repeats = (branches, *(1,) * (sample.ndim - 1))
        dtype = self._head.dtype
        if self._head.device != sample.device and self._head.device.type != "meta":
            self._head.to(sample.device)  # group offloading takes it away with the UNet, which is done
        of_step = {}
        if isinstance(self._head, StepHead):
            history_slope = None if history_slope is None else history_slope.to(dtype).repeat(repeats)
            of_step = {"step": step, "history_slope": history_slope}
        slopes = self._head(
            sample.to(dtype).repeat(repeats),
            noise_prediction.to(dtype).repeat(repeats),
            *(torch.cat([call.read[name] for call in calls]).to(dtype) for name in ("features", "time_embedding")),
            alpha,
            sigma,
            **of_step,
        )
        self.forget()
        if weights is None:
            return slopes
        return (weights * slopes.unflatten(0, (branches, sample.shape[0]))).sum(0)


class _UNetCalls(CallRecord):
    """The calls of a UNet with a head, by hooks on the UNet and on two of its modules, which are its own."""

    def open_call(self, module, args):
        if self.recording:
            self.register().in_call = True

    # A forward pass outside a call is one that a backward pass repeats (gradient checkpointing).

    def keep_time_embedding(self, module, args, output):
        if self.recording and self.register().in_call:
            self.register().time_embedding = output

    def keep_features(self, module, args):
        if self.recording and self.register().in_call:
            self.register().features = args[0]

    def keep_call(self, module, args, kwargs, output):
        if not self.recording or not self.register().in_call:
            return
        register = self.register()
        sample = args[0] if args else kwargs["sample"]
        kept = [sample, output[0], register.features, register.time_embedding]
        register.in_call, register.features, register.time_embedding = False, None, None
        if not self.keeps_graph:
            kept = [tensor.detach() for tensor in kept]
        self.add(ModelCall(kept[0], kept[1], {"features": kept[2], "time_embedding": kept[3]}))


class _GenieUNet(torch.nn.Module):
    """What a UNet with a head adds to diffusers' UNet, whichever that is."""

    # of diffusers' UNets
    register_to_config: Callable
    time_embedding: torch.nn.Module
    conv_norm_out: torch.nn.Module
    config: Any

    derivative_head: UNetHead | None
    _calls: _UNetCalls

    def _add_head(self, config: dict | None):
        # The nested configuration is a plain dictionary, so that it is saved as JSON in the UNet's own.
        self.register_to_config(derivative_head_config=dict(config) if config is not None else None)
        self.derivative_head = None if config is None else _head_class(config).from_config(dict(config))
        self._calls = _UNetCalls()
        self.register_forward_pre_hook(self._calls.open_call)
        self.register_forward_hook(self._calls.keep_call, with_kwargs=True)
        self._record_from_children()

    def _record_from_children(self):
        self.time_embedding.register_forward_hook(self._calls.keep_time_embedding)
        self.conv_norm_out.register_forward_pre_hook(self._calls.keep_features)

    @property
    def last_call(self) -> dict[str, torch.Tensor] | None:
        """
        What the head reads of this thread's last call: `"sample"`, `"output"`, `"features"`, `"time_embedding"`.

        It is recorded while a scheduler has the head attached that has not used it yet, and inside
        [`~GenieUNet2DModel.recording`]; otherwise `None`.
        """
        calls = self._calls.calls()
        return {"sample": calls[-1].sample, "output": calls[-1].output, **calls[-1].read} if calls else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, `last_call` is what the head reads of the last call."""
        self._calls.start()
        try:
            yield
        finally:
            self._calls.stop()

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

        `unet` itself is left as it is. It may be one that `torch.compile` has returned; the result is not compiled.

        Args:
            unet: The plain UNet.
            derivative_head ([`DerivativeHead`], [`StepHead`] or `str`):
                The head, or the Hub id or folder to load it from. It is moved to device and precision of the UNet.
            kwargs:
                Passed to the head's `from_pretrained`, such as `subfolder`, `revision` or `token`.

        Raises:
            ValueError: If the head does not fit the UNet, or the UNet's weights are offloaded.
        """
        unet = getattr(unet, "_orig_mod", unet)
        _check_in_memory(unet)
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
        # Children are shared whole, with whatever adapters and hooks they carry, but for the two that are listened to.
        for name, child in unet.named_children():
            if name != "derivative_head":
                setattr(model, name, _twin(child) if name in ("time_embedding", "conv_norm_out") else child)
        # What adapters have noted beside the children: the names of LoRAs, the kind of an IP-Adapter.
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(unet):
                setattr(model, name, vars(unet)[name])
        if isinstance(unet, UNet2DConditionModel):
            model.config.encoder_hid_dim_type = unet.config.encoder_hid_dim_type
        model._record_from_children()
        # `ModelMixin.to` warns about float32 modules whenever it is given a dtype; the head has none.
        model.derivative_head = torch.nn.Module.to(head, device=unet.device, dtype=unet.dtype)
        if hasattr(unet, "_hf_hook"):  # of model offloading, or of weights on several devices
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(model, unet._hf_hook)
        return model.train(unet.training)


def _check_in_memory(unet: torch.nn.Module):
    """Raise a `ValueError` for a UNet whose own hooks bring its weights where they are needed, and remove them."""
    offloaded = any(parameter.is_meta for parameter in unet.parameters())
    offloaded = offloaded and any(hasattr(module, "_hf_hook") for module in unet.modules())
    registries = [getattr(module, "_diffusers_hook", None) for module in unet.modules()]
    if offloaded or any("group_offloading" in getattr(registry, "hooks", ()) for registry in registries):
        raise ValueError(
            "`unet` must have its weights in memory, but they are offloaded (sequential CPU offload or group "
            "offload). Add the head first and offload then; `pipe.remove_all_hooks()` undoes sequential offload."
        )


def _twin(child: torch.nn.Module) -> torch.nn.Module:
    """
    A module with hooks of its own whose parameters and children are those of `child`, whatever becomes of them: moved,
    offloaded or replaced by an adapter.
    """
    twin = copy.copy(child)
    for name, hooks in vars(child).items():
        if isinstance(hooks, OrderedDict) and "_hooks" in name:
            setattr(twin, name, OrderedDict((key, hook) for key, hook in hooks.items() if not _listens(hook)))
    return twin


def _listens(hook) -> bool:
    """Whether `hook` is that of another head, added to this UNet before."""
    return isinstance(getattr(hook, "__self__", None), CallRecord)


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
