"""The data flow of one training step: the same function for one process and for many ranks.

    labels ─ gather ──► labels [B], then the plan             on their way while the encoder runs
    images ─ encoder ─► embeddings x [b, D]                   local batch, autograd, DDP
           ─ gather ──► X [B, D]                              backward: reduce-scatter, meanwhile the rows' gradient
           ─ prototypes.columns(labels, X)                    this rank's rows; a memory first writes the batch's own
           ─ head ────► cos_y [B], lse_neg [B]                equal on every rank: one all-reduce
           ─ margin ──► loss = mean softplus(lse_neg - s phi(cos_y)) over the global batch
                        + a second term against empirical prototypes (EPL) + regularisers of this rank's own rows
           ─ backward ► encoder gradients (averaged by DDP) and this rank's prototype gradients
           ─ after ───► prototypes.after_step(labels, X): what is kept of the batch's features (VPL, EPL)
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch.profiler import record_function  # 6 us each on a CPU; any profiler shows the phases by these names

from protomem import distributed, flight
from protomem.objective.criterion import Criterion
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
    """What prototypes may want beside the batch's own embeddings; see protomem/prototypes/memory.py.

    copies: images [b, ...] -> images [m, ...] of nobody, whose embeddings show what is unrecognizable; all ranks together
    have `total`; they are encoded in eval mode and train nothing. encoder: the bare one, without DDP. key_encoder: an
    averaged copy that makes a memory's prototypes, and the features that are injected, in its place.
    """

    copies: Callable[[torch.Tensor], torch.Tensor] | None = None
    total: int = 0
    encoder: torch.nn.Module | None = None
    key_encoder: torch.nn.Module | None = None


@dataclass
class Losses:
    """What the gathered batch gave, equal on every rank.

    per_sample [B]: loss, mean over views and terms, with a graph. cos_y [B]: cosine to the own prototype (first view).
    weight [B] in the mean; None: equal. unit [B, D]: the first view's embeddings, normalised, without a graph. views: of
    each view the same with its graph.
    """

    per_sample: torch.Tensor
    cos_y: torch.Tensor
    weight: torch.Tensor | None
    unit: torch.Tensor
    views: tuple[torch.Tensor, ...]


def losses(
    views: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    sizes: list[int],
    prototypes,
    head: Callable,
    margin: Margin,
    criterion: Criterion = Criterion(),
    **wanted,
) -> Losses:
    """The loss terms of a (micro-)batch.

    views: one or two embeddings [b, D] of this rank's images, with gradient, not normalised; prototypes are made from the
    first. labels [B] of all ranks in rank order; wanted: `keys` [B, D] and `observe` for the prototypes.
    """
    with record_function("protomem.gather"):
        gathered = distributed.gather_with_grad(torch.cat(views, 1), sizes).chunk(len(views), 1)
    norm = torch.cat([distributed.replicated(v.norm(dim=1), g.detach().norm(dim=1), sizes) for v, g in zip(views, gathered)])
    x = F.normalize(torch.cat(gathered), dim=1)  # [V B, D]
    unit = x[: len(labels)].detach()
    with record_function("protomem.prototypes"):
        columns = prototypes.columns(labels, gathered[0], **wanted)
    terms = [(columns, margin)]
    if (empirical := prototypes.empirical) is not None:
        empirical.see(labels, unit, before=True)
        if empirical.active:
            terms.append((empirical.columns(columns), empirical.margin(margin)))
    with record_function("protomem.head"):
        found = [criterion(x, norm, c.repeat(len(views)), head, m) for c, m in terms]
    if (nearest := columns.nearest) is not None:
        nearest.cos, nearest.row = nearest.cos[: len(labels)], nearest.row[: len(labels)]
    per_row = torch.stack([loss for loss, _ in found]).mean(0)
    per_sample, cos_y = per_row.view(len(views), -1).mean(0), found[0][1][: len(labels)].detach()
    return Losses(per_sample, cos_y, columns.weight, unit, x.chunk(len(views)))


def start_labels(parts: list[MicroBatch]) -> Callable[[], tuple[list[torch.Tensor], torch.Tensor | None]]:
    """Sends this rank's labels and quality numbers, by one collective for the step. Returns a function that waits for the
    others' and gives the global labels of each micro-batch, and the whole step's quality numbers [B] (None if the data have
    none)."""
    total = [sum(part.sizes[r] for part in parts) for r in range(len(parts[0].sizes))]
    mine = torch.cat([part.labels for part in parts])[:, None]
    if parts[0].quality is not None:  # the bits of a float travel as an integer
        bits = torch.cat([part.quality for part in parts]).float().view(torch.int32)
        mine = torch.cat([mine, bits[:, None].to(mine.dtype)], 1)
    gathered = distributed.start_gather(mine, total)

    def finish():
        per_rank = [rows.split([part.sizes[r] for part in parts]) for r, rows in enumerate(gathered().split(total))]
        ordered = [torch.cat([rows[k] for rows in per_rank]) for k in range(len(parts))]
        quality = None
        if parts[0].quality is not None:
            quality = torch.cat([rows[:, 1] for rows in ordered]).to(torch.int32).view(torch.float32)
        return [rows[:, 0].contiguous() for rows in ordered], quality

    return finish


def encode(
    part: MicroBatch, encoder: torch.nn.Module, prototypes, extras: Extras, prepare: Callable, autocast: Callable, views: int = 1
) -> tuple[tuple[torch.Tensor, ...], dict]:
    """(`views` embeddings [b, D] in fp32, with gradient; what a memory wants beside them) of a micro-batch."""

    def run(module, images, *how):
        with autocast():
            out = module(prepare(images), *how)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(o.float() if o.dtype in (torch.float16, torch.bfloat16) else o for o in outs)

    embeddings, wanted = run(encoder, part.images, *((views,) if views > 1 else ())), {}
    with torch.no_grad():
        if extras.key_encoder is not None:
            wanted["keys"] = distributed.gather_rows(run(extras.key_encoder, part.images)[0], part.sizes)
        if extras.copies is not None:
            copies, maker = extras.copies(part.images), extras.key_encoder or extras.encoder
            # With the running statistics: in the batch they would shift its own, and alone be normalised to look like any.
            with evaluating(maker):
                prototypes.quality.see(run(maker, copies)[0] if len(copies) else embeddings[0][:0], extras.total)
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
    criterion: Criterion = Criterion(),
    contrast=None,
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    autocast: Callable = contextlib.nullcontext,
    scale_loss: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    extras: Extras = Extras(),
    observe: bool = False,
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the global batch of one step, however it is cut into micro-batches and ranks.

    `encoder` is the DDP module when there are several ranks; `prepare` turns uint8 images into the encoder's input;
    `contrast` (protomem/objective/contrast.py) draws two views together, from the step on where it is active; `observe`:
    collect statistics. A prototype memory takes a step as a single micro-batch.
    Returns 0-d tensors that are not read back: loss and mean cos_y, equal on every rank, the mean embedding norm of this
    rank's images, and with `observe` what prototypes and regularisers report; only then are the regularisers in the loss
    that is returned (each rank knows its own rows' part).
    """
    arriving, count = start_labels(parts), sum(sum(part.sizes) for part in parts)
    contrast = contrast if contrast is not None and contrast.active(step) else None
    stats, own_terms, seen = {}, {}, []

    def add(to, name, value):
        to[name] = to[name] + value if name in to else value

    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last or not hasattr(encoder, "no_sync") else encoder.no_sync():
            with record_function("protomem.encoder"):
                views, wanted = encode(part, encoder, prototypes, extras, prepare, autocast, 1 if contrast is None else 2)
            keys = wanted.get("keys")
            if k == 0:  # the labels came while the encoder ran (a GPU still does): a memory plans with them alone
                with record_function("protomem.plan"):
                    labels, quality = arriving()
                    prototypes.begin_step(torch.cat(labels), step, *(() if quality is None else (quality,)))
            found = losses(
                views,
                labels[k],
                part.sizes,
                prototypes,
                head,
                margin,
                criterion,
                observe=observe,
                **wanted,
            )
            per_sample, weight = found.per_sample, found.weight
            total = per_sample.sum() / count if weight is None else _weighted_mean(per_sample, weight)
            add(stats, "loss", total.detach())
            # Regularisers are computed by each rank from its own rows, as a sum over them / B.
            if margin.penalty is not None:
                own = [distributed.local_rows(view) for view in views]
                term = sum(margin.penalty(view.norm(dim=1)).sum() for view in own) / len(own) / count
                total, _ = total + term, add(own_terms, "norm_penalty", term.detach())
            if contrast is not None:
                # Of this rank's anchors, but from the gathered views, whose gather holds the factor W.
                term = contrast(found.views, labels[k], part.sizes) / count
                total, _ = total + term, add(own_terms, "contrast", term.detach())
                stats["contrast_margin"] = contrast.m.clone()
            with record_function("protomem.backward"), flight.collective("backward, with the encoder's gradients (DDP)"):
                scale_loss(total).backward()
        add(stats, "norm", views[0].detach().norm(dim=1).sum() / sum(len(p.labels) for p in parts))
        add(stats, "cos_y", found.cos_y.sum() / count if weight is None else _weighted_mean(found.cos_y, weight))
        seen.append((found.unit if keys is None else F.normalize(keys, dim=1), labels[k], part.sizes))
    prototypes.after_step(*_in_batch_order(seen))
    if observe:
        if own_terms:
            sums = distributed.all_reduce(torch.stack(list(own_terms.values())))
            stats |= {**dict(zip(own_terms, sums.unbind())), "loss": stats["loss"] + sums.sum()}
        stats |= prototypes.statistics(per_sample if weight is None else per_sample * weight)
    return stats


def _weighted_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1e-12)


def _in_batch_order(parts: list[tuple[torch.Tensor, torch.Tensor, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels [B], unit embeddings [B, D]) of a step in the order of the global batch, however it was cut: each part has the
    rows of rank 0, then of rank 1, ..."""
    if len(parts) == 1:
        return parts[0][1], parts[0][0]
    cut = [list(zip(labels.split(sizes), unit.split(sizes))) for unit, labels, sizes in parts]
    ordered = [part[r] for r in range(len(parts[0][2])) for part in cut]
    return torch.cat([labels for labels, _ in ordered]), torch.cat([unit for _, unit in ordered])


@torch.no_grad()
def enqueue(part: MicroBatch, encoder, prototypes, *, prepare: Callable, autocast: Callable, extras: Extras) -> None:
    """Make a batch's prototypes and store them in a memory, without learning anything. `encoder`: not the DDP module."""
    arriving = start_labels([part])
    (embeddings,), wanted = encode(part, encoder, prototypes, extras, prepare, autocast)
    (labels,), quality = arriving()
    prototypes.begin_step(labels, 0, quality)
    prototypes.columns(labels, distributed.gather_rows(embeddings, part.sizes), **wanted)
