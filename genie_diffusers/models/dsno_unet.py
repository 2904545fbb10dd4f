"""A neural operator from noise to the whole trajectory: DSNO (Zheng et al., 2023, https://huggingface.co/papers/2211.13449)."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here when a pipeline is loaded)
from diffusers.utils import BaseOutput

from ..core.time_grids import time_grid as spaced
from ..processes import VariancePreserving


@dataclass
class DSNOOutput(BaseOutput):
    """
    Args:
        trajectory (`torch.Tensor` of shape `(batch, time, channels, height, width)`):
            The states at the solution timesteps, from noisy to clean; the last one is the picture.
    """

    trajectory: torch.Tensor


class TemporalFourierLayer(torch.nn.Module):
    """
    h + act(irfft(R · rfft(h))) over the time points, R a learned complex matrix for each of the lowest frequencies.

    The two transforms are written as products with real matrices: so few points need no fast algorithm, and every
    compiler and exporter knows them. They and R run in at least float32, under autocast too; act is a leaky ReLU.

    Args:
        channels (`int`): Channels of h, whose batch holds the time points of each sample one after another.
        num_time_points (`int`): M, the number of time points.
        modes (`int`): Frequencies kept, the constant included, at most M // 2 + 1.
    """

    def __init__(self, channels: int, num_time_points: int, modes: int):
        super().__init__()
        self.num_time_points, self.modes = num_time_points, modes
        #: real and imaginary part of R, (frequency, channel in, channel out, 2), uniform in [0, 1/(C_in C_out))
        self.weight = torch.nn.Parameter(torch.rand(modes, channels, channels, 2) / channels**2)

    def spectral(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        irfft(R · rfft(h)), linear in h; of the shape of h, in at least float32.

        Args:
            hidden (`torch.Tensor` of shape `(batch · M, channels, height, width)`): h.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            points = torch.arange(self.num_time_points, device=hidden.device)
            frequencies = points[: self.modes]
            # an integer multiple of the smallest angle, reduced before it is rounded
            turns = (frequencies[:, None] * points) % self.num_time_points
            angles = turns.to(dtype) * (2 * math.pi / self.num_time_points)
            # (frequency, real or imaginary part, time): e^{−2πi k m/M}, and a frequency counts with its negative
            basis = torch.stack([angles.cos(), -angles.sin()], dim=1)
            single = (2 * frequencies) % self.num_time_points == 0
            counts = torch.where(single, 1.0, 2.0).to(dtype) / self.num_time_points
            real, imaginary = self.weight.to(dtype).unbind(-1)
            # the complex product as a real matrix on (real, imaginary) channels
            matrix = torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)], dim=2)
            times = hidden.to(dtype).unflatten(0, (-1, self.num_time_points))
            spectrum = (basis.flatten(0, 1) @ times.flatten(2)).unflatten(1, (self.modes, 2))
            spectrum = spectrum.unflatten(3, (hidden.shape[1], -1)).flatten(2, 3)  # (batch, frequency, 2C, pixels)
            product = matrix.mT @ spectrum
            product = product.unflatten(2, (2, -1)).flatten(3).flatten(1, 2)
            synthesis = (basis * counts[:, None, None]).flatten(0, 1).mT
            return (synthesis @ product).reshape(hidden.shape)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor` of shape `(batch · M, channels, height, width)`): h.
        """
        return hidden + torch.nn.functional.leaky_relu(self.spectral(hidden)).to(hidden.dtype)

    def after(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """This layer as a forward hook of the module that it follows."""
        return self(output)


class DSNOUNet2DModel(UNet2DModel):
    """
    A [`UNet2DModel`] that maps noise to the states x_{t_1} … x_{t_M} of the probability-flow ODE in one call.

    The UNet sees the noise x_T once for each time point, folded into its batch, with that point's timestep τ_m. A
    [`TemporalFourierLayer`] lets the points see each other after every residual (and attention) pair of its down and
    up path and after its middle. Its output F becomes the states by

        x_{t_m} = a_m x_T + b_m F(x_T, τ_m)

    With a_m, b_m of [`jump_weights`] and zero spectral weights, that is the DDIM step from τ_m to t_m of the denoiser
    it was built from. Takes the arguments of [`UNet2DModel`] besides its own; usually built by
    [`~DSNOUNet2DModel.from_unet`].

    Args:
        solution_timesteps (`list[float]`):
            t_m, decreasing; the last one may be that of clean data (−1 for discrete schedules).
        timesteps (`list[float]`): τ_m, what the UNet is told at each time point.
        output_weights (`list[list[float]]`): a_m and b_m of each time point.
        modes (`int`): Frequencies that the temporal layers keep, from 0 (no such layers) to M // 2 + 1.

    Raises:
        ValueError: If the lists differ in length, or `modes` is out of range.
    """

    def __init__(
        self,
        *args,
        solution_timesteps: Sequence[float],
        timesteps: Sequence[float],
        output_weights: Sequence[Sequence[float]],
        modes: int,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        lengths = {len(solution_timesteps), len(timesteps), len(output_weights)}
        if len(lengths) > 1 or lengths == {0} or any(len(weights) != 2 for weights in output_weights):
            raise ValueError(
                "`solution_timesteps`, `timesteps` and `output_weights` must have one entry for each time point, the "
                f"last of two weights, got {solution_timesteps}, {timesteps} and {output_weights}."
            )
        largest = len(timesteps) // 2 + 1
        if not 0 <= modes <= largest:
            raise ValueError(
                f"`modes` must be between 0 and {largest}, the frequencies of {len(timesteps)} time points, got "
                f"{modes}."
            )
        self.register_to_config(
            solution_timesteps=[float(t) for t in solution_timesteps],
            timesteps=[float(t) for t in timesteps],
            output_weights=[[float(weight) for weight in weights] for weights in output_weights],
            modes=modes,
        )
        # Hooks, so that the UNet's weights keep their names and its code stays where it is.
        self.temporal_layers = torch.nn.ModuleList()
        for module, channels in self._places() if modes else ():
            layer = TemporalFourierLayer(channels, len(timesteps), modes)
            self.temporal_layers.append(layer)
            module.register_forward_hook(layer.after)

    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        # diffusers reads from it what a configuration may hold; so it follows every release of diffusers
        [
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            *(
                parameter
                for parameter in inspect.signature(__init__).parameters.values()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            ),
        ]
    )

    def _places(self) -> list[tuple[torch.nn.Module, int]]:
        """The modules that temporal layers follow, and their channels."""
        places = []
        for block in (*self.down_blocks, *self.up_blocks):
            attentions = getattr(block, "attentions", ())
            ends = attentions if len(attentions) == len(block.resnets) else block.resnets
            places += [(end, resnet.out_channels) for end, resnet in zip(ends, block.resnets, strict=True)]
        if self.mid_block is not None:
            places.append((self.mid_block, self.config.block_out_channels[-1]))
        return places

    @property
    def num_time_points(self) -> int:
        """M, the number of states in a trajectory."""
        return len(self.config.timesteps)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DModel,
        num_time_points: int = 4,
        modes: int = 2,
        scheduler_config=None,
        time_grid: str = "quadratic",
        timesteps: Sequence[float] | None = None,
        output_weights: Sequence[Sequence[float]] | None = None,
    ) -> "DSNOUNet2DModel":
        """
        An operator that starts from the weights of a denoiser, which are copied.

        Args:
            unet ([`UNet2DModel`]): The teacher; class-conditional or not.
            num_time_points (`int`, defaults to 4): M.
            modes (`int`, defaults to 2):
                Frequencies that the temporal layers keep. 0 leaves them out: with one time point, a plain regression
                of the picture on the noise.
            scheduler_config (mapping, *optional*): Configuration of the scheduler the teacher was trained with.
            time_grid (`str`, defaults to `"quadratic"`):
                The spacing of t_0 = T > t_1 > … > t_M, one of [`GenieScheduler`]'s grids between both ends of the
                process; the last point is moved to clean data.
            timesteps (`Sequence[float]`, *optional*): τ_m; by default t_{m−1}, the point before.
            output_weights (`Sequence[Sequence[float]]`, *optional*): a_m and b_m; by default [`jump_weights`].

        Raises:
            ValueError: If `num_time_points` or `modes` is out of range, or a grid or prediction type is unknown.
        """
        if num_time_points < 1:
            raise ValueError(f"`num_time_points` must be at least 1, got {num_time_points}.")
        config = dict(scheduler_config or {})
        process = VariancePreserving.from_config(config)
        points = spaced(process, time_grid, num_time_points + 1).tolist()
        points[-1] = process.timestep_data
        timesteps = points[:-1] if timesteps is None else timesteps
        if output_weights is None:
            prediction_type = config.get("prediction_type", "epsilon")
            output_weights = [
                jump_weights(process, prediction_type, start, end)
                for start, end in zip(timesteps, points[1:], strict=True)
            ]
        # a teacher with a head has keys and weights of its own, which stay behind
        known = inspect.signature(UNet2DModel.__init__).parameters
        model = cls(
            **{key: value for key, value in unet.config.items() if key in known},
            solution_timesteps=points[1:],
            timesteps=timesteps,
            output_weights=output_weights,
            modes=modes,
        )
        weights = unet.state_dict()
        model.load_state_dict({name: weights.get(name, own) for name, own in model.state_dict().items()})
        # `ModelMixin.to` warns about float32 modules whenever it is given a dtype.
        return torch.nn.Module.to(model, device=unet.device, dtype=unet.dtype).train(unet.training)

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> DSNOOutput | tuple[torch.Tensor]:
        """
        The trajectory that starts at `sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Standard normal noise x_T.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes, for class-conditional models.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DSNOOutput`] or a tuple.
        """
        points = self.num_time_points
        dtype = torch.promote_types(sample.dtype, torch.float32)
        timesteps = torch.tensor(self.config.timesteps, device=sample.device).repeat(sample.shape[0])
        if class_labels is not None:
            class_labels = class_labels.repeat_interleave(points)
        output = super().forward(
            sample.repeat_interleave(points, dim=0), timesteps, class_labels=class_labels, return_dict=False
        )[0]
        output = output[:, : sample.shape[1]].unflatten(0, (-1, points)).to(dtype)
        weights = torch.tensor(self.config.output_weights, dtype=dtype, device=sample.device)
        of_sample, of_output = weights.T[:, :, None, None, None]
        trajectory = (of_sample * sample[:, None].to(dtype) + of_output * output).to(sample.dtype)
        return DSNOOutput(trajectory=trajectory) if return_dict else (trajectory,)


def jump_weights(
    process: VariancePreserving, prediction_type: str, timestep: float, solution_timestep: float
) -> tuple[float, float]:
    """
    Weights of x and the model output F(x, τ) in the DDIM step from τ to t: α_t D + σ_t ε (Song et al., 2021, (12)).

    Args:
        process ([`VariancePreserving`]): The diffusion.
        prediction_type (`str`): What the model predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        timestep (`float`): τ.
        solution_timestep (`float`): t.

    Raises:
        ValueError: For another prediction type.
    """
    (alpha, alpha_t), (sigma, sigma_t) = (
        level([timestep, solution_timestep]).tolist() for level in (process.alpha, process.sigma)
    )
    if prediction_type == "epsilon":  # D = (x − σ F)/α
        return alpha_t / alpha, sigma_t - alpha_t * sigma / alpha
    if prediction_type == "sample":  # ε = (x − α F)/σ
        return sigma_t / sigma, alpha_t - sigma_t * alpha / sigma
    if prediction_type == "v_prediction":  # D = α x − σ F, ε = σ x + α F
        return alpha_t * alpha + sigma_t * sigma, sigma_t * alpha - alpha_t * sigma
    raise ValueError(f"`prediction_type` must be 'epsilon', 'sample' or 'v_prediction', got {prediction_type!r}.")
