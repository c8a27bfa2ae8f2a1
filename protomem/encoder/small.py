"""A small convolutional encoder for demonstrations and tests on a CPU: 41 M multiply-adds at 112 x 112.

A 7x7 convolution of stride 4 brings the image to 28 x 28, three residual stages of plain 3x3 convolutions (32, 64, 128
channels; plain, since depthwise ones are bound by memory on CPUs) to 7 x 7, all of which the fully connected layer
reads. Channels-last memory makes it about a third faster.
Legend: b local batch, F flattened features, D embedding size.
"""

from __future__ import annotations

import torch
from torch import nn

from protomem.encoder.base import Encoder, last_batchnorm

STEM, STAGES = 32, ((32, 1), (64, 2), (128, 2))  # channels, stride of each stage


class Block(nn.Module):
    """Residual block of He et al. 2016 (arXiv 1512.03385): conv-BN-ReLU-conv-BN, sum, ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class SmallNet(Encoder):
    """Images of any size S; fc reads 128 x ceil(S/16)^2 features (6,272 at 112). He initialisation."""

    def __init__(self, embedding_size: int, dropout: float, last_bn: str, checkpointing: bool, input_size: int):
        super().__init__(checkpointing)
        self.conv1 = nn.Conv2d(3, STEM, 7, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.blocks = nn.ModuleList()
        channels_in = STEM
        for channels, stride in STAGES:
            self.blocks.append(Block(channels_in, channels, stride))
            channels_in = channels
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels_in * (-(-input_size // 16)) ** 2, embedding_size)
        self.features = last_batchnorm(embedding_size, last_bn)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pre_fc(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = self.run_block(block, x)
        return torch.flatten(x, 1)
