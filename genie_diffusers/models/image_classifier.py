"""A small classifier of pictures, whose features distances between sets of pictures are measured on."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D


class ImageClassifier(ModelMixin, ConfigMixin):
    """
    A residual network with group normalisation, so that a picture's features never depend on the rest of its batch.

    Args:
        sample_size (`int`, defaults to 32): Side of the pictures it is trained on.
        in_channels (`int`, defaults to 3): Channels of a picture.
        num_classes (`int`, defaults to 10): Number of classes.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128)`):
            Channels at each resolution, which halves in between. The last is the number of features.
        layers_per_block (`int`, defaults to 2): Residual blocks at each resolution.
        norm_num_groups (`int`, defaults to 8): Groups of the normalisations.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
    ):
        super().__init__()
        channels = block_out_channels[0]
        self.conv_in = torch.nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.blocks = torch.nn.ModuleList()
        for out_channels in block_out_channels:
            level = _ResidualBlocks()
            for _ in range(layers_per_block):
                level.append(
                    ResnetBlock2D(
                        in_channels=channels,
                        out_channels=out_channels,
                        temb_channels=None,
                        groups=norm_num_groups,
                        eps=1e-5,
                    )
                )
                channels = out_channels
            self.blocks.append(level)
        self.norm_out = torch.nn.GroupNorm(norm_num_groups, channels)
        self.classifier = torch.nn.Linear(channels, num_classes)

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """
        The output of the residual blocks at each resolution, `(batch, channels, height, width)`.

        Args:
            images (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pictures in [−1, 1].
        """
        maps = [self.blocks[0](self.conv_in(images))]
        for level in self.blocks[1:]:
            maps.append(level(torch.nn.functional.avg_pool2d(maps[-1], kernel_size=2)))
        return maps

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """
        The input of the last layer, of shape `(batch, block_out_channels[-1])`.

        Args:
            images (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pictures in [−1, 1].
        """
        hidden = self.feature_maps(images)[-1]
        return torch.nn.functional.silu(self.norm_out(hidden)).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Logits, of shape `(batch, num_classes)`.

        Args:
            images (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pictures in [−1, 1].
        """
        return self.classifier(self.features(images))


class _ResidualBlocks(torch.nn.Sequential):
    """Residual blocks without a time embedding."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self:
            hidden = block(hidden, None)
        return hidden
