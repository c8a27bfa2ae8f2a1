"""The input pipeline: sampler -> records -> decoder (DALI, or threads with simplejpeg) -> uint8 batches in fixed order.

One loader serves both decoders: it reads ahead in a thread, keeps what must not be decoded away from them, and yields
the rows of its rank. Which record stands where, and how it is augmented, is decided by (seed, epoch, step) alone, so
there is nothing to save but the step.

Legend: B global batch, b local batch (rows of this rank).
"""

from __future__ import annotations

import collections
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Iterable, Iterator

import numpy as np
import torch

from protomem.data import dali
from protomem.data.augment import AugmentOptions, draw
from protomem.data.decode import CorruptImage, Rows, ThreadDecoder, examine
from protomem.distributed import batch_bounds
from protomem.errors import UserError

log = logging.getLogger(__name__)
_MAX_CORRUPT_RUN = 1000  # so many corrupt records in a row are no accident: the file is not what it should be


@dataclass
class Batch:
    """This rank's rows of one global batch.

    images: uint8 [b, size, size, 3], RGB, on the CPU or on the GPU that decoded them; labels: int64 [b], CPU;
    index: int64 [b], CPU, positions of the records; skipped: rows whose own record is corrupt and was replaced.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    epoch: int
    step: int
    skipped: int


def normalise(images: torch.Tensor, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    """uint8 [b, H, W, 3] -> `dtype` [b, 3, H, W] in [-1, 1]: (x - 127.5) / 127.5, computed in at least float32.

    channels_last: the memory format of the result.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    work = torch.promote_types(dtype, torch.float32)
    x = images.permute(0, 3, 1, 2).to(work, memory_format=memory)
    return x.sub_(127.5).div_(127.5).to(dtype)


def make_loader(
    records,
    sampler,
    *,
    backend: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    augment: AugmentOptions = AugmentOptions(),
    seed: int = 0,
    size: int = 112,
    device: torch.device = torch.device("cpu"),
    threads: int = 2,
    prefetch: int = 2,
    on_corrupt: str = "error",
    bad_positions: Iterable[int] = (),
) -> Loader:
    """The loader of one rank.

    records, sampler: see records.py and sampler.py; backend: `dali`, `torch`, or `auto` (DALI where it can be
    imported); threads: of the decoder, one more reads; prefetch: batches decoded ahead; on_corrupt: `error`, or `skip`
    to replace a corrupt image by the next sound record, cyclic; bad_positions: records known to be corrupt.
    Raises UserError for DALI where it is missing; the loader raises it for corrupt images and labels out of range.
    """
    if on_corrupt not in ("error", "skip"):
        raise UserError(f"data.on_corrupt={on_corrupt} is not one of error, skip")
    start, stop = batch_bounds(sampler.batch_size, rank, world_size, sampler.together)
    changes = draw(augment, seed, 0, np.zeros(1, np.int64), size).keys()
    decoder = _decoder(backend, stop - start, size, changes, device, threads, prefetch)
    return Loader(records, sampler, decoder, start, stop, augment, seed, size, prefetch, on_corrupt, bad_positions)


def read_ahead(prefetch: int) -> int:
    """How many steps beyond the one being trained a loader may have drawn, at most: `prefetch` by the reader, as many
    again by the decoder (twice that in DALI's two stages), and what is in the hands of each."""
    return 3 * max(prefetch, 1) + 3


def _decoder(backend, rows, size, changes, device, threads, prefetch):
    if backend not in ("auto", "dali", "torch"):
        raise UserError(f"data.loader={backend} is not one of auto, dali, torch")
    if backend == "auto":
        backend = "dali" if dali.available() else "torch"
        log.info("data.loader=auto: decoding with %s", backend)
    if backend == "dali":
        return dali.DaliDecoder(rows, size, changes, device, threads, prefetch)
    return ThreadDecoder(size, threads, prefetch, device)


class Loader:
    """Batches of one rank; make it with `make_loader`. One epoch at a time; `close` ends its threads."""

    def __init__(
        self, records, sampler, decoder, start, stop, augment, seed, size, prefetch, on_corrupt, bad_positions
    ):
        self._records, self._sampler, self._decoder = records, sampler, decoder
        self._start, self._stop, self._augment, self._seed, self._size = start, stop, augment, seed, size
        self._prefetch, self._skip = max(prefetch, 1), on_corrupt == "skip"
        self._bad = dict.fromkeys((int(i) for i in bad_positions), "known from an earlier check")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="protomem-read")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `start_step` to the sampler's steps_per_epoch. May be left at any point."""
        step = start_step
        while step < self._sampler.steps_per_epoch:
            read, ahead = collections.deque(), self._read_ahead(epoch, step)
            images = _decode(self._decoder, _keep(ahead, read)) if self._stop > self._start else self._none(ahead, read)
            try:
                for decoded in images:
                    _, index, labels, skipped = read.popleft()
                    yield Batch(decoded, torch.from_numpy(labels), torch.from_numpy(index), epoch, step, skipped)
                    step += 1
            except CorruptImage as refused:  # then this batch is read again, without the records just found
                index = read[0][1]
                for row, reason in refused.reasons.items():
                    self._corrupt(int(index[row]), reason)
            finally:
                images.close()
                ahead.close()

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def _none(self, ahead, read) -> Iterator[torch.Tensor]:
        for item in ahead:
            read.append(item)
            yield torch.empty(0, self._size, self._size, 3, dtype=torch.uint8)

    def _read_ahead(self, epoch: int, step: int):
        """What `_read` returns for each step, read in a thread while earlier batches are decoded and used."""
        pending = collections.deque()
        try:
            while pending or step < self._sampler.steps_per_epoch:
                while len(pending) <= self._prefetch and step < self._sampler.steps_per_epoch:
                    pending.append(self._reader.submit(self._read, epoch, step))
                    step += 1
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _read(self, epoch: int, step: int) -> tuple[Rows, np.ndarray, np.ndarray, int]:
        """This rank's rows of a global batch: (encoded rows, record positions [b], labels [b], rows replaced)."""
        wanted = self._sampler.batch(epoch, step)[self._start : self._stop]
        index, encoded, sizes = wanted.copy(), [], []
        for row, position in enumerate(wanted):
            index[row], data, size = self._read_sound(int(position))
            encoded.append(data)
            sizes.append(size)
        labels = np.asarray(self._records.labels[index], np.int64).reshape(len(index))
        wrong = np.flatnonzero((labels < 0) | (labels >= self._records.num_classes))
        if wrong.size:
            first = int(index[wrong[0]])
            raise UserError(
                f"record {first} ({self._records.where(first)}): label {labels[wrong[0]]} is outside 0.."
                f"{self._records.num_classes - 1}; `protomem data verify {self._records.path}` lists all such records"
            )
        places = step * self._sampler.batch_size + np.arange(self._start, self._stop)
        params = draw(self._augment, self._seed, epoch, places, self._size)
        return Rows(encoded, sizes, params), index, labels, int((index != wanted).sum())

    def _read_sound(self, position: int) -> tuple[int, bytes, tuple[int, int]]:
        """The first record from `position` on (cyclic) that may be decoded: (its position, bytes, (height, width)). Where a
        batch is made of identities, one of the same identity if there is any beside it.

        A function of the position and the data alone, so every rank, loader and world size replaces alike.
        """
        for offset, at in enumerate(itertools.islice(self._candidates(position), min(_MAX_CORRUPT_RUN, len(self._records)))):
            reason = self._bad.get(at)
            if reason is None:
                try:
                    data = self._records.bytes(at)
                    return at, data, examine(data)
                except (ValueError, UserError) as error:
                    reason = str(error)
            self._corrupt(at, reason)
        raise UserError(
            f"all {offset + 1} records from {position} ({self._records.where(position)}) on are corrupt: "
            f"{reason}; `protomem data verify {self._records.path}` tells how many are left"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        yield position
        count, labels = len(self._records), self._records.labels
        if self._sampler.together > 1:
            for direction in (1, -1):
                at = position + direction
                while 0 <= at < count and labels[at] == labels[position]:
                    yield at
                    at += direction
        for offset in range(1, count):
            yield (position + offset) % count

    def _corrupt(self, position: int, reason: str) -> None:
        if changed := self._records.changed():
            raise UserError(
                f"{changed} was changed while it was in use (record {position}: {reason}); put back what was there, and start "
                "again: the run goes on from its last checkpoint"
            )
        if not self._skip:
            raise UserError(
                f"record {position} ({self._records.where(position)}) is corrupt: {reason}; `protomem data verify "
                f"{self._records.path}` lists all such records, data.on_corrupt=skip goes on without them"
            )
        self._bad[position] = reason


def _keep(ahead, read) -> Iterator[Rows]:
    for item in ahead:
        read.append(item)
        yield item[0]


def _decode(decoder, batches: Iterable[Rows]) -> Iterator[torch.Tensor]:
    """decoder.run(batches), but an error of `batches`, which runs ahead, waits until the batches before it are out."""
    failed = []

    def until_failure():
        try:
            yield from batches
        except Exception as error:
            failed.append(error)

    yield from decoder.run(until_failure())
    if failed:
        raise failed[0]


def eval_batches(
    encoded: list[bytes],
    batch_size: int,
    backend: str = "auto",
    device: torch.device = torch.device("cpu"),
    size: int = 112,
    flip: bool = False,
    threads: int = 2,
) -> Iterator[torch.Tensor]:
    """uint8 [n, size, size, 3] of the images in order, n = batch_size but for the last; flip: all of them mirrored.

    Raises UserError that names the position of the first image that cannot be decoded.
    """
    augment, prefetch = AugmentOptions(flip=float(flip)), 2
    changes = draw(augment, 0, 0, np.zeros(1, np.int64), size).keys()

    def batches() -> Iterator[Rows]:
        for start in range(0, len(encoded), batch_size):
            part, sizes = encoded[start : start + batch_size], []
            for offset, data in enumerate(part):
                try:
                    sizes.append(examine(data))
                except ValueError as error:
                    raise UserError(f"image {start + offset} of {len(encoded)} is corrupt ({error})") from None
            yield Rows(part, sizes, draw(augment, 0, 0, np.arange(start, start + len(part)), size))

    decoder, done = _decoder(backend, batch_size, size, changes, device, threads, prefetch), 0
    try:
        for images in _decode(decoder, batches()):
            yield images
            done += len(images)
    except CorruptImage as refused:
        row = min(refused.reasons)
        raise UserError(f"image {done + row} of {len(encoded)} is corrupt ({refused.reasons[row]})") from None
    finally:
        decoder.close()
