"""Batches for a prototype memory: identities that are in the memory come back, so that their prototypes are refreshed.

With far more identities than slots, a mere permutation shows an identity again long after its prototype was evicted
(measured refreshed fraction at C = 10 M: 0.004). Two ways out, both our reading of "regularly refreshed" (Smirnov et al.
2021, arXiv 2105.02103, give no algorithm that we know of):

`MixedSampler` re-draws a share of each batch from the memory, whose content it knows by replaying the integer plan.
`GroupSampler` goes through a group of identities several times before the next group, and needs to know nothing.

Every batch is P identities x K images. Use K > 2 where you can: with two images a prototype is half the image itself.

Legend: B global batch, M slots, R identities that have records, P identities per batch, K images per identity, t global
step = epoch * steps_per_epoch + step.
"""

from __future__ import annotations

import collections
import threading
from typing import Callable

import numpy as np
import torch

from protomem.data.look_alikes import LookAlikes
from protomem.data.sampler import IdentitySampler, permute
from protomem.errors import UserError
from protomem.prototypes.slots import Slots
from protomem.seeds import hash64

PICKS = ("random", "random_old", "look_alike")
HISTORY = 512  # batches that can be asked for again (our default); far more than any loader reads ahead
_WINDOW = 8  # places in line that are searched for identities outside of the memory, in units of P (our default)
_LINE, _PICK, _SHUFFLE, _PREFILL, _ROUND, _PASS = range(4, 10)  # random streams; the samplers in sampler.py have 1 to 3


class MixedSampler(IdentitySampler):
    """P x K batches: round(refresh * P) identities out of the memory, the others next in line and not in the memory.

    The line is an endless sequence of permutations of all identities. Who is in the memory is passed over. A memory as
    large as the data leaves too few others: if the next 8 P places in line do not have enough, whoever is next is taken,
    so that every identity is shown once a round.

    pick: which ones come back. `random`: uniformly from all occupied slots. `random_old`: from the older half by `seq`
    (with the policy `ring`, a memory that holds everybody never ages, and this half stays the same: use `random` there).
    `look_alike`: the most similar identities of those next in line, as far as known (look_alikes.py) and in the memory,
    then random ones. Never strictly the oldest: with the policy `lru` the same refresh * M identities would come back for
    ever. The order inside a batch is shuffled, so no rank gets more of the refreshed ones than another.

    slots: a fresh `Slots` on the CPU with size and policy of the memory, used by nobody else; refresh, pick: defaults are
    ours; lag: for `look_alike`, more than the loader reads ahead (2 * data.prefetch batches; one less with DALI). A batch
    depends on those before it, so they are drawn in order, by one thread; the last `HISTORY` can be asked for again.
    `state` and `restore` may be called from another one.

    Raises UserError for K = 1, P beyond the identities or the slots, a refresh that leaves no room for others, and labels
    outside of the slots' range; ValueError for an unknown pick.
    """

    def __init__(
        self,
        labels: np.ndarray,
        identities_per_batch: int,
        images_per_identity: int,
        seed: int,
        *,
        slots: Slots,
        refresh: float = 0.2,
        pick: str = "random",
        lag: int = 0,
    ):
        if pick not in PICKS:
            raise ValueError(f"pick {pick!r} is not one of {', '.join(PICKS)}")
        _check_images(images_per_identity)
        super().__init__(labels, identities_per_batch, images_per_identity, seed)
        p = identities_per_batch
        if p > slots.num_slots:
            raise UserError(f"{p} identities per batch, but the memory has only {slots.num_slots} slots; enlarge it")
        if not 0 <= refresh < 1 or round(refresh * p) == p:
            raise UserError(f"refresh={refresh} of {p} identities must be at least 0 and leave room for others; lower it")
        if refresh > 0 and round(refresh * p) == 0:
            raise UserError(f"refresh={refresh} of {p} identities per batch is none; raise it, or set it to 0")
        low, high = self.identities[[0, -1]]
        if low < 0 or high >= slots.num_identities:
            raise UserError(
                f"labels go from {low} to {high}, outside 0..{slots.num_identities - 1}; `protomem data verify` lists them"
            )
        self.pick, self._from_memory = pick, round(refresh * p)
        self._slots, self._label, self._seq = slots, slots.label[:-1].numpy(), slots.seq[:-1].numpy()  # views
        self._slot_of = slots.slot_of.numpy()
        self._occupied = np.empty(0, np.int64)  # slots that hold an identity, ascending
        self._alike = LookAlikes(slots.num_identities, lag, HISTORY) if pick == "look_alike" else None
        self._step, self._place = 0, 0  # the next to be drawn: step, place in line
        self._history: collections.deque = collections.deque(maxlen=HISTORY)  # (place before, positions) of the last steps
        self._lock = threading.Lock()

    # --- drawing ---------------------------------------------------------------------------------------------------

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Record positions of the global batch at `step` of `epoch`, int64 [P*K].

        Raises RuntimeError for a step that is neither the next nor one of the last `HISTORY`; with `look_alike` also when
        the trainer's answers do not come.
        """
        t = epoch * self.steps_per_epoch + step
        if t == self._step:
            if self._alike:
                self._alike.advance(t)
            with self._lock:
                place = self._place
                self._history.append((place, self._draw(t)))
                self._step += 1
        return self._kept(t)[1].copy()

    def _kept(self, t: int) -> tuple[int, np.ndarray]:
        back = self._step - t
        if not 1 <= back <= len(self._history):
            raise RuntimeError(f"step {t} is neither the next, {self._step}, nor one of the last {len(self._history)}, kept")
        return self._history[-back]

    def _draw(self, t: int) -> np.ndarray:
        p = self.identities_per_batch
        if len(self._occupied) < self._slots.num_slots:  # a full memory stays full
            self._occupied = np.flatnonzero(self._label >= 0)
        again = self._from_memory if len(self._occupied) >= p else 0  # any step leaves P in it: enough besides those in line
        labels = self._in_line(p - again)
        if self._alike:
            labels = np.concatenate([labels, self._look_alikes(labels, again)])
        labels = np.concatenate([labels, self._random(p - len(labels), labels, t)])
        labels = labels[permute(np.arange(p), p, hash64(self.seed, _SHUFFLE, t))]
        return self._positions(labels, t)

    def _positions(self, labels: np.ndarray, visit: int) -> np.ndarray:
        self._slots.plan(torch.from_numpy(labels))  # as the whole batch would be: how often a label occurs does not matter
        return self.images(np.searchsorted(self.identities, labels), visit)

    def _in_line(self, wanted: int) -> np.ndarray:
        """The next `wanted` labels in line, outside of the memory if the window has enough of them."""
        r = len(self.identities)
        places = self._place + np.arange(_WINDOW * self.identities_per_batch)  # always holds P distinct identities
        labels = self.identities[permute(places % r, r, hash64(self.seed, _LINE, places // r))]
        possible = np.zeros(len(labels), bool)
        possible[np.unique(labels, return_index=True)[1]] = True  # the window may reach into the next round
        outside = possible & (self._slot_of[labels] < 0)
        chosen = np.flatnonzero(outside if outside.sum() >= wanted else possible)[:wanted]
        self._place += int(chosen[-1]) + 1
        return labels[chosen]

    def _look_alikes(self, labels: np.ndarray, wanted: int) -> np.ndarray:
        """Up to `wanted` labels in the memory that look most like those of `labels`, in their order."""
        nearest = self._alike.table[labels]
        nearest = nearest[nearest >= 0].astype(np.int64)
        nearest = nearest[(self._slot_of[nearest] >= 0) & ~np.isin(nearest, labels)]
        return nearest[np.sort(np.unique(nearest, return_index=True)[1])][:wanted]

    def _random(self, wanted: int, taken: np.ndarray, t: int) -> np.ndarray:
        """`wanted` labels out of the memory that are not `taken`, by slot, so that no order of labels matters."""
        if wanted == 0:
            return taken[:0]
        slots, enough = self._occupied, min(len(self._occupied), wanted + len(taken))
        if self.pick == "random_old":
            seq = self._seq[slots]
            half = max((len(slots) + 1) // 2, enough)
            slots = slots[seq <= np.partition(seq, half - 1)[half - 1]]
        labels = self._label[slots[permute(np.arange(enough), len(slots), hash64(self.seed, _PICK, t))]]
        return labels[~np.isin(labels, taken)][:wanted]

    def prefill_batches(self) -> list[np.ndarray]:
        """Batches [P*K] that fill the memory before training, in an order of their own; the mirror follows.

        ceil(M / P) of them, or fewer if that is more identities than there are; none comes twice but for those that make
        the last batch full. Raises RuntimeError after a batch was drawn.
        """
        if self._history:
            raise RuntimeError("the memory is filled before the first batch, not after it")
        p, r = self.identities_per_batch, len(self.identities)
        total = min(-(-self._slots.num_slots // p) * p, r)
        batches = []
        for number in range(-(-total // p)):
            places = min(number * p, total - p) + np.arange(p)
            labels = self.identities[permute(places, r, hash64(self.seed, _PREFILL))]
            batches.append(self._positions(labels, -1 - number))  # visits before the first
        return batches

    # --- what the trainer tells and saves --------------------------------------------------------------------------

    def tell(self, t: int, fetch: Callable) -> None:
        """What step t found, for `look_alike` only: see `LookAlikes.tell`. Call it for every step, right after it."""
        self._alike.tell(t, fetch)

    def state(self, t: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """(numbers, CPU tensors) from which `restore` goes on with step t, that is after t steps are done.

        Later steps may have been drawn already. The memory's own state is not part of it. Raises RuntimeError if it is
        more than `HISTORY` steps ago, or a step before t told nothing (`look_alike`).
        """
        with self._lock:
            place = self._place if t == self._step else self._kept(t)[0]
        return {"place": place}, self._alike.state(t) if self._alike else {}

    def restore(self, t: int, numbers: dict, tensors: dict, slots_state: dict[str, torch.Tensor]) -> None:
        """Go on with step t from `state(t)` and the buffers of the memory's `Slots` after t steps, of any size.

        Raises UserError when the memory holds identities that these data do not have.
        """
        label, seq, written = (slots_state[name][:-1].cpu() for name in ("label", "seq", "written"))
        strange = np.setdiff1d(label[label >= 0].numpy(), self.identities)
        if strange.size:
            raise UserError(f"the saved memory holds identity {strange[0]}, which has no images here; use its own data")
        with self._lock:
            self._slots.adopt(label, seq, written, *(slots_state[name].cpu() for name in ("cursor", "clock", "time")))
            self._occupied = self._occupied[:0]
            self._step, self._place = t, numbers["place"]
            self._history.clear()
        if self._alike:
            self._alike.restore(t, tensors)

    def close(self) -> None:
        """End a `batch` that waits for the trainer; call it before the loader is closed."""
        if self._alike:
            self._alike.close()


class GroupSampler(IdentitySampler):
    """P x K batches out of one group of identities after the other; each group is gone through R times.

    Endless rounds: a round is a new permutation of all C identities, cut into max(1, ceil(C / G)) groups of sizes that
    differ by one at most. A pass is a new permutation of the group, cut into floor(size / P) batches; the rest sits it
    out. The first pass fills the memory, the later ones refresh it: the refreshed fraction is (passes - 1) / passes as
    long as a group fits. A pure function of the step, at the same cost for any.

    Raises UserError for K = 1, and for groups smaller than P.
    """

    def __init__(
        self,
        labels: np.ndarray,
        identities_per_batch: int,
        images_per_identity: int,
        seed: int,
        *,
        group_size: int,
        passes: int,
    ):
        _check_images(images_per_identity)
        super().__init__(labels, identities_per_batch, images_per_identity, seed)
        c = len(self.identities)
        self.groups = -(-c // max(group_size, 1))
        self._size, self._larger = divmod(c, self.groups)  # the first `_larger` groups have one identity more
        if self._size < identities_per_batch:
            raise UserError(
                f"groups of {self._size} identities are too small for {identities_per_batch} identities per batch; raise "
                "data.sampler.group_size"
            )
        self.passes = passes

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Record positions of the global batch at `step` of `epoch`, int64 [P*K]."""
        p, c = self.identities_per_batch, len(self.identities)
        small, large = self._size // p, (self._size + 1) // p  # batches of a pass through a group of either size
        in_large = self._larger * large * self.passes
        per_round = in_large + (self.groups - self._larger) * small * self.passes
        turn, at = divmod(epoch * self.steps_per_epoch + step, per_round)
        if at < in_large:
            group, at = divmod(at, large * self.passes)
            number, batch = divmod(at, large)
        else:
            group, at = divmod(at - in_large, small * self.passes)
            group += self._larger
            number, batch = divmod(at, small)
        visit = turn * self.passes + number
        size = self._size + (group < self._larger)
        inside = permute(batch * p + np.arange(p), size, hash64(self.seed, _PASS, visit, group))
        places = group * self._size + min(group, self._larger) + inside
        return self.images(permute(places, c, hash64(self.seed, _ROUND, turn)), visit)


def _check_images(images_per_identity: int) -> None:
    if images_per_identity == 1:
        raise UserError("data.sampler.images_per_identity=1: the prototype would be the image itself; use 2 or more")
