"""IResNet 18/34/50/100/200, key for key the form of insightface's arcface_torch, so that its weight files load.

Improved residual blocks (Duta et al. 2020, arXiv 2004.04989, as ArcFace uses them): BN-conv-BN-PReLU-conv(stride)-BN,
no activation after the sum. Legend: b local batch, F flattened features, D embedding size.
"""

from __future__ import annotations

import torch
from torch import nn

from protomem.encoder.base import Encoder, last_batchnorm

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in, eps=1e-5)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-5)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels, eps=1e-5)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels, eps=1e-5)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(Encoder):
    """Images of any size S; four stages of stride 2, so fc reads 512 x ceil(S/16)^2 features (25,088 at 112).

    Convolutions start from N(0, 0.1) and the fully connected layer from torch's default, as in insightface. With
    untouched running statistics (freeze_statistics before any training) such weights blow up: load weights first.
    """

    def __init__(
        self, depth: int, embedding_size: int, dropout: float, last_bn: str, checkpointing: bool, input_size: int
    ):
        super().__init__(checkpointing)
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-5)
        self.prelu = nn.PReLU(64)
        channels_in = 64
        for stage, (channels, blocks) in enumerate(zip((64, 128, 256, 512), DEPTHS[depth]), start=1):
            layer = [Block(channels_in, channels, 2)] + [Block(channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
            channels_in = channels
        self.bn2 = nn.BatchNorm2d(512, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512 * (-(-input_size // 16)) ** 2, embedding_size)
        self.features = last_batchnorm(embedding_size, last_bn)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def pre_fc(self, images: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = self.run_block(block, x)
        return torch.flatten(self.bn2(x), 1)
