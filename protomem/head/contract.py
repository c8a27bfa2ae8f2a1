"""The head contract: what every back end takes and returns, and how ranks combine their parts.

A head compares B gathered unit embeddings with this rank's prototype rows and returns, equal on every rank,
  cos_y   [B]  cosine to the own prototype (the owner computes it), and
  lse_neg [B]  log-sum-exp of the scaled logits of the *negatives only*, over all ranks; one SUM all-reduce for both.
The loss is then softplus(lse_neg - z_y): exact in fp32 where subtracting the target from a full log-sum-exp is not, no
clamp on a probability, and every target-only margin is a function of [B] numbers.

With a `threshold` b [1] a head returns sum_neg [B] = sum over the negatives of softplus(z_j - b) in place of lse_neg, for a
loss that sets every logit against one threshold (UniFace). The gradient of b is whole on every rank.

Back ends (`dense`, `blocked`, `triton`) share this file; `HEADS` in protomem/head/__init__.py names them.
Legend: B global batch, C prototype rows of this rank (may be 0), D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import torch

from protomem import distributed


class GradSink:
    """Where a head writes d loss / d rows: one buffer per shard that lives as long as the shard.

    A fresh gradient of a large shard costs more in page faults than in arithmetic, so the buffer is reused: the first
    write of a step overwrites, later ones (gradient accumulation, several loss terms) add.

    update: takes the place of the buffer (a BlockUpdate, protomem/block_update.py): what a head computes for a block of rows
    goes there at once, complete, and the rows change, or the head has a kernel for both. A step has one write then. None:
    there is the buffer.
    """

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.update = None
        self.fresh = True

    def begin(self, like: torch.Tensor) -> torch.Tensor | None:
        """Start a step; returns the buffer [C, D] that the first write will overwrite, if there is one."""
        if self.update is not None:
            self.update.begin()
            self.buffer, self.fresh = None, True
            return None
        if self.buffer is None or self.buffer.shape != like.shape or self.buffer.dtype != like.dtype:
            self.buffer = torch.zeros_like(like)
        self.fresh = True
        return self.buffer

    def once(self) -> None:
        """Refuse a second write in a step where rows have changed with the first."""
        if self.update is not None and not self.fresh:
            raise RuntimeError("rows that are updated inside the backward take a single loss term in a step")

    def add(self, grad: torch.Tensor) -> None:
        """Add one whole gradient [C, D] (used by `dense`; `blocked` writes block by block)."""
        if self.fresh:
            self.buffer.copy_(grad)
        else:
            self.buffer.add_(grad)
        self.fresh = False


@dataclass
class Live:
    """Rows that were just made from the batch and carry a graph.

    rows  [L, D] unit rows with a graph; the same numbers stand, detached, in Columns.rows
    place [L]    local row of each, -1 where another rank owns it (or it is padding)
    """

    rows: torch.Tensor
    place: torch.Tensor


@dataclass
class Injection:
    """Features that are mixed into the rows (VPL, Deng et al. 2021): with its feature q and the weight l a row w counts as
    norm((1 - l) norm(w) + l q), wherever the head compares with it, and where l = 0 as it is. The features are constants.
    With `unit` rows norm(w) is w, and the gradient is that of this formula, not projected to the sphere.

    features [N, D] unit rows, finite also where they do not count
    row      [C]    int64: which of them belongs to each of Columns.rows; None: they stand in the same order
    weight   [C]    in [0, 1)
    """

    features: torch.Tensor
    row: torch.Tensor | None
    weight: torch.Tensor


class Nearest:
    """Filled by the head if asked for: this rank's negative with the largest cosine to each sample.

    cos [B], -inf where this rank has no negative; row [B] local row. Neither has a gradient.
    """

    cos: torch.Tensor
    row: torch.Tensor


@dataclass
class Columns:
    """This rank's prototypes as the head sees them.

    rows   [C, D] prototypes, normalised by the head unless `unit`
    target [B]    local row of each sample's identity, -1 where another rank owns it
    centers       rows of each identity, one below the other (sub-centres; Deng et al. 2020, Sub-center ArcFace): an
                  identity is as near as the nearest of them, which alone has a gradient (of equally near ones the first).
                  rows is [C * centers, D] then, and target [B] and a Nearest's row count identities. With learned rows only
    sink          receives d loss / d rows; None for rows that are constants
    valid  [C]    False for rows that hold nothing (empty memory slots); None: all valid
    own    [B, D] unit prototypes that cos_y is taken with instead of the target rows, with a graph or without; the
                  target rows stay hidden from the negatives. The owner of the target counts. None: the target rows
    uses_own [B]  bool: which samples; the others' positive is their target row. Goes with `own`
    live          rows with a graph, see there (needs `unit`); their gradient flows through it, not into the sink
    weight [B]    of each sample in the mean loss, for the step; the head does not look at it. None: equal
    nearest       where to put the hardest negatives; None: not wanted
    injection     features that are mixed into the rows, not together with `live`; None: there are none
    """

    rows: torch.Tensor
    target: torch.Tensor
    sink: GradSink | None = None
    unit: bool = False
    valid: torch.Tensor | None = None
    own: torch.Tensor | None = None
    uses_own: torch.Tensor | None = None
    live: Live | None = None
    weight: torch.Tensor | None = None
    nearest: Nearest | None = None
    injection: Injection | None = None
    centers: int = 1

    def __post_init__(self):
        if self.injection is not None and self.live is not None:
            raise ValueError("features are not injected into rows that carry a graph")
        if self.centers > 1 and any(v is not None for v in (self.injection, self.live, self.own, self.valid)):
            raise ValueError("sub-centres are learned rows: no injection, no live rows, no own prototypes, no empty rows")

    def repeat(self, views: int) -> Columns:
        """The same prototypes for several views of the batch, one below the other: [views * B] rows."""
        if views == 1:
            return self
        each = {name: getattr(self, name) for name in ("target", "own", "uses_own", "weight")}
        return replace(self, **{name: torch.cat([v] * views) for name, v in each.items() if v is not None})


@dataclass(frozen=True)
class Negatives:
    """A margin's effect on negatives: z_j = s * value(cos_j, cos_y), with slope = d value / d cos_j.

    Both take cos [B, K] and cos_y [B, 1] and return [B, K]; no gradient ever flows through cos_y here. |value| <= 2.
    filter_above: set where value is 0 and slope 0 above this cosine and there is no other effect, cos_y's neither: for heads
    with kernels, and to save the all-reduce that makes cos_y known before the negatives are met.
    """

    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    filter_above: float | None = None


def inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """1 / ||row||, [C]; a zero row keeps the norm 1e-12 and so a cosine of zero with everything."""
    return torch.linalg.vector_norm(rows, dim=1).clamp_min_(1e-12).reciprocal_()


LARGEST_SCALE = 300.0  # up to it exp(z) of every |z| <= 2 s, and a sum of 1e40 of them, is an ordinary float64


def early_cos_y(own: torch.Tensor, negatives: Negatives | None) -> torch.Tensor:
    """The cosines [B] to give to `negatives`, from this rank's part of them: whole, by a collective, if they look at them."""
    looks = negatives is not None and negatives.filter_above is None
    return distributed.all_reduce(own.clone()) if looks else own


def combine(own: torch.Tensor, top: torch.Tensor, total: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_y [B], lse_neg [B]) over ranks. own [B]: cos_y, 0 where another rank has the prototype; top [B]: row maxima, -inf
    where a rank has no negative; total [B] = sum exp(z - top). lse_neg is -inf only where no rank has a negative. No gradient.

    One all-reduce in float64, whose range holds exp(z) itself, so that no maximum has to be agreed on; three for a scale
    above LARGEST_SCALE.
    """
    if scale > LARGEST_SCALE:
        highest = distributed.all_reduce(top.clone(), "max")
        shift = torch.where(highest.isinf(), torch.zeros_like(highest), highest)
        total = distributed.all_reduce(total * (top - shift).exp())  # exp(-inf - finite) = 0: an empty shard is silent
        return distributed.all_reduce(own.clone()), total.log() + shift
    sums = distributed.all_reduce(torch.stack([own.double(), total.double() * top.double().exp()]))
    return sums[0].to(own.dtype), sums[1].log().to(own.dtype)


def objective(cos_y_logit: torch.Tensor, lse_neg: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per sample [B] from the target logit z_y [B] and lse_neg [B]: softplus(lse_neg - z_y).

    Written as -logsigmoid because torch's softplus turns linear above 20 and loses 2e-9 of its gradient there.
    """
    return -torch.nn.functional.logsigmoid(cos_y_logit - lse_neg)
