"""Learned prototypes: one row per identity, rows split over ranks (the classifier of CosFace, ArcFace, ...)."""

from __future__ import annotations

import torch
from torch import nn

from protomem import distributed
from protomem.head import Columns, GradSink
from protomem.prototypes.variational import bank_for
from protomem.seeds import mix

INIT_ROWS = 4096  # rows drawn from one stream, so that the initial matrix does not depend on the number of ranks


def initial_rows(start: int, stop: int, size: int, std: float, seed: int) -> torch.Tensor:
    """Rows start:stop of the initial prototype matrix [C_total, size]: N(0, std), a function of (seed, row) alone."""
    parts = [torch.empty(0, size)]
    for chunk in range(start // INIT_ROWS, -(-stop // INIT_ROWS)):
        generator = torch.Generator().manual_seed(mix(seed, chunk))
        rows = torch.randn(INIT_ROWS, size, generator=generator) * std
        first = chunk * INIT_ROWS
        parts.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(parts)


class ClassifierShard(nn.Module):
    """This rank's rows of the prototype matrix [C_total, D]; rows [first, last) as torch.chunk splits them.

    `weight` [C, D] is an ordinary parameter for any optimizer; its gradient is written by the head (not autograd).
    injection: weight, steps and start of the features that are mixed in (VPL, protomem/prototypes/variational.py), if any.
    sub_centers: K prototypes for each identity, of which the nearest counts (Deng et al. 2020). `weight` is [C, K * D] then:
    a row still is an identity, so that all of it lies on one rank, also after a change of the world size.
    """

    row_sparse = False

    def __init__(
        self,
        num_identities: int,
        embedding_size: int,
        *,
        seed: int = 0,
        std: float = 0.01,
        injection: dict | None = None,
        sub_centers: int = 1,
    ):
        super().__init__()
        self.size, self.sub_centers = embedding_size, sub_centers
        self.num_identities = self.total_rows = num_identities
        self.first, self.last = distributed.shard_bounds(num_identities, distributed.rank(), distributed.world_size())
        self.weight = nn.Parameter(initial_rows(self.first, self.last, sub_centers * embedding_size, std, seed))
        self.sink = GradSink()
        self.empirical = None  # EPL's second prototypes (an EmpiricalPrototypes), if there are any
        self.bank = bank_for(self.last - self.first, embedding_size, injection)

    def begin_step(self, labels: torch.Tensor, step: int) -> None:
        """Start a step whose global batch (all of its micro-batches) has these labels [B]."""
        self.weight.grad = self._begin(self.weight.detach())
        if self.empirical is not None:
            self.empirical.begin_step(step)
        if self.bank is not None:
            self.bank.begin_step(step)

    def columns(self, labels: torch.Tensor, embeddings=None, keys=None, observe: bool = False) -> Columns:
        """This rank's prototypes for a (micro-)batch with the gathered labels [B]; they do not depend on the embeddings, as
        a memory's do."""
        injection = None if self.bank is None else self.bank.injection()
        return self._columns(self.weight.detach(), self._rows(labels), injection)

    def _columns(self, rows: torch.Tensor, target: torch.Tensor, injection=None) -> Columns:
        """rows [S, K * D] of identities as the head takes them."""
        rows = rows.view(-1, self.size)
        return Columns(rows, target, self.sink, injection=injection, centers=self.sub_centers)

    def _begin(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The gradient of these rows [S, K * D] in a new step, which the head will write, if there is one."""
        grad = self.sink.begin(rows.view(-1, self.size))
        return None if grad is None else grad.view_as(rows)

    def _rows(self, labels: torch.Tensor) -> torch.Tensor:
        """The row of each label [B], -1 where another rank has it."""
        return torch.where((labels >= self.first) & (labels < self.last), labels - self.first, -1)

    def after_step(self, labels: torch.Tensor, unit: torch.Tensor) -> None:
        """End a step whose global batch had these labels [B] and unit embeddings [B, D]."""
        if self.empirical is not None:
            self.empirical.see(labels, unit, before=False)
        if self.bank is not None:
            self.bank.take(self._rows(labels), unit)

    def statistics(self, per_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        """0-d tensors about the step that has just ended, equal on every rank, for a logged step. per_sample [B]: loss."""
        return {} if self.bank is None else self.bank.statistics(self.total_rows)

    def gradient(self) -> torch.Tensor:
        """The shard's gradient of this step [C * K, D] (for clipping and loss scaling, in place)."""
        return self.sink.buffer
