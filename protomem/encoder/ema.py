"""A slowly following copy of the encoder, for prototypes that change less from step to step (momentum encoder)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from protomem.errors import UserError


class EmaEncoder(nn.Module):
    """images [b,3,S,S] -> embeddings [b,D] of an exponential moving average of `source`, without gradient.

    source: the encoder that is trained, not its DDP or compiled wrapper; on its device and in its memory format already.
    It stays the owner of its weights: this module's parameters and state dict hold the copy alone.
    decay: in [0, 1), share of the old copy in each update; 0 is the source itself, one update later.
    """

    def __init__(self, source: nn.Module, decay: float):
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"prototypes.memory.key_encoder={decay} is not in [0, 1)")
        self.decay = decay
        self.encoder = copy.deepcopy(source).requires_grad_(False)
        self._source = (source,)  # in a tuple, or it would be registered as a part of this module

    @torch.no_grad()
    def update(self) -> None:
        """Call it after each optimizer step: p <- decay p + (1 - decay) p_source. Nothing waits for the device.

        Buffers are copied (our decision). The running statistics of BatchNorm are averages over the last steps already:
        averaged once more they would lag behind twice, and counters are no averages at all. What the copy's own forwards in
        training mode did to its statistics is thereby undone.
        """
        (source,) = self._source
        torch._foreach_lerp_(list(self.encoder.parameters()), list(source.parameters()), 1 - self.decay)
        for own, theirs in zip(self.encoder.buffers(), source.buffers(), strict=True):
            own.copy_(theirs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.encoder(images)
