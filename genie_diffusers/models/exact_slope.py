"""Exact dε/dλ along the probability-flow ODE, by forward-mode automatic differentiation of the denoiser."""

import inspect
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..processes import VariancePreserving
from .guidance import RunCheck, branch_weights, count_branches


class ExactSlope:
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
            are left as they are; a forward hook remembers the last call until [`~ExactSlope.remove`].

    Example:

    ```py
    >>> pipe.scheduler.attach(ExactSlope(pipe.unet))
    ```
    """

    def __init__(self, model: torch.nn.Module):
        self._model = getattr(model, "_orig_mod", model)  # forward mode needs the module behind `torch.compile`
        self._signature = inspect.signature(self._model.forward)
        self._call: inspect.BoundArguments | None = None
        self._output: torch.Tensor | None = None
        self._recording = True
        self._process: VariancePreserving | None = None
        self._check = RunCheck()
        self._hook = model.register_forward_hook(self._record, with_kwargs=True)

    def remove(self):
        """Take the hook off the denoiser and forget its last call."""
        self._hook.remove()
        self._call = self._output = None

    def bind(self, process: VariancePreserving, prediction_type: str):
        """Called by the scheduler with the diffusion it samples and what the denoiser predicts."""
        self._process, self._prediction_type = process, prediction_type

    def _record(self, module, args, kwargs, output):
        if self._recording:
            self._call, self._output = self._signature.bind(*args, **kwargs), _tensor(output)

    @torch.no_grad()
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
        dε/dλ at `sample`, along the velocity of `noise_prediction`; shape of `sample`.

        Raises:
            ValueError: If the denoiser was not called with `sample`, or its outputs do not combine to the prediction.
        """
        if self._call is None or self._output is None or self._process is None:
            raise ValueError(
                "`ExactSlope` needs its model to be called before `step`, by the pipeline it is attached to."
            )
        arguments = dict(self._call.arguments)
        sample_name = next(iter(self._signature.parameters))
        model_input = arguments[sample_name]
        check = self._check(timestep, sample.device)
        branches = count_branches(model_input, sample, check)
        if check and not torch.allclose(
            torch.as_tensor(arguments.get("timestep", timestep)).double().cpu(), torch.tensor(timestep).double()
        ):
            raise ValueError(
                f"`ExactSlope` needs a model that is called with the scheduler's timestep {timestep:g}, got "
                f"`timestep={arguments['timestep']}`."
            )
        alpha, sigma = float(self._process.alpha(timestep)), float(self._process.sigma(timestep))
        # Eq. (1): the velocity of the sample, zero on further channels.
        velocity = velocity_of(sample, noise_prediction, sigma, self._prediction_type)
        x_dot = torch.zeros_like(model_input)
        x_dot[:, : sample.shape[1]] = velocity.repeat(branches, *(1,) * (sample.ndim - 1))
        time = torch.full((model_input.shape[0],), timestep, device=sample.device, dtype=torch.float32)
        time_dot = torch.full_like(time, 1.0 / float(self._process.log_snr_derivative(timestep)))

        def denoise(x, t):
            call = inspect.BoundArguments(self._signature, {**arguments, sample_name: x, "timestep": t})
            return _tensor(self._model(*call.args, **call.kwargs))[:, : sample.shape[1]]

        self._recording = False
        try:
            with forward_mode(self._model):
                output_dot = torch.func.jvp(denoise, (model_input, time), (x_dot, time_dot))[1]
        finally:
            self._recording = True
        # The outputs that were guided with: those of forward mode are rounded otherwise.
        output = self._output[:, : sample.shape[1]]
        if branches > 1:
            shape = (branches, sample.shape[0])
            outputs, outputs_dot = output.unflatten(0, shape), output_dot.unflatten(0, shape)
            guided = to_model_output(noise_prediction, sample, alpha, sigma, self._prediction_type)
            weights = branch_weights(outputs, guided, check)
            output, output_dot = (weights * outputs).sum(0), (weights * outputs_dot).sum(0)
        return slope_of_noise(output, output_dot, sample, velocity, alpha, sigma, self._prediction_type)


@contextmanager
def forward_mode(model: torch.nn.Module):
    """
    Inside, `torch.func.jvp` works through `model`; outside, nothing about it is changed.

    Fused attention has no forward-mode rule, so attention is the plain one; group normalisation needs contiguous
    tangents, so its inputs are copied to that format.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(_contiguous_input) for norm in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for hook in hooks:
            hook.remove()


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


def _contiguous_input(module, args):
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
