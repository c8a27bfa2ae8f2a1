"""Checkpoints that are written while training goes on: the step waits for a copy of the state, not for the disk.

All else is as without: a thread calls the same `state.save`, whose collectives run over a process group of their own, so
that they cannot meet those of the steps. One checkpoint is written at a time; the next one waits for it.
"""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import torch

from protomem import distributed, flight, state

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run into `folder`; all ranks call the same methods in the same order.

    asynchronous: in a thread, from a copy in host memory (as large as this rank's state, made at the first checkpoint and
    used again, pinned where the state is on a GPU); else before `start` returns.
    report: called with (step, path, seconds that training waited, seconds until it was complete) on every rank.
    As a context manager it waits for the thread at the end, also after an exception.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        timeout_s: float,
        written: int,
        report: Callable[[int, Path, float, float], None],
    ):
        self.folder, self.keep, self.asynchronous, self.report = folder, keep, asynchronous, report
        self.written = written  # step of the last complete checkpoint
        self.group = distributed.new_cpu_group(timeout_s) if asynchronous else None
        on = (torch.cuda.current_device(),) if torch.cuda.is_initialized() else ()  # a thread begins on device 0
        self._pool = ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device if on else None, on)
        self._pending: tuple[Future, int, float, float] | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def start(self, step: int, tensors: dict[str, torch.Tensor], rows: int, info: dict) -> Path:
        """Begin the checkpoint of `step`; returns where it will be. Raises UserError as `state.save`, for the checkpoint
        before, too."""
        begun = time.monotonic()
        self.wait()
        if self.asynchronous:
            work = self._pool.submit(self._save, step, self._copied(tensors), rows, copy.deepcopy(info))
            self._pending = work, step, begun, time.monotonic() - begun
        else:
            path, end = self._save(step, tensors, rows, info)
            self._complete(step, path, end - begun, end - begun)
        return self.folder / f"step-{step:08d}"

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun that is not known to be complete; equal on all ranks."""
        return self._pending is not None

    def poll(self, device: torch.device) -> None:
        """Between steps: if the checkpoint that is being written is complete on all ranks, report it; raises UserError if
        it failed. While there is one: a collective, and on a GPU a wait."""
        if self._pending:
            done = torch.tensor(float(self._pending[0].done()), device=device)
            if distributed.all_reduce(done, "min").item():
                self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises UserError if that failed."""
        if self._pending:
            (work, step, begun, waited), self._pending = self._pending, None
            with flight.collective("end of a checkpoint"):
                path, end = work.result()
            self._complete(step, path, waited, end - begun)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except Exception as problem:
            if error is None:
                raise
            log.warning("%s", problem)  # beside the error that ends the run
        finally:
            self._pool.shutdown()

    def _save(self, step: int, tensors: dict[str, torch.Tensor], rows: int, info: dict) -> tuple[Path, float]:
        path = state.save(self.folder, step, tensors, rows, info, keep=self.keep, group=self.group)
        return path, time.monotonic()

    def _complete(self, step: int, path: Path, waited: float, seconds: float) -> None:
        self.written = step
        self.report(step, path, waited, seconds)

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are now, in host memory."""
        copies = {}
        for name, value in tensors.items():
            target = self._copies.get(name)
            if target is None or target.shape != value.shape or target.dtype != value.dtype:
                target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            copies[name] = target.copy_(value.detach(), non_blocking=True)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.current_stream().synchronize()
        self._copies = copies
        return copies
