"""The flight recorder: which collectives this rank began and finished last, and at which step.

Every collective of ours is one `with flight.collective(name, tensor):` (some microseconds). On a GPU "finished" means that
it was queued; there torch's own recorder knows more (`nccl_records`). protomem/watch.py compares the ranks' records when
one of them is lost.
"""

from __future__ import annotations

import collections
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

KEPT = 128  # collectives (our default)
NUMBER, NAME, STEP, BYTES, BEGAN, ENDED = range(6)

_ring: collections.deque[list] = collections.deque(maxlen=KEPT)
_now = {"number": 0, "step": None, "moved": time.monotonic()}


def at_step(step: int | None) -> None:
    """From here on the collectives belong to the optimizer step `step`; None: to none, and nothing limits how long it takes."""
    _now["step"], _now["moved"] = step, time.monotonic()


class collective:
    """Around a collective (or several that belong together): notes its begin and, if it did not fail, its end."""

    __slots__ = ("entry",)

    def __init__(self, name: str, tensor: torch.Tensor | None = None):
        now, at = _now, time.monotonic()
        now["number"] += 1
        now["moved"] = at
        size = 0 if tensor is None else tensor.numel() * tensor.element_size()
        self.entry = [now["number"], name, now["step"], size, at, None]
        _ring.append(self.entry)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.entry[ENDED] = _now["moved"] = time.monotonic()


def open_entry() -> list | None:
    """The innermost collective that was begun and is not finished."""
    return next((entry for entry in reversed(list(_ring)) if entry[ENDED] is None), None)


def idle_s() -> float:
    """Seconds since a collective or a step began or ended; 0 between steps, where evaluating or saving may take long."""
    return 0.0 if _now["step"] is None else time.monotonic() - _now["moved"]


def record() -> dict:
    """This rank's record as of now, for JSON: how many collectives were `begun`, which one is `open`, the last `collectives`
    (times in seconds ago) and where the main thread is (`stack`, innermost last)."""
    at = time.monotonic()
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    names = ("number", "name", "step", "bytes", "began_s_ago", "ended_s_ago")

    def shown(entry):
        return dict(zip(names, [*entry[:BEGAN], *(None if t is None else round(at - t, 3) for t in entry[BEGAN:])]))

    waiting = open_entry()
    return {
        "begun": _now["number"],
        "step": _now["step"],
        "idle_s": round(at - _now["moved"], 3),
        "open": waiting and shown(waiting),
        "collectives": [shown(entry) for entry in list(_ring)],
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack],
    }


def nccl_records(folder: Path, env=os.environ) -> None:
    """Have NCCL write its own flight record to `folder/nccl-rankN` at a time-out, unless the environment says otherwise. Before
    the process group; `torchfrtrace` reads the files."""
    for name, value in (
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl-rank")),
    ):
        env.setdefault(name, value)
