"""MobileFaceNet in the form of insightface's arcface_torch (`mbf`, width x2), key for key, so that its files load.

Chen et al. 2018 (arXiv 1804.07573): inverted residuals with PReLU and, instead of average pooling, a depthwise
convolution as large as the last feature map. insightface doubles the widths and embeds from 512 channels.
Legend: b local batch, F flattened features (512), D embedding size.
"""

from __future__ import annotations

import torch
from torch import nn

from protomem.encoder.base import Encoder, last_batchnorm, without_autocast


class Layers(nn.Module):
    """A sequence under the name `layers`: the nesting that the public key names have."""

    def __init__(self, *layers: nn.Module, residual: bool = False):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def conv(channels_in: int, channels: int, kernel=1, stride=1, groups=1, act: bool = True) -> Layers:
    """Convolution, BatchNorm and, unless act=False, PReLU. Padding keeps the size of 3x3; none otherwise."""
    padding = 1 if kernel == 3 else 0
    layers = [nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)]
    layers += [nn.BatchNorm2d(channels)] + ([nn.PReLU(channels)] if act else [])
    return Layers(*layers)


def bottleneck(channels_in: int, channels: int, middle: int, stride: int, residual: bool) -> Layers:
    """1x1 to `middle` channels, depthwise 3x3, linear 1x1 back."""
    return Layers(
        conv(channels_in, middle),
        conv(middle, middle, 3, stride, groups=middle),
        conv(middle, channels, act=False),
        residual=residual,
    )


class MobileFaceNet(Encoder):
    """Images of any size S; the last depthwise kernel covers ceil(S/16) x ceil(S/16) (7 x 7 at 112).

    He initialisation by fan-out, the fully connected layer too, as in insightface. There the last BatchNorm's weight is
    learnable; here `last_bn` decides as for the other encoders.
    """

    def __init__(self, embedding_size: int, dropout: float, last_bn: str, checkpointing: bool, input_size: int):
        super().__init__(checkpointing)
        stages = [conv(3, 128, 3, 2), conv(128, 128, 3, 1, groups=64)]
        for channels_in, channels, down, middle, repeats in (
            (128, 128, 128, 128, 4),
            (128, 256, 256, 256, 6),
            (256, 256, 512, 256, 2),
        ):
            stages.append(bottleneck(channels_in, channels, down, 2, residual=False))
            stages.append(Layers(*(bottleneck(channels, channels, middle, 1, residual=True) for _ in range(repeats))))
        self.layers = nn.ModuleList(stages)
        self.conv_sep = conv(256, 512)
        self.dropout = nn.Dropout(dropout)
        pool = conv(512, 512, -(-input_size // 16), groups=512, act=False)
        fc = nn.Linear(512, embedding_size, bias=False)
        # One Sequential called `features.layers` in the public files: pooling, flatten, fc, last BatchNorm.
        self.features = Layers(pool, nn.Flatten(), fc, last_batchnorm(embedding_size, last_bn))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pre_fc(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for stage in self.layers:
            x = self.run_block(stage, x)
        return torch.flatten(self.features.layers[0](self.conv_sep(x)), 1)

    def embed(self, flat: torch.Tensor) -> torch.Tensor:
        _, _, fc, norm = self.features.layers
        with without_autocast(flat.device):
            return norm(fc(self.dropout(flat.to(fc.weight.dtype))))
