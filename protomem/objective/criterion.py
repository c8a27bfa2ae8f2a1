"""From unit embeddings and columns to a loss per row: the head, the margin on the target, and the criterion."""

from __future__ import annotations

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
