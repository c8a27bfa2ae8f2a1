"""Sampled shards: per step only the batch's identities and a random share of the others (Partial FC, An et al. 2022)."""

from __future__ import annotations

import torch

from protomem import distributed
from protomem.head import Columns
from protomem.prototypes.classifier import ClassifierShard
from protomem.seeds import mix


class SampledShard(ClassifierShard):
    """A classifier shard of which `rate` takes part in each step: all identities of the batch first, then random ones.

    The number of rows is the same at every step, max(rate * C, min(B, C)), so nothing waits for the device; with more
    identities in the batch than rate * C the published code takes the batch's identities alone, this takes B rows.
    The update is truly sparse: the optimizer (RowSGD, RowAdamW) reads `weight.row_grad` = (rows [S], gradient [S, D])
    and leaves every other row and its state as it is (D: of all sub-centres). std, injection, sub_centers: as there. `before_use`: called with the rows index [S] that a step is about to
    read (RowSGD.catch_up), if set. Which negatives are drawn depends on (seed, step, rank).
    """

    row_sparse = True

    def __init__(
        self,
        num_identities: int,
        embedding_size: int,
        *,
        rate: float,
        seed: int = 0,
        **options,
    ):
        super().__init__(num_identities, embedding_size, seed=seed, **options)
        self.rate, self.seed, self.before_use = rate, seed, None

    def begin_step(self, labels: torch.Tensor, step: int) -> None:
        count, device = self.last - self.first, self.weight.device
        size = max(int(self.rate * count), min(len(labels), count))
        generator = torch.Generator(device).manual_seed(mix(self.seed, step, distributed.rank()))
        score = torch.rand(count + 1, generator=generator, device=device)  # one spare place for foreign labels
        score[torch.where((labels >= self.first) & (labels < self.last), labels - self.first, count)] = 2.0
        self.index = score[:count].topk(size).indices.sort().values
        if self.before_use is not None:
            self.before_use(self.index)
        self.active = self.weight.detach()[self.index]
        self.weight.row_grad = (self.index, self._begin(self.active))
        if self.empirical is not None:
            self.empirical.begin_step(step, self.index)
        if self.bank is not None:
            self.bank.begin_step(step)

    def columns(self, labels: torch.Tensor, embeddings=None, keys=None, observe: bool = False) -> Columns:
        mine = (labels >= self.first) & (labels < self.last)
        if not len(self.index):
            return self._columns(self.active, torch.full_like(labels, -1))
        place = torch.searchsorted(self.index, labels - self.first).clamp_max(len(self.index) - 1)
        injection = None if self.bank is None else self.bank.injection(self.index)
        return self._columns(self.active, torch.where(mine, place, -1), injection)
