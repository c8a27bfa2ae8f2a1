"""Empirical prototypes: a running mean of each identity's features, and a second loss term against them (EPL 2024).

One unit row E_j per identity, beside the learned prototypes and split over ranks like them. A step's unit features x_i move
the rows of their identities (arXiv 2405.12447; the published code's reading first, the paper's second):

    a_i = softsign(<E_y, x_i>)  or  sigmoid(<E_y, x_i>)        softsign(s) = s / (1 + |s|)
    E_y <- norm(a_i E_y + (1 - a_i) x_i)

Of several images of an identity all are computed from the old row, and the one with the highest index in the global batch
stays. The second term is the same criterion with E in place of the learned prototypes and an adaptive margin on the target:

    e = cos(x_i, E_y)        value e - k e,  derivative 1        no gradient reaches E

`stacked`: the recipe's own margin comes on top of that value (the published ArcFace and UniFace heads; CosFace's has only
the adaptive one). When the rows move decides what the adaptive margin is:

* before the loss (published code): the image is in the row that it is compared with. As a is at most 1/2 (softsign), e is
  at least 0.94 whatever the cosine was (0.5 becomes 0.945, 0 becomes 1), so the margin is nearly constant, k times 0.94 to
  1, and the largest for images that did not resemble their prototype.
* after the step's loss (as the paper describes it): e is the true cosine, and easy images get the large margin.

Our decisions: rows are zero until their identity is first seen, whose feature they then are exactly (the published code
starts with random rows, which act as random negatives until then and shift the first update). A row without a feature is no
negative; where it is the target (possible only with update=after), its cosine counts 0 and pulls nothing. Features that are
not finite, as an fp16 overflow makes them, are passed over.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from protomem import distributed
from protomem.head import Columns
from protomem.objective.margins import Margin

COEFFICIENTS = {"softsign": F.softsign, "sigmoid": torch.sigmoid}


class EmpiricalPrototypes(nn.Module):
    """This rank's empirical rows [C, D] (bounds as ClassifierShard's) and which of them hold a feature, `seen` [C] uint8.

    update: `before` or `after` the loss; coefficient: `softsign` or `sigmoid`; k in [0, 2): share of the own cosine that is
    taken off; stacked: see above; start: first step (from 0) with the second term. The defaults are the published ones of
    the CosFace head, but for `start`, which counts epochs there (3). The rows move from the first step on.
    """

    def __init__(
        self,
        num_identities: int,
        embedding_size: int,
        *,
        update: str = "before",
        coefficient: str = "softsign",
        k: float = 0.7,
        stacked: bool = False,
        start: int = 0,
    ):
        super().__init__()
        self.first, self.last = distributed.shard_bounds(num_identities, distributed.rank(), distributed.world_size())
        count = self.last - self.first
        self.register_buffer("rows", torch.zeros(count, embedding_size))
        self.register_buffer("seen", torch.zeros(count, dtype=torch.uint8))
        self.update, self.coefficient, self.k, self.stacked, self.start = update, COEFFICIENTS[coefficient], k, stacked, start
        self.active, self.index = False, None

    def begin_step(self, step: int, index: torch.Tensor | None = None) -> None:
        """Start step number `step`. index [S]: the local rows that take part in it, ascending; None: all."""
        self.active, self.index = step >= self.start, index

    @torch.no_grad()
    def see(self, labels: torch.Tensor, unit: torch.Tensor, before: bool) -> None:
        """Move the rows by the unit features [B, D] of the global batch with these labels [B], in the order of the batch;
        called before the loss and after the step, acts at one of the two."""
        if before != (self.update == "before") or not len(self.rows):
            return
        unit = unit.to(self.rows.dtype)
        usable = (labels >= self.first) & (labels < self.last) & unit.isfinite().all(1)
        # The last of each identity: others' images and unusable ones go to the front, out of every group.
        key = torch.where(usable, labels, -1)
        key, order = key.sort(stable=True)
        wins = (key != torch.cat([key[1:], key.new_full((1,), -1)])) & (key >= 0)
        row, unit = (key - self.first).clamp_min(0), unit[order]
        old = self.rows[row]
        a = self.coefficient((old * unit).sum(1, keepdim=True))
        new = F.normalize(a * old + (1 - a) * unit, dim=1)
        # At most one number that is not zero is added to each place, so the order does not matter and the result is exact:
        # first the old row goes to zero, then the new one comes.
        for change in (-old, new):
            self.rows.index_add_(0, row, torch.where(wins[:, None], change, torch.zeros_like(change)))
        self.seen.scatter_reduce_(0, row, wins.to(self.seen.dtype), "amax")

    def columns(self, learned: Columns) -> Columns:
        """The empirical prototypes of the identities of this step's learned ones, as constants."""
        rows, seen = (self.rows, self.seen) if self.index is None else (self.rows[self.index], self.seen[self.index])
        return Columns(rows, learned.target, unit=True, valid=seen.bool())

    def margin(self, margin: Margin) -> Margin:
        """The margin of the second term of a recipe with this margin."""

        def target(cos: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
            value = cos - self.k * cos.detach()
            return margin.target(value, norm) if self.stacked else value

        return replace(margin, target=target)
