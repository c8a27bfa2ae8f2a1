"""The data flow of one training step: the same function for one process and for many ranks.

    images ─ encoder ─► embeddings x [b, D]                   local batch, autograd, DDP
           ─ gather ──► X [B, D], labels [B]                  backward: reduce-scatter
           ─ prototypes.columns(labels)                       this rank's rows
           ─ head ────► cos_y [B], lse_neg [B]                equal on every rank
           ─ margin ──► loss = mean softplus(lse_neg - s phi(cos_y)) over the global batch
           ─ backward ► encoder gradients (averaged by DDP) and this rank's prototype gradients
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.head import objective
from protomem.objective.margins import Margin


@dataclass
class MicroBatch:
    """Part of a step: this rank's images and labels [b], and how many rows every rank has (`sizes`, sums to B_micro)."""

    images: torch.Tensor
    labels: torch.Tensor
    sizes: list[int]


def losses(
    embeddings: torch.Tensor, labels: torch.Tensor, sizes: list[int], prototypes, head: Callable, margin: Margin
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per sample [B] and cosine to the own prototype [B] of the gathered batch, equal on every rank.

    embeddings [b, D] of this rank, with gradient, not normalised; labels [B] of all ranks in rank order.
    """
    gathered = distributed.gather_with_grad(embeddings, sizes)
    x = F.normalize(gathered, dim=1)
    cos_y, lse_neg = head(x, prototypes.columns(labels), margin.scale, margin.negatives)
    return objective(margin.scale * margin.target(cos_y), lse_neg), cos_y.detach()


def gather_labels(parts: list[MicroBatch]) -> list[torch.Tensor]:
    """The global labels of each micro-batch, by one collective for the whole step."""
    total = [sum(part.sizes[r] for part in parts) for r in range(len(parts[0].sizes))]
    everything = distributed.gather_rows(torch.cat([part.labels for part in parts]), total).split(total)
    per_rank = [rows.split([part.sizes[r] for part in parts]) for r, rows in enumerate(everything)]
    return [torch.cat([rows[k] for rows in per_rank]) for k in range(len(parts))]


def forward_backward(
    parts: list[MicroBatch],
    encoder: torch.nn.Module,
    prototypes,
    head: Callable,
    margin: Margin,
    step: int,
    *,
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    autocast: Callable = contextlib.nullcontext,
    scale_loss: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the global batch of one step, however it is cut into micro-batches and ranks.

    `encoder` is the DDP module when there are several ranks; `prepare` turns uint8 images into the encoder's input.
    Returns 0-d tensors that are not read back: loss and mean cos_y, equal on every rank, and the mean embedding norm of this
    rank's images.
    """
    labels = gather_labels(parts)
    prototypes.begin_step(torch.cat(labels), step)
    count = sum(len(part) for part in labels)
    stats = {}
    for k, (part, part_labels) in enumerate(zip(parts, labels)):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last or not hasattr(encoder, "no_sync") else encoder.no_sync():
            with autocast():
                embeddings = encoder(prepare(part.images))
            if embeddings.dtype in (torch.float16, torch.bfloat16):
                embeddings = embeddings.float()
            per_sample, cos_y = losses(embeddings, part_labels, part.sizes, prototypes, head, margin)
            loss = per_sample.sum() / count
            scale_loss(loss).backward()
        norm = embeddings.detach().norm(dim=1).sum() / sum(len(p.labels) for p in parts)
        for name, value in {"loss": loss.detach(), "cos_y": cos_y.sum() / count, "norm": norm}.items():
            stats[name] = stats[name] + value if name in stats else value
    return stats
