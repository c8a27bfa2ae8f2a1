"""What a run with a prototype memory needs beside the step: copies of batch images that nobody can recognise, the data's
quality numbers, filling the memory, and the sampler that follows its content."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch
from omegaconf import DictConfig

from protomem import distributed
from protomem.data.memory_samplers import MixedSampler
from protomem.data.pipeline import eval_batches
from protomem.data.records import open_records
from protomem.data.unrecognizable import destroy, rows_here
from protomem.errors import UserError
from protomem.prototypes.memory import PrototypeMemory
from protomem.seeds import mix
from protomem.step import Extras

log = logging.getLogger(__name__)
MOST_IMAGES = 10_000  # of a set of unrecognizable ones, that are kept on the device (our default: 380 MB at 112 pixels)


class FillSampler:
    """The batches that fill a memory before training, as a sampler of one epoch."""

    def __init__(self, batches: list[np.ndarray], together: int):
        self.batches, self.together, self.batch_size = batches, together, len(batches[0])
        self.steps_per_epoch = len(batches)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        return self.batches[step]


class MemoryRun:
    """The parts of one rank. extras: where what makes the copies is put. rows: (first, last) of this rank's rows in the
    global batch."""

    def __init__(
        self,
        config: DictConfig,
        memory: PrototypeMemory,
        sampler,
        extras: Extras,
        records,
        rows: tuple[int, int],
        device: torch.device,
    ):
        self.config, self.memory, self.sampler, self.records, self.device = config, memory, sampler, records, device
        self.follows = isinstance(sampler, MixedSampler)
        q, self.extras = config.quality, extras
        self.column = self._column(q.column) if q.estimator == "external" else None
        self.step = 0
        if memory.quality.wants_copies:
            self.extras.total = q.unrecognizable.images
            self.extras.copies = self._copies_from_a_set() if q.unrecognizable.path else self._copies_of_the_batch(rows)
        if config.data.sampler.images_per_identity == 2 and distributed.rank() == 0:
            log.warning("data.sampler.images_per_identity=2: each prototype is half the image itself; 3 or more say more")

    # --- quality ---------------------------------------------------------------------------------------------------

    def _column(self, name: str) -> torch.Tensor:
        values = torch.from_numpy(np.asarray(self.records.column(name), np.float32))
        wrong = ~values.isfinite() | (values < 0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise UserError(
                f"quality.column={name}: record {first} has {values[first]:g}, but a quality is finite and not negative; shift or "
                "scale the numbers"
            )
        q = self.config.quality
        if q.usage == "soft" and float(np.quantile(values.numpy(), 0.9)) ** q.power <= q.minimum:
            raise UserError(
                f"quality.column={name}: nine tenths of the numbers weigh less than quality.minimum={q.minimum}, which makes "
                "them all equal; scale the numbers, or lower it"
            )
        return values

    def numbers(self, index: torch.Tensor) -> torch.Tensor | None:
        """The data's own quality number of each record position [b], on the device; None unless they are used."""
        return None if self.column is None else self.column[index].to(self.device, non_blocking=True)

    def _copies_of_the_batch(self, rows: tuple[int, int]):
        numbers, places = rows_here(self.extras.total, self.config.train.batch_size, *rows)
        seed = mix(self.config.train.seed, 4)

        def copies(images: torch.Tensor) -> torch.Tensor:
            chosen = torch.stack([images[row] for row in places]) if places else images[:0]
            return destroy(chosen, numbers, self.extras.total, seed, self.step)

        return copies

    def _copies_from_a_set(self):
        c, total = self.config, self.extras.total
        path = c.quality.unrecognizable.path
        distributed.main_first(lambda: open_records(path))
        records = open_records(path)
        encoded = [records.bytes(i) for i in range(min(len(records), MOST_IMAGES))]
        try:
            images = torch.cat(list(eval_batches(encoded, 128, c.data.loader, size=c.data.size))).to(self.device)
        except UserError as error:
            raise UserError(f"quality.unrecognizable.path={path}: {error}") from None
        first, last = distributed.batch_bounds(total, distributed.rank(), distributed.world_size())

        def copies(_: torch.Tensor) -> torch.Tensor:
            wanted = [(self.step * total + i) % len(images) for i in range(first, last)]
            return torch.stack([images[i] for i in wanted]) if wanted else images[:0]

        return copies

    # --- around a step ---------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self.step = step

    def after_step(self) -> None:
        """Call it after the optimizers."""
        if self.memory.look_alikes:
            _, nearest = self.memory.look_alike_labels()
            self.sampler.tell(self.step, _to_host(self.memory.labels, nearest))
        every = self.config.prototypes.memory.check_every
        if every and (self.step + 1) % every == 0:
            self.memory.check_replicas()

    def check(self) -> None:
        """Waits for the device; call it where that is done anyway. Raises UserError if a step had too many identities."""
        if self.memory.slots.overfull.item():
            raise UserError(
                f"by step {self.step + 1} a batch held more identities than prototypes.memory.size={self.memory.size}; enlarge it"
            )

    def fill(self, make_loader, enqueue) -> int:
        """prototypes.memory.fill=prefill: make prototypes of as many identities as there are slots, before the first step.
        No weight changes; BatchNorms do see the images.

        make_loader(sampler) -> loader; enqueue(batch, step). Returns the number of steps."""
        batches = FillSampler(self.sampler.prefill_batches(), self.sampler.together)
        loader = make_loader(batches)
        try:
            for step, batch in enumerate(loader.epoch(0)):
                self.step = -1 - step  # other copies than any step of training makes
                enqueue(batch, step)
        finally:
            loader.close()
        return batches.steps_per_epoch

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def sampler_state(self, step: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """(numbers, tensors) of a sampler that follows the memory, as of `step` steps done."""
        return self.sampler.state(step) if self.follows else ({}, {})

    def sampler_tensors(self) -> tuple[str, ...]:
        return ("look_alike", "pending") if self.memory.look_alikes else ()

    def restore_sampler(self, step: int, numbers: dict, tensors: dict[str, torch.Tensor]) -> None:
        if self.follows:
            self.sampler.restore(step, numbers, tensors, self.memory.slots.state_dict())

    def close(self) -> None:
        if self.follows:
            self.sampler.close()


def _to_host(*tensors: torch.Tensor):
    """A function that returns the tensors as numpy arrays; on a GPU they travel while the next step runs."""
    if not tensors[0].is_cuda:
        return functools.partial(lambda values: tuple(t.numpy() for t in values), [t.clone() for t in tensors])
    pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for target, source in zip(pinned, tensors):
        target.copy_(source, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def fetch():
        arrived.synchronize()
        return tuple(t.numpy() for t in pinned)

    return fetch
