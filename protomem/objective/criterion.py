"""From unit embeddings and columns to a loss per row: the head, the margin on the target, and the criterion."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import nn

from protomem.head import Columns, objective
from protomem.objective.margins import Margin


class Criterion(nn.Module):
    """Cross-entropy: softplus(lse_neg - z_y). Stateless."""

    def forward(
        self, x: torch.Tensor, norm: torch.Tensor, columns: Columns, head: Callable, margin: Margin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss [B], cos_y [B]) of unit embeddings x [B, D], whose norms were `norm` [B]."""
        cos_y, lse_neg = head(x, columns, margin.scale, margin.negatives)
        return objective(margin.scale * margin.target(cos_y, norm), lse_neg), cos_y


class UnifiedCriterion(Criterion):
    """Unified cross-entropy (UniFace, Zhou et al. 2023): one threshold b on all logits in place of a softmax.

        softplus(-(z_y - b)) + l sum_{j != y} softplus(z_j - b)

    b [1] fp32 learns; it starts at log(10 num_identities) (published code) unless `bias` is given. negatives: l (1).
    Its gradient is computed alike, and whole, on every rank. The published code also clamps z - b to [-s, s], beyond which
    nothing has a gradient; this does not.
    """

    def __init__(self, num_identities: int, bias: float | None = None, negatives: float = 1.0):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([math.log(10 * num_identities) if bias is None else bias]))
        self.negatives = negatives

    def forward(
        self, x: torch.Tensor, norm: torch.Tensor, columns: Columns, head: Callable, margin: Margin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos_y, total = head(x, columns, margin.scale, margin.negatives, threshold=self.bias)
        return objective(margin.scale * margin.target(cos_y, norm), self.bias) + self.negatives * total, cos_y
