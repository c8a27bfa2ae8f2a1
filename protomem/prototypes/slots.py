"""Which identity sits in which slot of a prototype memory: integer bookkeeping, the same on every rank and on the CPU.

A plan is a pure function of the gathered labels, so replicas stay equal without communication, and the sampler can replay
it (protomem/data/memory_samplers.py). Every tensor has a fixed shape and nothing is read back, so a GPU never waits:
each array has one spare place at its end, which swallows the writes of what is only padding.

Evictions: `ring` gives new identities the slots behind a cursor and leaves a refreshed slot its age (a slot that was
refreshed in this very step is passed over); `lru` takes the slots that were written least recently.
Order inside a step: refreshed identities first, then new ones, each by ascending label.

Legend: B global batch, M slots, C identities in all. Source: Smirnov et al. 2021 (arXiv 2105.02103) for the queue of
prototypes; both policies and the order inside a step are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from protomem.seeds import mix

POLICIES = ("ring", "lru")
EMPTY, FILLER = -1, -2  # labels of slots without an identity; a filler's random row acts as a negative
_LATEST = torch.iinfo(torch.int64).max


@dataclass
class Plan:
    """What one step does. Identities are padded to B places, since their number is not known without waiting.

    identity [B]  ascending labels of the batch's identities, -1 in padding
    group    [B]  place in `identity` of each sample
    slot     [B]  slot of each identity, M in padding
    found    [B]  the identity was stored before: its slot is refreshed
    new      [B]  it was not: it takes an empty slot or evicts
    """

    identity: torch.Tensor
    group: torch.Tensor
    slot: torch.Tensor
    found: torch.Tensor
    new: torch.Tensor


class Slots(nn.Module):
    """label, seq, written [M + 1] int64 and slot_of [C + 1] int32 (the only thing that grows with C: 4 bytes each).

    label: identity of a slot, -1 empty, -2 random filler. seq: unique; rises with insertion (ring) or writing (lru); the
    smallest goes first. written: number of the step that last wrote the slot. Raises ValueError for an unknown policy.
    """

    def __init__(self, num_slots: int, num_identities: int, policy: str = "ring"):
        super().__init__()
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
        self.num_slots, self.num_identities, self.policy = num_slots, num_identities, policy
        self.register_buffer("label", torch.full((num_slots + 1,), EMPTY))
        self.register_buffer("seq", torch.arange(-num_slots, 1))  # empty slots come first, in order
        self.register_buffer("written", torch.full((num_slots + 1,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))  # ring: the next slot to give away
        self.register_buffer("clock", torch.ones((), dtype=torch.int64))  # the next seq
        self.register_buffer("time", torch.zeros((), dtype=torch.int64))  # steps planned so far
        self.register_buffer("overfull", torch.zeros((), dtype=torch.bool))  # a step once had more identities than slots
        self.register_buffer("slot_of", torch.full((num_identities + 1,), -1, dtype=torch.int32), persistent=False)

    @torch.no_grad()
    def plan(self, labels: torch.Tensor) -> Plan:
        """Give every identity of the gathered labels [B] int64 (0 <= label < C) a slot, and remember it."""
        b, m, c = len(labels), self.num_slots, self.num_identities
        place = torch.arange(b, device=labels.device)
        ordered, order = labels.sort(stable=True)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        rank = starts.cumsum(0) - 1
        group = torch.empty_like(rank).scatter_(0, order, rank)
        identity = torch.full_like(ordered, -1).scatter_(0, rank, ordered)
        real = place < starts.sum()
        slot = self.slot_of[torch.where(real, identity, c)].long()
        found = real & (slot >= 0)
        new = real & ~found
        refreshed = torch.where(found, slot, m)
        self.written[refreshed] = self.time
        count_found, count_new = found.sum(), new.sum()
        if self.policy == "lru":
            self.seq[refreshed] = self.clock + found.cumsum(0) - 1
            self.clock += count_found
        free = self._free(min(b, m), count_new)
        fresh = torch.cat([free, free.new_full((b - len(free),), m)])[(new.cumsum(0) - 1).clamp_min(0)]
        fresh = torch.where(new, fresh, m)
        old = self.label[fresh]
        self.slot_of[torch.where(old >= 0, old, c)] = -1
        slot = torch.where(found, slot, fresh)
        self.slot_of[torch.where(real & (slot < m), identity, c)] = slot.int()
        self.label[fresh] = torch.where(fresh < m, identity, EMPTY)
        self.seq[fresh] = self.clock + new.cumsum(0) - 1
        self.written[fresh] = self.time
        self.clock += count_new
        self.time += 1
        self.overfull |= count_found + count_new > m
        return Plan(identity, group, slot, found, new)

    def _free(self, count: int, wanted: torch.Tensor) -> torch.Tensor:
        """The slots [count] to give away, first to go first; the first `wanted` of them are given away now."""
        if self.policy == "lru":
            busy = self.written[:-1] == self.time
            seq, slot = torch.where(busy, _LATEST, self.seq[:-1]).topk(count, largest=False)
            return torch.where(seq == _LATEST, self.num_slots, slot)
        place = torch.arange(count, device=self.label.device)
        candidate = (self.cursor + place) % self.num_slots  # at most count - wanted of them are refreshed in this step
        open_ = self.written[candidate] != self.time
        nth = open_.cumsum(0) - 1
        free = torch.full((count + 1,), self.num_slots, device=place.device)
        free[torch.where(open_, nth, count)] = candidate
        passed = torch.where(open_ & (nth < wanted), place + 1, 0).amax()
        self.cursor.copy_((self.cursor + passed) % self.num_slots)
        return free[:count]

    def index(self) -> None:
        """Make `slot_of` anew from `label` (after loading)."""
        self.slot_of.fill_(-1)
        label = self.label[:-1]
        slots = torch.arange(self.num_slots, dtype=torch.int32, device=label.device)
        self.slot_of[torch.where(label >= 0, label, self.num_identities)] = slots
        self.slot_of[-1] = -1

    def occupied(self) -> torch.Tensor:
        """bool [M]: the slot holds an identity."""
        return self.label[:-1] >= 0

    def age(self) -> torch.Tensor:
        """int64 [M]: steps since a slot was last written; 0 for one written in the step just planned."""
        return self.time - 1 - self.written[:-1]

    def fingerprint(self) -> torch.Tensor:
        """A 0-d int64 hash of the replicated state, to compare ranks with."""
        weight = torch.arange(1, len(self.label) * 2, 2, device=self.label.device) * (mix(1) | 1)
        mixed = (self.label * (mix(2) | 1)) ^ (self.seq * (mix(3) | 1)) ^ (self.written * (mix(4) | 1))
        counts = (self.cursor * (mix(5) | 1)) ^ (self.clock * (mix(6) | 1)) ^ (self.time * (mix(7) | 1))
        return (mixed[:-1] * weight[:-1]).sum() ^ counts

    def adopt(self, label: torch.Tensor, seq: torch.Tensor, written: torch.Tensor, cursor, clock, time) -> torch.Tensor:
        """Take over the state of a memory of another (or this) size: label, seq, written [M_old].

        Returns int64 [M_old]: where each old slot's row belongs now, -1 for what is dropped. Of equal size everything
        stays where it was. A smaller memory keeps the rows of the largest seq, a larger one all; they then stand in the
        order of their seq from slot 0 on, so the cursor meets the oldest first, or the first empty slot.
        """
        old, m = len(label), self.num_slots
        to = torch.arange(old, device=label.device)
        if old != m:
            rows = torch.where(label == EMPTY, -_LATEST, seq)  # empty slots are dropped first
            rank = rows.argsort(stable=True).argsort()  # 0: the oldest
            kept = label != EMPTY
            first = max(old - m, 0)
            skip = torch.maximum((~kept).sum(), torch.tensor(first, device=label.device))
            to = torch.where(kept & (rank >= skip), rank - skip, -1)
        place = torch.where(to >= 0, to, m)
        self.label.fill_(EMPTY)
        below = seq.amin().clamp_max(0) - 1  # fillers have negative numbers of their own
        self.seq.copy_(torch.arange(-m, 1, device=label.device) + below)
        self.written.fill_(-1)
        for name, values in (("label", label), ("seq", seq), ("written", written)):
            getattr(self, name)[place] = values
        self.label[-1] = EMPTY
        self.clock.copy_(clock)
        self.time.copy_(time)
        self.cursor.copy_(cursor if old == m else (to >= 0).sum() % m)
        self.index()
        return to
