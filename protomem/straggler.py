"""Which rank the others wait for: each rank's own time in the loader and in the encoder's forward pass, without collectives."""

from __future__ import annotations

import socket
import time

import torch

from protomem import distributed

LEAST_S = 0.5  # per interval: less than this more than the usual rank is noise (our default)


class Stopwatch:
    """Adds up the seconds of calls of the encoder: on a GPU between events of its stream, without waiting."""

    def __init__(self, device: torch.device):
        self.cuda, self.events, self.seconds = device.type == "cuda", [], 0.0

    def around(self, call):
        """`call`, with the time that it takes added up here. Not hooks of the module: a compiled one would trace them."""

        def timed(*given):
            begun = self._mark()
            out = call(*given)
            self._add(begun)
            return out

        if hasattr(call, "no_sync"):  # DDP's, for micro-batches
            timed.no_sync = call.no_sync
        return timed

    def _mark(self):
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, begun) -> None:
        if self.cuda:
            self.events.append((begun, self._mark()))
        else:
            self.seconds += self._mark() - begun

    def read(self) -> float:
        """Seconds since the last call. On a GPU it waits for the last pass: call it where that is done anyway."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        seconds, self.events, self.seconds = self.seconds, [], 0.0
        return seconds


def find(own_s: float, steps: int, factor: float, device: torch.device) -> dict | None:
    """What to log if the slowest rank's own seconds in an interval of `steps` exceed `factor` times the median rank's: its
    `rank`, `host`, `ratio`, and seconds a step. Equal on all ranks. Collective."""
    every = distributed.gather_rows(torch.tensor([own_s], device=device), [1] * distributed.world_size()).tolist()
    usual, slowest = sorted(every)[(len(every) - 1) // 2], max(every)
    if slowest <= factor * usual or slowest - usual < LEAST_S:
        return None
    rank = every.index(slowest)
    host = distributed.gather_objects(socket.gethostname())[rank]
    ratio = round(slowest / max(usual, 1e-9), 2)
    per_step = {"s_per_step": round(slowest / steps, 4), "usual": round(usual / steps, 4)}
    return {"rank": rank, "host": host, "ratio": ratio, **per_step}
