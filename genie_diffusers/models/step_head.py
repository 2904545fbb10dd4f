"""A distilled step: weights learned for each number of model calls, and a small network for what they leave over."""

import math

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here when a model is loaded)
from diffusers.models.resnet import ResnetBlock2D

from .derivative_head import UNetHead, head_arguments

#: steps in λ are told to the network up to this length; the last step, to clean data, is infinite
LONGEST_STEP = 8.0


class StepHead(UNetHead):
    """
    What one step of a solver with few model calls misses of the path that it approximates.

    GENIE's head knows the derivative of the noise prediction at a point. With few, long steps more can be learned: the
    landing of the whole step. For each number of model calls this head has a *table*, timesteps and rows of weights
    of the sample and the last noise predictions,

        x_{n+1} = w_n x_n + Σ_j w_{n,j} ε_{n−j} + r_n k(x_n, ε_n, features, slope of the history, t_n, h_n)

    whose weights are fitted by least squares to converged solutions of the probability-flow ODE, and a network k that
    is trained, through the whole chain of steps, on what is left; r_n is the root mean square of what the weights
    alone miss. Its last layer starts at zero.

    [`GenieScheduler.attach`] takes the table of the requested number of model calls from here, timesteps included; a
    number that has none, and a run that starts mid-way where rows weigh what lies before, is sampled by the
    scheduler's own method.

    Args:
        in_channels (`int`): Channels of the sample.
        feature_channels (`int`): Channels of the denoiser's last features (the input of its `conv_norm_out`).
        time_embedding_dim (`int`): Size of the denoiser's time embedding.
        width (`int`, defaults to 32): Channels inside the head; twice as many at half resolution.
        norm_num_groups (`int`, defaults to 8): Groups of its normalisations.
        tables (`dict`, *optional*):
            For each number of model calls, as a string, [`Table.to_dict`] of its sampler, whose rows weigh
            `"sample"`, x_n; `"prediction"`, ε_n, ε_{n−1}, …; and `"residual"`, by r_n (absent: the network is not
            called). The run ends at clean data.
        process (`dict`, *optional*): Noise schedule it was distilled for, as scheduler configuration keys.
        prediction_type (`str`, defaults to `"epsilon"`): What its denoiser predicts.
        fingerprint (`list[float]`, *optional*): [`fingerprint`] of the denoiser's weights.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        feature_channels: int,
        time_embedding_dim: int,
        width: int = 32,
        norm_num_groups: int = 8,
        tables: dict | None = None,
        process: dict | None = None,
        prediction_type: str = "epsilon",
        fingerprint: list[float] | None = None,
    ):
        super().__init__()
        embedding = 2 * width
        self.embedding = torch.nn.Sequential(
            torch.nn.Linear(time_embedding_dim + 2, embedding), torch.nn.SiLU(), torch.nn.Linear(embedding, embedding)
        )
        self.feature_norm = torch.nn.GroupNorm(norm_num_groups, feature_channels)
        self.feature_in = torch.nn.Conv2d(feature_channels, width, kernel_size=1)
        self.sample_in = torch.nn.Conv2d(3 * in_channels, width, kernel_size=3, padding=1)
        # Most of the work is done at half resolution, where it costs a quarter.
        self.down = torch.nn.Conv2d(width, 2 * width, kernel_size=2, stride=2)
        self.blocks = torch.nn.ModuleList(
            ResnetBlock2D(
                in_channels=2 * width,
                temb_channels=embedding,
                groups=norm_num_groups,
                eps=1e-5,
                time_embedding_norm="scale_shift",
            )
            for _ in range(2)
        )
        self.up = torch.nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2)
        self.block_out = ResnetBlock2D(
            in_channels=width,
            temb_channels=embedding,
            groups=norm_num_groups,
            eps=1e-5,
            time_embedding_norm="scale_shift",
        )
        self.conv_out = torch.nn.Conv2d(width, in_channels, kernel_size=3, padding=1)
        for parameter in self.conv_out.parameters():
            torch.nn.init.zeros_(parameter)

    @classmethod
    def for_unet(cls, unet: UNet2DModel, scheduler_config=None, width: int | None = None) -> "StepHead":
        """
        A new head that fits `unet`, with its noise schedule and fingerprint noted, and no tables yet.

        Args:
            unet ([`UNet2DModel`] or [`UNet2DConditionModel`]): The denoiser to distil.
            scheduler_config (mapping, *optional*): Configuration of the scheduler it was trained with.
            width (`int`, *optional*): Channels inside the head, a multiple of 8. By default half of the denoiser's
                feature channels, at least 32.

        Raises:
            ValueError: If `width` is no positive multiple of 8.
        """
        if width is None:
            width = max(32, 8 * math.ceil(unet.conv_norm_out.num_channels / 16))
        elif width < 8 or width % 8:
            raise ValueError(f"`width` must be a positive multiple of 8, got {width}.")
        return cls(**head_arguments(unet, scheduler_config), width=width)

    def forward(
        self,
        sample: torch.Tensor,
        noise_prediction: torch.Tensor,
        features: torch.Tensor,
        time_embedding: torch.Tensor,
        alpha: float,
        sigma: float,
        step: float,
        history_slope: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        What the weights of this step miss, in units of r_n; shape of `sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_n.
            noise_prediction (`torch.Tensor` of the same shape): ε_n, the guided one under guidance.
            features (`torch.Tensor` of shape `(batch, feature_channels, height, width)`): Last features.
            time_embedding (`torch.Tensor` of shape `(batch, time_embedding_dim)`): Time embedding.
            alpha, sigma (`float`): α and σ of the sample.
            step (`float`): Step in λ about to be taken, infinite for the last one.
            history_slope (`torch.Tensor` of the shape of `sample`, *optional*):
                Slope dε/dλ through this prediction and the one before; `None` in the first step.
        """
        if history_slope is None:
            history_slope = torch.zeros_like(sample)
        # The slope's size varies a hundredfold over a run; what it looks like is what can be used.
        slope = history_slope.float()
        slope = slope * slope.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).rsqrt()
        data = (sample - sigma * noise_prediction) / alpha
        inputs = torch.cat([data, noise_prediction, slope.to(sample.dtype)], dim=1)
        length = min(step, LONGEST_STEP)
        lengths = [
            time_embedding.new_full((len(time_embedding), 1), f) for f in (length / LONGEST_STEP, math.log(length))
        ]
        embedding = self.embedding(torch.cat([time_embedding, *lengths], dim=1))
        hidden = self.feature_in(self.feature_norm(features)) + self.sample_in(inputs)
        height, width = hidden.shape[-2:]
        low = self.down(torch.nn.functional.pad(hidden, (0, width % 2, 0, height % 2)))
        for block in self.blocks:
            low = block(low, embedding)
        hidden = self.block_out(hidden + self.up(low)[..., :height, :width], embedding)
        return self.conv_out(torch.nn.functional.silu(hidden))
