"""Quality of images: who estimates it (an estimator: scores), and how prototypes use it (a usage: weights).

Everything is computed from the gathered batch, so every rank has the same numbers; nothing carries a gradient.
Sources: Quality-Aware Prototype Memory (Smirnov et al. 2023, arXiv 2311.07734) for the weighting and the
recognizability from a prototype of the unrecognizable; ERS (Deng et al. 2021, arXiv 2106.04112) for 1 - cos as its
score; MagFace (Meng et al. 2021) and AdaFace (Kim et al. 2022) for the two other forms of the norm. The papers leave
the details open: what stands here, defaults included, is our reading.

Legend: B global batch, D feature size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from protomem import distributed

ESTIMATORS = ("equal", "norm", "recognizability", "external", "magface", "zscore")
USAGES = ("soft", "hard", "topk")
LOWEST = 0.02  # share of the batch whose small norms stand for the unrecognizable (`low_norm`)
NORMS = 10.0, 110.0  # range of magnitudes of MagFace's own settings, for encoders that this run does not train with MagFace
SLOPE, PACE = 0.333, 0.01  # AdaFace's h, and the weight of a batch in the running mean and deviation


def ranks_in_group(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """int64 [B]: place of each sample among those of its group, largest value first, ties in the order of the batch.

    values [B]; group int64 [B] in 0..B-1."""
    order = values.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    size = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
    start = size.cumsum(0) - size
    place = torch.arange(len(group), device=group.device) - start[group[order]]
    return torch.empty_like(place).scatter_(0, order, place)


class Quality(nn.Module):
    """Scores of a batch and the weights that an identity's images get in its prototype.

    unrecognizable: `given` (embeddings of unrecognizable images come by `see`) or `low_norm` (taken from the batch).
    decay: of the running mean of their unit embeddings. norms: (lower, upper) of `magface`. warmup: first steps, with equal
    weights. The other arguments are explained in configs/default.yaml under `quality`. Raises ValueError for an unknown
    estimator, usage or on_empty.
    """

    def __init__(
        self,
        embedding_size: int,
        *,
        estimator: str = "equal",
        usage: str = "soft",
        power: float = 1.0,
        minimum: float = 1e-3,
        threshold: float | None = None,
        quantile: float = 0.1,
        on_empty: str = "equal",
        keep: int = 2,
        warmup: int = 0,
        loss_weight: float = 0.0,
        unrecognizable: str = "given",
        decay: float = 0.9,
        norms: tuple[float, float] = NORMS,
    ):
        super().__init__()
        if estimator not in ESTIMATORS or usage not in USAGES or on_empty not in ("equal", "best", "skip"):
            raise ValueError(f"quality: unknown estimator={estimator}, usage={usage} or on_empty={on_empty}")
        self.estimator, self.usage, self.power, self.minimum = estimator, usage, power, minimum
        self.threshold, self.quantile, self.on_empty, self.keep = threshold, quantile, on_empty, keep
        self.warmup, self.loss_weight, self.unrecognizable, self.decay = warmup, loss_weight, unrecognizable, decay
        self.norms = norms
        self.register_buffer("ui", torch.zeros(embedding_size))  # running mean of unit embeddings; zero: nothing seen yet
        self.register_buffer("norm_mean", torch.zeros(()))
        self.register_buffer("norm_std", torch.zeros(()))  # zero: nothing seen yet

    @property
    def wants_copies(self) -> bool:
        """Whether embeddings of unrecognizable images are to be given to `see` at every step."""
        return self.estimator == "recognizability" and self.unrecognizable == "given"

    @torch.no_grad()
    def see(self, embeddings: torch.Tensor, total: int) -> None:
        """This rank's embeddings [m, D] (m may be 0) of this step's `total` unrecognizable images. Collective."""
        mean = distributed.all_reduce(F.normalize(embeddings.detach(), dim=1).to(self.ui.dtype).sum(0)) / total
        self._average(mean)

    def _average(self, mean: torch.Tensor) -> None:
        seen = (self.ui != 0).any()
        new = torch.where(seen, self.decay * self.ui + (1 - self.decay) * mean, mean)
        self.ui.copy_(torch.where(mean.isfinite().all(), new, self.ui))  # a step that overflowed must not stay in it

    @torch.no_grad()
    def scores(self, embeddings: torch.Tensor, external: torch.Tensor | None = None) -> torch.Tensor:
        """Score [B] >= 0 of raw embeddings [B, D], higher is better; updates the running statistics. external [B]: the
        numbers from the data, for that estimator.

        norm: |x| / max |x|. recognizability: clamp(1 - cos(x, u), 0, 1) with u the prototype of the unrecognizable.
        magface: (clamp(|x|, l, u) - l) / (u - l) with (l, u) = `norms`. zscore: sigmoid(0.333 (|x| - mean) / std), running
        mean and std.
        """
        norm = embeddings.detach().norm(dim=1)
        if self.estimator == "norm":
            return norm / norm.amax().clamp_min(1e-12)
        if self.estimator == "magface":
            lower, upper = self.norms
            return (norm.clamp(lower, upper) - lower) / (upper - lower)
        if self.estimator == "external":
            return external.to(norm.dtype).clamp_min(0)
        if self.estimator == "zscore":
            fresh = self.norm_std == 0
            for running, value in ((self.norm_mean, norm.mean()), (self.norm_std, norm.std())):
                new = torch.where(fresh, value, running + PACE * (value - running))
                running.copy_(torch.where(norm.isfinite().all(), new, running))
            return torch.sigmoid(SLOPE * (norm - self.norm_mean) / (self.norm_std + 1e-3))
        if self.estimator == "recognizability":
            unit = F.normalize(embeddings.detach(), dim=1)
            if self.unrecognizable == "low_norm":
                lowest = norm.argsort(stable=True)[: max(1, round(LOWEST * len(norm)))]  # ties: the first in the batch
                self._average(unit[lowest].mean(0))
            return (1 - unit @ F.normalize(self.ui, dim=0).to(unit.dtype)).clamp(0, 1)
        return torch.ones_like(norm)

    @torch.no_grad()
    def weights(
        self, scores: torch.Tensor, group: torch.Tensor, step: int, builds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each image counts in its identity's prototype.

        scores [B]; group int64 [B]: number of each image's identity, 0..B-1; builds bool [B]: which images a prototype may
        be made of, None: all; the usage chooses among them. Returns weight [B] >= 0, not all zero in any identity; fallen
        bool [B], per identity: all of its images were rejected and got equal weights, or only the best counts; skip bool
        [B], per identity: rejected, and no prototype is to be made (`on_empty=skip`).
        """
        none = torch.zeros_like(group, dtype=torch.bool)
        may = torch.ones_like(scores) if builds is None else builds.to(scores.dtype)
        if self.estimator == "equal" or step < self.warmup:
            return may, none, none
        ranked = torch.where(may > 0, scores, -1)  # whoever may not build comes last
        if self.usage == "soft":
            weight = scores.pow(self.power).clamp_min(self.minimum)
        elif self.usage == "topk":
            weight = (ranks_in_group(ranked, group) < self.keep).to(scores.dtype)
        else:
            limit = self.threshold
            if limit is None:
                limit = scores.sort().values[min(int(self.quantile * len(scores)), len(scores) - 1)]
            weight = (scores >= limit).to(scores.dtype)
        weight = weight * may
        total = torch.zeros_like(scores).index_add_(0, group, weight)
        members = torch.zeros_like(scores).index_add_(0, group, may)
        fallen = (members > 0) & (total <= 1e-6)
        other = may
        if self.usage == "hard" and self.on_empty == "best":
            other = (ranks_in_group(ranked, group) == 0).to(scores.dtype)
        weight = torch.where(fallen[group], other, weight)
        return weight, fallen, fallen if self.usage == "hard" and self.on_empty == "skip" else none

    def loss_weights(self, scores: torch.Tensor, step: int) -> torch.Tensor | None:
        """Weight [B] of each image in the loss, (score / largest score)^loss_weight; None: all equal. Our own addition."""
        if self.loss_weight == 0 or step < self.warmup:
            return None
        return (scores / scores.amax().clamp_min(1e-12)).pow(self.loss_weight)
