"""The data flow of one training step: the same function for one process and for many ranks.

    images ─ encoder ─► embeddings x [b, D]                   local batch, autograd, DDP
           ─ gather ──► X [B, D], labels [B]                  backward: reduce-scatter
           ─ prototypes.columns(labels, X)                    this rank's rows; a memory first writes the batch's own
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
    """Part of a step: this rank's images and labels [b], and how many rows every rank has (`sizes`, sums to B_micro).

    quality [b] float32: the data's own quality numbers, on every rank or on none.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sizes: list[int]
    quality: torch.Tensor | None = None


@dataclass
class Extras:
    """What prototypes of a memory may want beside the batch's own embeddings; see protomem/prototypes/memory.py.

    copies: images [b, ...] -> images [m, ...] of nobody, whose embeddings show what is unrecognizable; all ranks together
    have `total`; they are encoded in eval mode and train nothing. encoder: the bare one, without DDP. key_encoder: makes
    the prototypes in its place.
    """

    copies: Callable[[torch.Tensor], torch.Tensor] | None = None
    total: int = 0
    encoder: torch.nn.Module | None = None
    key_encoder: torch.nn.Module | None = None


def losses(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    sizes: list[int],
    prototypes,
    head: Callable,
    margin: Margin,
    **wanted,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss per sample [B], cosine to the own prototype [B] and weight in the mean [B] (None: equal) of the gathered
    batch, equal on every rank.

    embeddings [b, D] of this rank, with gradient, not normalised; labels [B] of all ranks in rank order; wanted: what
    only some prototypes understand (`keys`, `observe` of a memory).
    """
    gathered = distributed.gather_with_grad(embeddings, sizes)
    x = F.normalize(gathered, dim=1)
    columns = prototypes.columns(labels, gathered, **wanted)
    cos_y, lse_neg = head(x, columns, margin.scale, margin.negatives)
    return objective(margin.scale * margin.target(cos_y), lse_neg), cos_y.detach(), columns.weight


def gather_labels(parts: list[MicroBatch]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The global labels of each micro-batch, and the whole step's quality numbers [B] (None if the data have none), by
    one collective for the step."""
    total = [sum(part.sizes[r] for part in parts) for r in range(len(parts[0].sizes))]
    mine = torch.cat([part.labels for part in parts])[:, None]
    if parts[0].quality is not None:  # the bits of a float travel as an integer
        bits = torch.cat([part.quality for part in parts]).float().view(torch.int32)
        mine = torch.cat([mine, bits[:, None].to(mine.dtype)], 1)
    everything = distributed.gather_rows(mine, total).split(total)
    per_rank = [rows.split([part.sizes[r] for part in parts]) for r, rows in enumerate(everything)]
    ordered = [torch.cat([rows[k] for rows in per_rank]) for k in range(len(parts))]
    quality = None
    if parts[0].quality is not None:
        quality = torch.cat([rows[:, 1] for rows in ordered]).to(torch.int32).view(torch.float32)
    return [rows[:, 0].contiguous() for rows in ordered], quality


def encode(
    part: MicroBatch, encoder: torch.nn.Module, prototypes, extras: Extras, prepare: Callable, autocast: Callable
) -> tuple[torch.Tensor, dict]:
    """(embeddings [b, D] in fp32, with gradient; what a memory wants beside them) of a micro-batch."""

    def run(module, images):
        with autocast():
            out = module(prepare(images))
        return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out

    embeddings, wanted = run(encoder, part.images), {}
    with torch.no_grad():
        if extras.key_encoder is not None:
            wanted["keys"] = distributed.gather_rows(run(extras.key_encoder, part.images), part.sizes)
        if extras.copies is not None:
            copies, maker = extras.copies(part.images), extras.key_encoder or extras.encoder
            # With the running statistics: in the batch they would shift its own, and alone be normalised to look like any.
            with evaluating(maker):
                prototypes.quality.see(run(maker, copies) if len(copies) else embeddings[:0], extras.total)
    return embeddings, wanted


@contextlib.contextmanager
def evaluating(module: torch.nn.Module):
    """`module` in eval mode inside, and as it was afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


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
    extras: Extras = Extras(),
    observe: bool = False,
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the global batch of one step, however it is cut into micro-batches and ranks.

    `encoder` is the DDP module when there are several ranks; `prepare` turns uint8 images into the encoder's input;
    `extras` and `observe` (collect statistics) are for a prototype memory, which takes a step as a single micro-batch.
    Returns 0-d tensors that are not read back: loss and mean cos_y, equal on every rank, the mean embedding norm of this
    rank's images, and what the memory reports.
    """
    labels, quality = gather_labels(parts)
    # Before the encoder: a memory plans with the labels alone.
    prototypes.begin_step(torch.cat(labels), step, *(() if quality is None else (quality,)))
    count = sum(len(part) for part in labels)
    stats = {}
    for k, (part, part_labels) in enumerate(zip(parts, labels)):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last or not hasattr(encoder, "no_sync") else encoder.no_sync():
            embeddings, wanted = encode(part, encoder, prototypes, extras, prepare, autocast)
            if observe:
                wanted["observe"] = True
            per_sample, cos_y, weight = losses(embeddings, part_labels, part.sizes, prototypes, head, margin, **wanted)
            if weight is None:
                loss = per_sample.sum() / count
            else:
                per_sample = per_sample * weight
                loss = per_sample.sum() / weight.sum().clamp_min(1e-12)
            scale_loss(loss).backward()
        norm = embeddings.detach().norm(dim=1).sum() / sum(len(p.labels) for p in parts)
        own = cos_y.sum() / count if weight is None else (cos_y * weight).sum() / weight.sum().clamp_min(1e-12)
        for name, value in {"loss": loss.detach(), "cos_y": own, "norm": norm}.items():
            stats[name] = stats[name] + value if name in stats else value
    if observe:
        stats |= prototypes.statistics(per_sample)
    return stats


@torch.no_grad()
def enqueue(part: MicroBatch, encoder, prototypes, *, prepare: Callable, autocast: Callable, extras: Extras) -> None:
    """Make a batch's prototypes and store them in a memory, without learning anything. `encoder`: not the DDP module."""
    (labels,), quality = gather_labels([part])
    prototypes.begin_step(labels, 0, quality)
    embeddings, wanted = encode(part, encoder, prototypes, extras, prepare, autocast)
    prototypes.columns(labels, distributed.gather_rows(embeddings, part.sizes), **wanted)
