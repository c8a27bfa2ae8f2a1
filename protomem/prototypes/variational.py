"""The last feature of every identity, which is mixed into its prototype (Variational Prototype Learning).

Deng et al. 2021 (CVPR, "Variational Prototype Learning for Deep Face Recognition"): the head compares with
norm((1 - l) norm(w) + l q), q the unit embedding of the identity's last image, while q is young; the gradient reaches w
through the factor (1 - l) and both normalisations, and none reaches q. With l = 0 this is the plain classifier.

Legend: B global batch, R prototype rows of this rank, D feature size.
"""

from __future__ import annotations

import torch
from torch import nn

from protomem import distributed
from protomem.head import Injection


class FeatureBank(nn.Module):
    """features [R, D] and seen int64 [R] (the step that left the feature, -1: none did), a row for each prototype row.

    weight: l in [0, 1) (0.15 in the published code). steps: a feature of step t counts in t + 1 to t + steps (200 there).
    start: the first step that injects (8000 there); features are kept from step 0 on, without injection. A step is one
    update of the weights.
    """

    def __init__(self, rows: int, size: int, *, weight: float, steps: int, start: int):
        super().__init__()
        self.weight, self.steps, self.start = weight, steps, start
        self.register_buffer("features", torch.zeros(rows, size))
        self.register_buffer("seen", torch.full((rows,), -1))
        self.now: torch.Tensor | None = None

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        """Decide which features count in this step: all of its micro-batches are treated alike."""
        self.step, self.now = step, None
        if step >= self.start:
            young = (self.seen >= 0) & (step - self.seen <= self.steps)
            self.now = young.to(self.features.dtype) * self.weight

    def injection(self, index: torch.Tensor | None = None) -> Injection | None:
        """For Columns of all rows, or of the rows index [S]; None before `start`."""
        if self.now is None:
            return None
        return Injection(self.features, index, self.now if index is None else self.now[index])

    @torch.no_grad()
    def take(self, row: torch.Tensor, unit: torch.Tensor) -> None:
        """Keep a step's features unit [B, D], in the order of the global batch, for the rows row [B] (-1: another rank's).

        Of several images of an identity the last one counts, whatever the number of ranks; an embedding that overflowed is
        passed over. No shape depends on values: what is not to be written writes what its place gets anyway.
        """
        if not len(self.seen):
            return
        row = torch.where(unit.isfinite().all(1), row, -1)
        ordered, order = row.sort(stable=True)
        last = order[torch.searchsorted(ordered, row, right=True) - 1]
        source = torch.where(row >= 0, last, order[-1])  # the foreign ones: some row of ours again, if there is one
        mine = row[source] >= 0  # all of them, or none
        place = row[source].clamp_min(0)
        self.features[place] = torch.where(mine[:, None], unit[source].to(self.features.dtype), self.features[place])
        self.seen[place] = torch.where(mine, self.step, self.seen[place])

    @torch.no_grad()
    def forget(self, row: torch.Tensor) -> None:
        """Rows that belong to somebody else from now on: row [n], R stands for none."""
        gone = torch.zeros(len(self.seen) + 1, dtype=torch.bool, device=row.device)
        gone.index_fill_(0, row, True)
        self.seen.masked_fill_(gone[:-1], -1)

    def statistics(self, total: int) -> dict[str, torch.Tensor]:
        """injected: share of the `total` rows of all ranks whose feature counted in the step that has just ended (of a sampled
        shard's also those that were not drawn)."""
        count = (self.now > 0).sum() if self.now is not None else torch.zeros((), dtype=torch.int64, device=self.seen.device)
        return {"injected": distributed.all_reduce(count) / total}


def bank_for(rows: int, size: int, injection: dict | None) -> FeatureBank | None:
    """The bank of a shard of so many rows; None without injection. injection: weight, steps and start."""
    return FeatureBank(rows, size, **injection) if injection else None
