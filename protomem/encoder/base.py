"""What every encoder shares: the split at the fully connected layer, checkpointing, and frozen batch statistics.

Legend: b local batch, F flattened features, D embedding size.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _running_statistics_kept(block: nn.Module):
    """While a block is recomputed in backward its BatchNorms must not count the same batch twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in kept:  # the same operations as in forward, on the same tensors, but adding nothing
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(count)
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def without_autocast(device: torch.device):
    """Leaves autocast, which the meta device (protomem/plan/encoder.py) does not know."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Encoder(nn.Module):
    """Aligned images [b,3,S,S], normalised to about [-1,1] -> embeddings [b,D], not L2-normalised.

    A subclass sets `fc` (and `dropout`, `features` = the last BatchNorm or Identity) and defines `pre_fc`.
    `forward(x) == embed(pre_fc(x))`; a method that wants two dropout views calls `embed` twice on one `pre_fc`.
    """

    dropout: nn.Dropout
    fc: nn.Linear
    features: nn.Module

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing
        self.statistics_frozen = False

    def pre_fc(self, images: torch.Tensor) -> torch.Tensor:
        """[b,3,S,S] -> [b,F]: the flattened features before dropout and the fully connected layer."""
        raise NotImplementedError

    def embed(self, flat: torch.Tensor) -> torch.Tensor:
        """[b,F] -> [b,D]: dropout, fully connected layer, last BatchNorm; in the parameters' precision even under
        autocast, as insightface does: the norm of the embedding carries meaning and bf16 has three digits."""
        with without_autocast(flat.device):
            return self.features(self.fc(self.dropout(flat.to(self.fc.weight.dtype))))

    def forward(self, images: torch.Tensor, views: int = 1) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """[b,D], or with `views` > 1 so many [b,D] that differ by their dropout alone."""
        flat = self.pre_fc(images)
        return self.embed(flat) if views == 1 else tuple(self.embed(flat) for _ in range(views))

    def run_block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """block(x); with checkpointing its activations are recomputed in backward instead of kept."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(x)
        if torch.compiler.is_compiling():  # functionalised: buffers are written in the forward graph only
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _running_statistics_kept(block)),
        )

    def freeze_statistics(self, frozen: bool = True) -> Encoder:
        """Hold every BatchNorm on its running statistics, also after later `.train()` calls (False: undo).

        The output of an image then does not depend on the rest of its batch, hence not on how the batch is split
        over ranks. Weights and biases of the BatchNorms stay trainable.
        """
        self.statistics_frozen = frozen
        return self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        if self.statistics_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def last_batchnorm(embedding_size: int, last_bn: str) -> nn.BatchNorm1d:
    """The BatchNorm after the fully connected layer. `frozen`: its weight stays 1 (insightface), which pins the mean
    embedding norm near sqrt(D); `learnable`: the weight trains (MagFace needs it)."""
    norm = nn.BatchNorm1d(embedding_size, eps=1e-5)
    norm.weight.requires_grad = last_bn == "learnable"
    return norm
