"""The steps from one line of the log to the next: what is counted, the line at their end, and what is looked at with it."""

from __future__ import annotations

import time
from typing import Iterable, Iterator

import torch

from protomem import checkpointing, distributed, straggler


def begin(run, now: float | None = None) -> None:
    """Count anew: images and skipped images of all steps, seconds that the loop waited for batches, since when, which step."""
    since = time.monotonic() if now is None else now
    run.interval = {"images": 0, "skipped": 0, "wait": 0.0, "since": since, "from": run.step}


def timed(run, batches: Iterable) -> Iterator:
    """Yields the batches; measures how long the loop waits for each."""
    batches = iter(batches)
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        run.interval["wait"] += time.monotonic() - start
        if batch is None:
            return
        yield batch


def report(run, stats: dict) -> None:
    """The line of this step, with `stats` (0-d tensors). Raises UserError if the loss was not finite in the interval.
    Collective."""
    now, i = time.monotonic(), run.interval
    seconds = max(now - i["since"], 1e-9)
    values = {**stats, "epoch": run.step / run.epoch_steps, "images_per_s": i["images"] / seconds}
    # The others wait in a collective for the rank that waits for its data.
    own = torch.tensor([[i["wait"] / seconds, i["skipped"]]], dtype=torch.float64, device=run.device)
    wait, skipped = distributed.gather_rows(own, [1] * run.context.world_size).unbind(1)
    values["data_wait"] = wait.max()
    if skipped.sum() > 0:
        values["skipped_images"] = int(skipped.sum())
    run.log.step(run.step, values)
    checkpointing.check_finite(run)
    if run.memory:
        run.memory.check()
    _find_straggler(run)
    begin(run, now)


def _find_straggler(run) -> None:
    factor, i, own = run.config.distributed.straggler, run.interval, run.stopwatch.read()
    if factor and run.context.world_size > 1:
        found = straggler.find(i["wait"] + own, run.step - i["from"], factor, run.device)
        if found:
            run.log.event("straggler", step=run.step, **found)
