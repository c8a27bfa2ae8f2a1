"""From encoded bytes to a uint8 batch with threads and simplejpeg, and the check that comes before any native decoder.

simplejpeg (libjpeg-turbo) releases the interpreter lock, so threads scale. Pixels equal those of DALI's CPU decoder.
"""

from __future__ import annotations

import collections
from concurrent.futures import ThreadPoolExecutor
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch

from protomem.data.augment import apply, resample, windows
from protomem.data.images import decode, image_size


class CorruptImage(Exception):
    """The decoder refused rows of the batch that was due: {row: reason}."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons


class Rows(NamedTuple):
    """The rows of one batch on their way to a decoder: encoded images that `examine` has passed, what to do to them.

    sizes: (height, width) of each encoded image; params: what `augment.draw` returned.
    """

    encoded: list[bytes]
    sizes: list[tuple[int, int]]
    params: dict[str, np.ndarray]


def examine(data: bytes) -> tuple[int, int]:
    """(height, width) of an image that may be handed to a native decoder; ValueError with the reason for any other.

    DALI's decoder can end the whole process when libjpeg cannot read a JPEG's header, so two checks come before it: the
    structure of the file (images.py), and libjpeg-turbo's own reading of the header, a few microseconds each. Damage
    that passes both makes DALI raise an error, which the loader turns into a corrupt row, or only spoils pixels.
    """
    size = image_size(data)
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        simplejpeg.decode_jpeg_header(data)
    return size


def decode_tolerant(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Where libjpeg only warns of damage this goes on, as DALI does, so that both loaders refuse
    the same images (`protomem data verify` is stricter). Raises ValueError with a reason."""
    if data[:2] != b"\xff\xd8":
        return decode(data)
    import simplejpeg

    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)


class ThreadDecoder:
    """Decodes and augments batches in `threads` threads, up to `prefetch` batches ahead of the consumer."""

    def __init__(self, size: int, threads: int, prefetch: int, device: torch.device):
        self._size, self._ahead, self._pin = size, max(prefetch, 1), device.type == "cuda"
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="protomem-decode")

    def run(self, batches: Iterable[Rows]) -> Iterator[torch.Tensor]:
        """uint8 [b, size, size, 3] per batch, in order; CorruptImage when the batch that is due cannot be decoded."""
        pending = collections.deque()
        try:
            for rows in batches:
                pending.append(self._pool.submit(self._decode, rows))
                if len(pending) > self._ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _decode(self, rows: Rows) -> torch.Tensor:
        out = torch.empty(len(rows.encoded), self._size, self._size, 3, dtype=torch.uint8, pin_memory=self._pin)
        images, reasons = out.numpy(), {}
        window, resampled = windows(np.array(rows.sizes), rows.params.get("crop"), self._size)
        for row, data in enumerate(rows.encoded):
            try:
                image = decode_tolerant(data)
            except ValueError as error:
                reasons[row] = str(error)
                continue
            images[row] = resample(image, window[row], self._size) if resampled[row] else image
        if reasons:
            raise CorruptImage(reasons)
        apply(images, rows.params)
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
