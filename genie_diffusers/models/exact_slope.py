"""Exact dε/dλ along the probability-flow ODE, by forward-mode automatic differentiation of the denoiser."""

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .guidance import holds
from .sources import CallRecord, ModelCall, ModelSource, map_tensors

#: levels of forward mode and the choice of an attention kernel are those of the process, not of a thread
_FORWARD_MODE = threading.RLock()


class ExactSlope(ModelSource):
    """
    A slope source for [`GenieScheduler.attach`] that differentiates the denoiser itself.

    With (x, t) moving along the probability-flow ODE, dx/dλ = σ² x − σ ε, the slope

        dε/dλ = ∂ε/∂x · (σ² x − σ ε) + ∂ε/∂t · dt/dλ

    is one forward-mode Jacobian-vector product over (x, t) together, at the arguments of the denoiser's last call.
    Under guidance every branch is differentiated along the guided velocity. It costs three to five forward passes
    a step on top of the step's own (`benchmarks/cost.py`).

    Args:
        model (`torch.nn.Module`):
            The denoiser, such as `pipe.unet`: called with the sample first and a `timestep`. Its weights and modules
            are left as they are; a forward hook remembers its calls since the last step, until the source is detached,
            garbage or [`~ExactSlope.remove`]d.

    Example:

    ```py
    >>> pipe.scheduler.attach(ExactSlope(pipe.unet))
    ```
    """

    def __init__(self, model: torch.nn.Module):
        self._hooked = model
        self._model = getattr(model, "_orig_mod", model)  # forward mode needs the module behind `torch.compile`
        self._signature = inspect.signature(self._model.forward)
        super().__init__(_Arguments())

    def _start(self) -> Callable[[], None]:
        record: Any = self._record
        record.start()
        hook = self._hooked.register_forward_hook(record.keep_call, with_kwargs=True)

        def stop():
            hook.remove()
            record.stop()

        return stop

    @torch.no_grad()
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
        dε/dλ at `sample`, along the velocity of `noise_prediction`; shape of `sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, ...)`): What the denoiser was called with.
            noise_prediction (`torch.Tensor` of the same shape): ε, the guided one under guidance.
            timestep (`float`): Of the sample.
            step, history_slope (*optional*): Of heads; nothing here.
            model_output (`torch.Tensor` of the same shape, *optional*):
                What the pipeline has made of the denoiser's outputs. Without it, it is computed from
                `noise_prediction`, less exactly.

        Raises:
            ValueError: If the denoiser was not called with `sample` and `timestep`, its outputs do not combine to the
                prediction, or it has hooks of diffusers, such as group offloading.
        """
        if not self._record.calls() or self._process is None:
            raise ValueError(
                "`ExactSlope` needs its model to be called before `step`, by the pipeline it is attached to."
            )
        check = self._check(sample.device)
        calls, counts = self._branches(sample, check)
        _check_differentiable(self._model)
        alpha, sigma = float(self._process.alpha(timestep)), float(self._process.sigma(timestep))
        # Eq. (1): the velocity of the sample, zero on further channels.
        velocity = velocity_of(sample, noise_prediction, sigma, self._prediction_type)
        time_dot = 1.0 / float(self._process.log_snr_derivative(timestep))
        with self._record.set_aside(), forward_mode(self._model):
            velocities = [velocity.repeat(count, *(1,) * (sample.ndim - 1)) for count in counts]
            derivatives = [
                self._derivative(call, direction, timestep, time_dot, check)
                for call, direction in zip(calls, velocities, strict=True)
            ]
            outputs_dot = self._stacked(derivatives, sample)
        # The outputs that were guided with: those of forward mode are rounded otherwise.
        outputs = self._stacked([call.output for call in calls], sample)
        if model_output is None:
            model_output = to_model_output(noise_prediction, sample, alpha, sigma, self._prediction_type)
        weights = self._weights(outputs, model_output, check)
        output, output_dot = outputs[0], outputs_dot[0]
        if weights is not None:
            output, output_dot = (weights * outputs).sum(0), (weights * outputs_dot).sum(0)
        self.forget()
        return slope_of_noise(output, output_dot, sample, velocity, alpha, sigma, self._prediction_type)

    def _derivative(
        self, call: ModelCall, velocity: torch.Tensor, timestep: float, time_dot: float, check: bool
    ) -> torch.Tensor:
        """The derivative of the output of `call` if its sample moves with `velocity` and its time with `time_dot`."""
        device = call.sample.device
        outside: Any = nullcontext()
        args, kwargs = call.read
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            # Forward mode does not know autocast: the weights' own precision, in which nothing is lost.
            dtype = next(weight.dtype for weight in self._model.parameters() if weight.is_floating_point())
            outside = torch.autocast(device.type, enabled=False)
            args, kwargs = map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        sample_name = next(iter(self._signature.parameters))
        model_input = arguments[sample_name]
        given = torch.as_tensor(arguments.get("timestep", timestep), device=device).float()
        if check and not holds(torch.isclose(given, torch.full_like(given, timestep)).all()):
            raise ValueError(
                f"`ExactSlope` needs a model that is called with the scheduler's timestep {timestep:g}, got "
                f"`timestep={arguments['timestep']}`."
            )
        x_dot = torch.zeros_like(model_input)
        x_dot[:, : velocity.shape[1]] = velocity
        time = torch.full((model_input.shape[0],), timestep, device=device, dtype=torch.float32)

        def denoise(x, t):
            call = inspect.BoundArguments(self._signature, {**arguments, sample_name: x, "timestep": t})
            return _tensor(self._model(*call.args, **call.kwargs))[:, : velocity.shape[1]]

        with outside:
            return torch.func.jvp(denoise, (model_input, time), (x_dot, torch.full_like(time, time_dot)))[1]


class _Arguments(CallRecord):
    """The calls of a denoiser, by a hook on it."""

    def keep_call(self, module, args, kwargs, output):
        if self.recording:
            args, kwargs, output = map_tensors(_detached, (args, kwargs, _tensor(output)))
            sample = args[0] if args else next(iter(kwargs.values()))
            self.add(ModelCall(sample, output, (args, kwargs)))


@contextmanager
def forward_mode(model: torch.nn.Module):
    """
    Inside, `torch.func.jvp` works through `model`, for one thread at a time; outside, nothing about it is changed.

    Fused attention has no forward-mode rule, so attention is the plain one; group normalisation needs contiguous
    tangents, so its inputs are copied to that format. What heads read of the calls inside is forgotten.
    """
    modules = list(model.modules())
    records = [record for module in modules if isinstance(record := vars(module).get("_calls"), CallRecord)]
    norms = [module for module in modules if isinstance(module, torch.nn.GroupNorm)]
    with _FORWARD_MODE, ExitStack() as stack:
        for record in records:
            stack.enter_context(record.set_aside())
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(_contiguous_input).remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _check_differentiable(model: torch.nn.Module):
    """Raise a `ValueError` if diffusers' hooks change weights or skip layers while the model is called."""
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            raise ValueError(
                f"`ExactSlope` cannot differentiate a model with hooks of diffusers, and {name or 'its top'!r} has "
                f"{', '.join(hooks)}. Sample without it (`scheduler.attach(None)`), or without group "
                "offloading, layerwise casting and caches; accelerate's CPU offload works."
            )


def velocity_of(sample: torch.Tensor, noise_prediction: torch.Tensor, sigma, prediction_type: str) -> torch.Tensor:
    """dx/dλ = (d log α/dλ) x − σ ε, where d log α/dλ is σ², or σ if α = 1 − σ (flow matching)."""
    return (sigma if prediction_type == "flow_prediction" else sigma**2) * sample - sigma * noise_prediction


def slope_of_noise(
    output: torch.Tensor,
    output_dot: torch.Tensor,
    sample: torch.Tensor,
    velocity: torch.Tensor,
    alpha: float,
    sigma: float,
    prediction_type: str,
) -> torch.Tensor:
    """dε/dλ from the model output and its derivative in λ, with dα/dλ = ασ² and dσ/dλ = −σα².

    α and σ may also be tensors that broadcast against `sample`. `velocity` is dx/dλ.
    """
    if prediction_type == "epsilon":
        return output_dot
    if prediction_type == "flow_prediction":  # ε = x + α v, dα/dλ = ασ
        return velocity + alpha * output_dot + alpha * sigma * output
    if prediction_type == "v_prediction":  # ε = α v + σ x
        return alpha * output_dot + sigma * velocity + alpha * sigma * (sigma * output - alpha * sample)
    # ε = (x − α x_0)/σ
    noise = to_noise_prediction(output, sample, alpha, sigma, prediction_type)
    return (velocity - alpha * output_dot) / sigma - alpha * sigma * output + alpha**2 * noise


def to_noise_prediction(
    output: torch.Tensor, sample: torch.Tensor, alpha: float, sigma: float, prediction_type: str
) -> torch.Tensor:
    """ε from the model output; α and σ may also be tensors that broadcast against `sample`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha * output + sigma * sample
    if prediction_type == "flow_prediction":
        return sample + alpha * output
    return (sample - alpha * output) / sigma


def to_model_output(
    noise_prediction: torch.Tensor, sample: torch.Tensor, alpha: float, sigma: float, prediction_type: str
) -> torch.Tensor:
    """ε as the model would have said it: ε itself, v = (ε − σ x)/α, x_0 = (x − σ ε)/α, or v = (ε − x)/α on flows."""
    if prediction_type == "epsilon":
        return noise_prediction
    if prediction_type == "v_prediction":
        return (noise_prediction - sigma * sample) / alpha
    if prediction_type == "flow_prediction":
        return (noise_prediction - sample) / alpha
    return (sample - sigma * noise_prediction) / alpha


def _tensor(output) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _contiguous_input(module, args):
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
