"""Vision transformers for face crops: ViT-T/S/B/L in the widths the face field uses. LayerNorm only.

Widths and depths are those of insightface's arcface_torch (256x12, 512x12, 512x24, 768x24; 8 heads), and like there
all tokens are flattened into the fully connected layer, because in an aligned crop position means something.
Different (our default): patches of 8 pixels, so that 112 pixels divide evenly into 14 x 14 tokens, where 9-pixel
patches leave 4 pixels of each side unread; GELU; no random masking; no BatchNorm anywhere, so that no result depends
on the rest of the batch. Weight files of insightface's ViTs therefore do not load.
Legend: b local batch, T tokens, E width, H heads, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from protomem.encoder.base import Encoder
from protomem.errors import UserError

SIZES = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}  # width, depth
PATCH, HEADS = 8, 8


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, arXiv 2010.11929): x + attention, then x + MLP(4E)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [b,T,E]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [3,b,H,T,E/H]
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(Encoder):
    """Images S x S with S divisible by 8 (UserError otherwise); fc reads T x E features (T = 196 at 112).

    Linear layers and positions start from a normal of deviation 0.02 cut at two deviations; the fully connected layer
    from deviation 1/sqrt(T E), so that embeddings start with a norm near sqrt(D), where a frozen BatchNorm would hold
    them (our default).
    """

    def __init__(
        self, size: str, embedding_size: int, dropout: float, last_bn: str, checkpointing: bool, input_size: int
    ):
        super().__init__(checkpointing)
        if last_bn == "learnable":
            raise UserError(f"last_bn=learnable has no effect on {size}, which has no BatchNorm; remove it")
        if input_size % PATCH:
            raise UserError(f"{size} needs an input size divisible by {PATCH}, not {input_size}; 112 is usual")
        width, depth = SIZES[size]
        tokens = (input_size // PATCH) ** 2
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(tokens * width, embedding_size)
        self.features = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02, a=-0.04, b=0.04)
        nn.init.normal_(self.fc.weight, std=self.fc.in_features**-0.5)

    def pre_fc(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = self.run_block(block, x)
        return torch.flatten(self.norm(x), 1)
