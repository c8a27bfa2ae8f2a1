"""Prototype Memory: prototypes made from the batch, kept in a circular memory whose slots are spread over ranks.

Smirnov et al. 2021 (arXiv 2105.02103): an identity's prototype is the normalised mean of the unit embeddings of its
images in the batch; it enters a memory of limited size and serves as a classifier weight until the oldest make room.
Smirnov et al. 2023 (arXiv 2311.07734): images are weighted by their quality (protomem/quality.py). The cost of a step
does not depend on the number of identities. Order of a step: plan (integers, as soon as the labels are known),
generate, write, classify. Slot s lives on rank s mod W as local row s div W, so the writes of a step spread over ranks.

Legend: B global batch, D feature size, M slots, R = ceil(M / W) rows of this rank, W world size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from protomem import distributed
from protomem.head import Columns, GradSink, Live, Nearest
from protomem.prototypes import reshard
from protomem.prototypes.classifier import INIT_ROWS, initial_rows
from protomem.prototypes.slots import FILLER, Plan, Slots
from protomem.prototypes.variational import bank_for
from protomem.quality import Quality, ranks_in_group

TINY = 1e-6  # a mean of unit vectors this short has no direction


def generate(embeddings: torch.Tensor, weight: torch.Tensor, group: torch.Tensor, average: str, leave_out: bool):
    """Prototypes of the batch's identities, norm(sum q x / sum q) (QAPM), and, with `leave_out`, without each image.

    embeddings [B, D] raw, with a graph or without; weight q [B] >= 0; group int64 [B] in 0..B-1; average: `unit` (means
    of unit embeddings) or `raw`. Returns p [B, D], unit rows, zero where there is no identity of that number, and per
    image [B, D] norm(sum q x - q_j x_j), or p where nothing is left; None without `leave_out`. Where the sum has no
    direction the image with the largest weight stands for it.
    """
    e = F.normalize(embeddings, dim=1) if average == "unit" else embeddings
    share = weight / torch.zeros_like(weight).index_add_(0, group, weight).clamp_min(1e-12)[group]
    part = share[:, None] * e
    sums = torch.zeros_like(e).index_add(0, group, part)
    first = torch.zeros_like(group)
    order = ranks_in_group(weight, group)
    spare = len(group)  # all but the best of each identity write into a spare place
    first = torch.cat([first, first[:1]]).scatter(0, torch.where(order == 0, group, spare), torch.arange(spare, device=group.device))
    lost = sums.norm(dim=1, keepdim=True) < TINY
    real = torch.zeros_like(weight).index_add_(0, group, torch.ones_like(weight)) > 0
    p = F.normalize(torch.where(lost, e[first[:-1]] * real[:, None], sums), dim=1)
    if not leave_out:
        return p, None
    wide = part.double()  # what is left beside an image that has nearly all of the weight is lost in fp32
    rest = (torch.zeros_like(wide).index_add(0, group, wide)[group] - wide).to(part.dtype)
    return p, torch.where(rest.norm(dim=1, keepdim=True) < TINY, p[group], F.normalize(rest, dim=1))


class PrototypeMemory(nn.Module):
    """This rank's rows of the memory, and the replicated bookkeeping (`slots`).

    The arguments are explained in configs/default.yaml under `prototypes.memory`. quality: its weights and scores.
    pinned: the prototype of the unrecognizable takes part as a negative, in one more row. seed: of random fillers.
    look_alikes: find the stored identity nearest to each image at every step (`look_alike_labels`).
    injection: weight, steps and start of the features that are mixed in (VPL, protomem/prototypes/variational.py), if any.
    Our reading of VPL here: what the head compares with is the stored prototype with the feature of the identity's last
    image of an earlier step mixed in; what is stored stays unmixed. The feature lives as long as its identity has the slot.
    A positive that is made without the image itself (loo) stays as it is.
    """

    row_sparse = False
    empirical = None  # EPL's second prototypes would be the memory itself

    def __init__(
        self,
        num_identities: int,
        embedding_size: int,
        *,
        size: int,
        policy: str = "ring",
        momentum: float = 0.0,
        fill: str = "empty",
        gradient: str = "none",
        self_exclusion: str = "none",
        average: str = "unit",
        storage: str = "fp32",
        quality: Quality | None = None,
        pinned: bool = False,
        seed: int = 0,
        look_alikes: bool = False,
        injection: dict | None = None,
    ):
        super().__init__()
        self.num_identities, self.size, self.momentum, self.gradient_mode = num_identities, size, momentum, gradient
        self.self_exclusion, self.average, self.pinned, self.look_alikes = self_exclusion, average, pinned, look_alikes
        self.quality = quality or Quality(embedding_size)
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.local = -(-(size + pinned) // self.world)
        self.slots = Slots(size, num_identities, policy)
        dtype = torch.bfloat16 if storage == "bf16" else torch.get_default_dtype()
        # One row more than there are slots: the writes of padding and of other ranks' identities end there.
        self.register_buffer("store", torch.zeros(self.local + 1, embedding_size, dtype=dtype))
        self.register_buffer("filled", torch.zeros(self.local * self.world + 1, dtype=torch.bool))  # by slot, replicated
        if fill == "random":
            self._fill_at_random(seed)
        self.bank = bank_for(self.local, embedding_size, injection)
        self.sink = GradSink() if gradient == "sgd" else None
        self.nearest: Nearest | None = None
        self.seen: dict = {}

    def _fill_at_random(self, seed: int) -> None:
        for start in range(0, self.size, INIT_ROWS):  # a function of the slot: the world size does not matter
            rows = initial_rows(start, min(start + INIT_ROWS, self.size), self.store.shape[1], 1.0, seed)
            first = (self.rank - start) % self.world
            mine = F.normalize(rows[first :: self.world], dim=1)
            row = (start + first) // self.world
            self.store[row : row + len(mine)] = mine
        self.filled[: self.size] = True
        self.slots.label[:-1] = FILLER

    @property
    def total_rows(self) -> int:
        """Rows of all ranks together, padding included."""
        return self.local * self.world

    def saved(self) -> dict[str, torch.Tensor]:
        return reshard.saved(self)

    def blank(self, sizes: dict[str, list[int]]) -> tuple[dict[str, torch.Tensor], int]:
        return reshard.blank(self, sizes)

    def restore(self, state: dict[str, torch.Tensor], old_world: int) -> None:
        reshard.restore(self, state, old_world)

    @property
    def rows(self) -> torch.Tensor:
        """[R, D] this rank's slots, in place."""
        return self.store[:-1]

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin_step(self, labels: torch.Tensor, step: int, external: torch.Tensor | None = None) -> None:
        """Plan a step with the gathered labels [B] and the data's own quality numbers [B], if they are used."""
        self.plan, self.labels, self.step, self.external = self.slots.plan(labels), labels, step, external
        if self.sink is not None:
            self.sink.begin(self.rows)
        if self.bank is not None:
            self.bank.forget(self._local(torch.where(self.plan.new, self.plan.slot, self.size)))
            self.bank.begin_step(step)

    def columns(self, labels: torch.Tensor, embeddings: torch.Tensor, keys: torch.Tensor | None = None, observe: bool = False):
        """Make the batch's prototypes, write them, and return this rank's rows as the head's Columns.

        embeddings [B, D]: gathered, raw, with a graph; keys [B, D]: what prototypes are made of instead (the averaged
        encoder's), without one. labels are those of `begin_step`. observe: also collect what `statistics` reports.
        """
        plan, made_of = self.plan, embeddings if keys is None else keys
        scores = self.quality.scores(made_of, self.external)
        query = self.quality.loss_weights(scores, self.step)
        builds = None
        if self.self_exclusion == "split":
            count = torch.zeros_like(scores).index_add_(0, plan.group, torch.ones_like(scores))[plan.group]
            builds = ranks_in_group(torch.zeros_like(scores), plan.group) < (count + 1) // 2
            query = ~builds * (1 if query is None else query)
        weight, fallen, skip = self.quality.weights(scores, plan.group, self.step, builds)
        with torch.set_grad_enabled(self.gradient_mode == "batch" and torch.is_grad_enabled()):
            source = made_of if self.gradient_mode == "batch" else made_of.detach()
            p, own = generate(source, weight, plan.group, self.average, self.self_exclusion == "loo")
            row = self._local(torch.where(plan.identity >= 0, plan.slot, self.size))
            old = self.store[row].to(p.dtype) if self.momentum or observe else None
            mixed = self._refresh(p, old, plan)
        # An embedding that overflowed must not stay in the memory for a whole revolution.
        skip = skip | ~mixed.detach().isfinite().all(1)
        self._write(mixed.detach(), plan, row, skip)
        if observe:
            self._observe(embeddings, scores, p.detach(), old, row, fallen)
        filled = self.filled[self._flag(plan.slot)][plan.group]
        target = torch.where(filled, row[plan.group], self.local)
        if self.self_exclusion == "split" or self.quality.loss_weight or self.quality.on_empty == "skip":
            query = filled.to(scores.dtype) * (1 if query is None else query)
        self.nearest = Nearest() if observe or self.look_alikes else None
        return Columns(
            self.rows,
            torch.where(target < self.local, target, -1),
            self.sink,
            unit=self.store.dtype != torch.bfloat16,  # rounding to bf16 leaves a row up to 0.4 % off the sphere
            valid=self.filled[:-1].view(self.local, self.world)[:, self.rank],
            own=own,
            uses_own=None if own is None else ~skip[plan.group],  # what was not made anew is the positive as it is stored
            live=Live(mixed, torch.where((row < self.local) & ~skip, row, -1)) if mixed.requires_grad else None,
            weight=query,
            nearest=self.nearest,
            injection=None if self.bank is None else self.bank.injection(),
        )

    def _local(self, slot: torch.Tensor) -> torch.Tensor:
        """Local row of each slot, the spare one for slots of other ranks and for padding (slot M)."""
        mine = (slot % self.world == self.rank) & (slot < self.size)
        return torch.where(mine, slot // self.world, self.local)

    def _flag(self, slot: torch.Tensor) -> torch.Tensor:
        return torch.where(slot < self.size, slot, len(self.filled) - 1)

    def _refresh(self, p: torch.Tensor, old: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        if not self.momentum:
            return p
        stored = plan.found & self.filled[self._flag(plan.slot)]
        mixed = self.momentum * old + (1 - self.momentum) * p
        use = stored[:, None] & (mixed.norm(dim=1, keepdim=True) >= TINY)
        return torch.where(use, F.normalize(mixed, dim=1), p)

    def _write(self, p: torch.Tensor, plan: Plan, row: torch.Tensor, skip: torch.Tensor) -> None:
        self.store[torch.where(skip, self.local, row)] = p.to(self.store.dtype)
        flag = self._flag(plan.slot)
        self.filled[flag] = torch.where(plan.new, ~skip, self.filled[flag] | ~skip)
        self.filled[-1] = False
        self.store[-1].zero_()  # whatever was written there must not come back as 0 * inf
        if self.pinned:
            if self.size % self.world == self.rank:
                self.store[self.size // self.world] = F.normalize(self.quality.ui, dim=0).to(self.store.dtype)
            self.filled[self.size] = (self.quality.ui != 0).any()

    def after_step(self, labels: torch.Tensor, unit: torch.Tensor) -> None:
        """End a step whose global batch had these labels [B] and unit embeddings [B, D]."""
        if self.bank is not None:
            row = self._local(self.plan.slot[self.plan.group])
            self.bank.take(torch.where(row < self.local, row, -1), unit)

    def gradient(self) -> torch.Tensor | None:
        """Gradient of this rank's rows [R, D], for clipping and loss scaling in place; None: they are constants."""
        return self.sink.buffer if self.sink is not None else None

    # --- what is reported ------------------------------------------------------------------------------------------

    def _observe(self, embeddings, scores, p, old, row, fallen) -> None:
        plan, norm = self.plan, embeddings.detach().norm(dim=1)
        here = plan.found & (row < self.local)
        moved = torch.stack([torch.where(here, (p * old).sum(1), 0).sum(), here.sum().to(p.dtype)])
        self.seen = {"scores": scores, "norm": norm, "fallen": fallen.sum(), "moved": moved}

    def look_alike_labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine [B] and label [B] of the stored identity nearest to each image, over all ranks; label -1 where there is
        none (a filler). One collective; nothing is read back."""
        slot = self.nearest.row * self.world + self.rank
        label = self.slots.label[slot.clamp_max(self.size)].clamp_min(-1)
        mine = torch.stack([self.nearest.cos.double(), label.double()], 1)  # float64 holds every label exactly
        best = distributed.gather_rows(mine[None], [1] * self.world)  # [W, B, 2]
        winner = best[:, :, 0].argmax(0)
        cos, label = best.gather(0, winner[None, :, None].expand(1, -1, 2))[0].unbind(1)
        return cos, torch.where(cos.isinf(), -1, label.long())

    def statistics(self, per_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        """0-d tensors about the step whose `columns` was called with observe, equal on every rank. per_sample [B]: loss.

        refresh_cos is the mean cosine of new and old prototypes at their refresh: how far the stored ones had aged.
        """
        seen, plan, occupied = self.seen, self.plan, self.slots.occupied()
        moved = distributed.all_reduce(seen["moved"].clone())
        identities = (plan.identity >= 0).sum()
        age = torch.where(occupied, self.slots.age(), 0).to(torch.float32)
        hardest = self.look_alike_labels()[0]
        hardest = torch.where(hardest.isinf(), torch.zeros_like(hardest), hardest)
        scores, lowest = seen["scores"], max(1, len(per_sample) // 10)
        worst = per_sample.detach()[scores.argsort()[:lowest]].sum() / per_sample.detach().sum().clamp_min(1e-12)
        out = {
            "memory_size": torch.full_like(identities, self.size),
            "memory_occupied": occupied.sum(),
            "memory_refreshed": plan.found.sum() / identities,
            "memory_age_mean": age.sum() / occupied.sum().clamp_min(1),
            "memory_age_max": age.amax(),
            "refresh_cos": torch.where(moved[1] > 0, moved[0] / moved[1].clamp_min(1), torch.nan),
            "cos_hardest": hardest.mean(),
        }
        if self.quality.estimator != "equal":
            ordered = scores.sort().values
            for name, share in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
                out[f"quality_{name}"] = ordered[round(share * (len(ordered) - 1))]
            centred = torch.stack([scores - scores.mean(), seen["norm"] - seen["norm"].mean()])
            spread = centred.norm(dim=1)
            out["quality_norm_correlation"] = (centred[0] * centred[1]).sum() / (spread[0] * spread[1]).clamp_min(1e-12)
            out["loss_lowest_decile"] = worst
            out["fallbacks"] = seen["fallen"]
        if self.quality.estimator == "recognizability":
            out["unrecognizable_norm"] = self.quality.ui.norm()
        if self.bank is not None:
            out |= self.bank.statistics(self.size)
        return out

    def check_replicas(self) -> None:
        """Compare the bookkeeping of all ranks; waits for the device. Raises RuntimeError where they differ."""
        own = self.slots.fingerprint() ^ (self.filled * torch.arange(len(self.filled), device=self.filled.device)).sum()
        low, high = distributed.all_reduce(own.clone(), "min"), distributed.all_reduce(own.clone(), "max")
        if low.item() != high.item():
            raise RuntimeError(f"prototype memory: the ranks' bookkeeping differs at step {self.step}; this is a bug")
