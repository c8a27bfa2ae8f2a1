"""Who looks like whom, told by the training steps some steps late: a table that is the same whatever the timing.

The trainer learns from its logits which other identity of the memory is nearest to each image, while the sampler already
draws batches further on. So that what is drawn depends on neither's speed, step t uses exactly what the steps up to
t - lag have told, and waits for it. Undo information lets a checkpoint ask how the table was some steps ago.

Legend: B global batch, C identities. Source of pairs of look-alikes in batches: Smirnov et al., "Doppelganger Mining for
Face Representation Learning" (ICCV workshops 2017); the delay is ours.
"""

from __future__ import annotations

import threading
from typing import Callable

import numpy as np
import torch


class LookAlikes:
    """The most similar other identity of each identity: `table` int32 [C], -1 where unknown.

    lag: steps until what a step told counts; more than the loader reads ahead, or training would wait for itself.
    One thread calls `advance` (the loader's), any may call the others. Raises ValueError for a lag below 1.
    """

    patience_s = 600.0  # how long `advance` waits for the trainer (our default)

    def __init__(self, num_identities: int, lag: int, history: int):
        if lag < 1:
            raise ValueError(f"lag={lag} must be at least 1: a step's result is not known before the step")
        self.table, self.lag = np.full(num_identities, -1, np.int32), lag
        self._history, self._changed, self._closed = history, threading.Condition(), False
        self._start(0, 0)

    def _start(self, step: int, applied: int) -> None:
        self._step = step  # the next to be drawn
        self._applied = applied  # what all steps before this one told is in the table
        self._told: dict[int, _Once] = {}  # step -> what it told, as long as a state may ask for it
        self._undo: dict[int, tuple[int, list]] = {}  # step drawn -> (_applied before it, [(labels, their old values)])

    def tell(self, step: int, fetch: Callable) -> None:
        """What `step` found. Every step has to tell, once.

        fetch() -> (labels [B], the nearest other label [B], -1 unknown), integers, of the global batch and so the same
        on every rank; numpy arrays or CPU tensors. It is called once, later, from any thread, and may wait for a device.
        Of several images of an identity the first one with an answer counts.
        """
        with self._changed:
            self._told[step] = _Once(fetch)
            self._changed.notify_all()

    def advance(self, step: int) -> None:
        """Bring the table to what counts for drawing `step`; steps come one after the other.

        Raises RuntimeError if the trainer does not tell what is due within `patience_s`, or if this was closed.
        """
        due = range(self._applied, max(step - self.lag + 1, self._applied))
        updates = [_update(*self._wait(s)()) for s in due]  # without the lock: the trainer must not wait for a device here
        undo = []
        with self._changed:
            for labels, nearest in updates:
                undo.append((labels, self.table[labels]))
                self.table[labels] = nearest
            self._undo[step] = self._applied, undo
            self._step, self._applied = step + 1, due.stop
            for old in [s for s in self._undo if s <= step - self._history]:
                del self._undo[old]
            first = next(iter(self._undo.values()))[0]
            for old in [s for s in self._told if s < first]:
                del self._told[old]

    def _wait(self, step: int) -> _Once:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or step in self._told, self.patience_s):
                raise RuntimeError(f"the sampler waited {self.patience_s:g} s for the look-alikes of step {step}")
            if self._closed:
                raise RuntimeError("the sampler was closed while it waited for look-alikes")
            return self._told[step]

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """As it was before `step` was drawn, though later ones may have been: table int32 [C], and what the steps before
        it told that did not count yet, int32 [<= lag, B, 2], oldest first. All steps before it must have told."""
        with self._changed:
            if step != self._step and step not in self._undo:
                raise RuntimeError(f"the look-alikes as of step {step} are not kept; the next step is {self._step}")
            table, applied = self.table.copy(), self._applied
            for s in range(self._step - 1, step - 1, -1):
                applied, undo = self._undo[s]
                for labels, old in reversed(undo):
                    table[labels] = old
            missing = [s for s in range(applied, step) if s not in self._told]
            if missing:
                raise RuntimeError(f"step {missing[0]} told no look-alikes; every step before a checkpoint has to")
            told = [self._told[s] for s in range(applied, step)]
        pending = [torch.from_numpy(np.stack(once(), axis=-1)) for once in told]
        empty = torch.empty(0, 0, 2, dtype=torch.int32)
        return {"look_alike": torch.from_numpy(table), "pending": torch.stack(pending) if pending else empty}

    def restore(self, step: int, state: dict[str, torch.Tensor]) -> None:
        """Go on before `step` from what `state(step)` returned."""
        pending = state["pending"].numpy()
        with self._changed:
            self.table[:] = state["look_alike"].numpy()
            self._start(step, step - len(pending))
        for s, pairs in enumerate(pending, step - len(pending)):
            self.tell(s, lambda pairs=pairs: (pairs[:, 0], pairs[:, 1]))

    def close(self) -> None:
        """End a wait of `advance`, which then raises."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Once:
    """fetch()'s result as two int32 arrays, fetched by whoever needs it first."""

    def __init__(self, fetch: Callable):
        self._fetch, self._lock, self._result = fetch, threading.Lock(), None

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._result is None:
                self._result = tuple(np.array(values, np.int32) for values in self._fetch())
                self._fetch = None  # with the buffers that it holds
            return self._result


def _update(labels: np.ndarray, nearest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each label once, with its first known answer."""
    labels, nearest = labels[nearest >= 0], nearest[nearest >= 0]
    labels, first = np.unique(labels, return_index=True)
    return labels, nearest[first]
