"""A prototype memory as slow and plain as possible: dictionaries, lists and loops, one process, float64; for tests only.

Written from the equations and from the rules that protomem/prototypes states, not from its code.
"""

from __future__ import annotations


class SlotReference:
    """Which identity sits in which slot: a dictionary, a list of slots and a search for every new identity.

    order[s] is the moment slot s was filled (ring) or written (lru), None while it is empty; written[s] is the number of
    the step that last wrote it.
    """

    def __init__(self, num_slots: int, policy: str):
        self.num_slots, self.policy = num_slots, policy
        self.slots: list[int | None] = [None] * num_slots
        self.slot_of: dict[int, int] = {}
        self.order: list[int | None] = [None] * num_slots
        self.written: list[int] = [-1] * num_slots
        self.cursor, self.moment, self.time = 0, 0, 0

    def plan(self, labels: list[int]) -> tuple[list[int], list[int]]:
        """Give each identity of the batch a slot; returns (refreshed identities, new identities)."""
        identities = sorted(set(labels))
        refreshed = [c for c in identities if c in self.slot_of]
        new = [c for c in identities if c not in self.slot_of]
        busy = {self.slot_of[c] for c in refreshed}
        for c in refreshed:
            slot = self.slot_of[c]
            self.written[slot] = self.time
            if self.policy == "lru":
                self.order[slot] = self._tick()
        for c in new:
            slot = self._victim(busy)
            busy.add(slot)
            if self.slots[slot] is not None:
                del self.slot_of[self.slots[slot]]
            self.slots[slot], self.slot_of[c] = c, slot
            self.order[slot], self.written[slot] = self._tick(), self.time
        self.time += 1
        return refreshed, new

    def _tick(self) -> int:
        self.moment += 1
        return self.moment

    def _victim(self, busy: set[int]) -> int:
        if self.policy == "ring":
            while self.cursor in busy:
                self.cursor = (self.cursor + 1) % self.num_slots
            slot = self.cursor
            self.cursor = (slot + 1) % self.num_slots
            return slot
        candidates = [s for s in range(self.num_slots) if s not in busy]
        empty = [s for s in candidates if self.slots[s] is None]
        return empty[0] if empty else min(candidates, key=lambda s: self.order[s])

    def oldest_first(self) -> list[int]:
        """The filled slots in the order of their age."""
        return sorted((s for s in range(self.num_slots) if self.slots[s] is not None), key=lambda s: self.order[s])
