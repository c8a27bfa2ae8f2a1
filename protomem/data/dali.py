"""The same batches through NVIDIA DALI: decoding and augmentation in its C++ threads, on the CPU or on a GPU.

The order is ours: DALI is fed encoded images and per-row parameters and draws nothing itself, so it has no state worth
a checkpoint. Changes that touch few rows run conditionally, on those rows only: on the CPU an idle resize or colour
change costs more than the decoding.
"""

from __future__ import annotations

import collections
import re
from typing import Iterable, Iterator

import numpy as np
import torch

from protomem.data.augment import GREY, windows
from protomem.data.decode import CorruptImage, Rows, decode_tolerant
from protomem.errors import UserError


def available() -> bool:
    """Whether DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


class DaliDecoder:
    """Decodes and augments batches of up to `rows` images, `prefetch` batches ahead of the consumer.

    changes: the keys of `Rows.params` that will come; the operators of others are not built.
    device: a cuda device decodes there (nvJPEG) and leaves the batch there. Raises UserError where DALI is missing.
    """

    def __init__(self, rows: int, size: int, changes: Iterable[str], device: torch.device, threads: int, prefetch: int):
        if not available():
            raise UserError(
                "DALI is not installed: `pip install protomem[cuda13]` (or [cuda12]), or set data.loader=torch"
            )
        self._rows, self._size, self._changes, self._device = rows, size, sorted(set(changes) - {"crop"}), device
        self._threads, self._prefetch = threads, max(prefetch, 1)
        self._pipeline = None
        self._batches: Iterator[Rows] = iter(())

    def run(self, batches: Iterable[Rows]) -> Iterator[torch.Tensor]:
        """uint8 [b, size, size, 3] per batch, in order; CorruptImage when the batch that is due cannot be decoded."""
        self._batches, self._pending = iter(batches), collections.deque()
        if self._pipeline is None:
            self._pipeline = self._build()
        finished = False
        try:
            while True:
                try:
                    images = self._next_images()
                except StopIteration:
                    break
                self._pending.popleft()
                yield images
            self._pipeline.reset()
            finished = True
        finally:
            if not finished:  # left early or broken: batches are still in its queue, so a new one is built next time
                self.close()

    def _next_images(self) -> torch.Tensor:
        # On a GPU the outputs are bound to torch's current stream; the copy ends their life on that stream at once.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            out = torch.from_dlpack(self._pipeline.run(stream)[0].as_tensor())
        except RuntimeError as error:
            raise CorruptImage(_refused(str(error), self._pending[0].encoded)) from error
        return out.clone() if stream is not None else out

    def _feed(self):
        """DALI asks for the next batch, ahead of the consumer; StopIteration is how it learns of the end."""
        rows = next(self._batches)
        self._pending.append(rows)
        window, resampled = windows(np.array(rows.sizes), rows.params.get("crop"), self._size)
        return (
            [np.frombuffer(data, np.uint8) for data in rows.encoded],
            np.ascontiguousarray(window[:, 1::-1]),  # y, x
            np.ascontiguousarray(window[:, :1:-1]),  # height, width
            resampled,
            *(_FEEDS[change][0](rows.params[change]) for change in self._changes),
        )

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types

        feeds = [_FEEDS[change] for change in self._changes]
        dtypes = [types.UINT8, types.INT32, types.INT32, types.BOOL, *(getattr(types, feed[1]) for feed in feeds)]
        ndims = [1, 1, 1, 0, *(feed[2] for feed in feeds)]
        on_gpu, size, changes = self._device.type == "cuda", self._size, self._changes

        @pipeline_def(enable_conditionals=True)
        def graph():
            fed = fn.external_source(source=self._feed, num_outputs=len(ndims), batch=True, dtype=dtypes, ndim=ndims)
            encoded, corner, extent, resampled = fed[:4]
            given = dict(zip(changes, fed[4:]))
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # as libjpeg and Pillow leave it
                jpeg_fancy_upsampling=True,  # on the GPU: the CPU's smooth chroma
            )
            if resampled:
                images = fn.slice(images, start=corner, shape=extent, axis_names="HW")
                images = fn.resize(images, size=[size, size])
            if "flip" in changes:
                images = fn.flip(images, horizontal=given["flip"], vertical=0)
            if "low" in changes:
                if given["low"] < size:
                    low = fn.cast(fn.stack(given["low"], given["low"]), dtype=types.FLOAT)
                    images = fn.resize(fn.resize(images, size=low), size=[size, size])
            if "colour" in changes:
                colour = given["colour"]
                if fn.reductions.max(fn.cast(colour != 1.0, dtype=types.INT32)) > 0:
                    images = fn.color_twist(images, brightness=colour[0], contrast=colour[1], saturation=colour[2])
            if "occlusion" in changes:
                corner, extent = given["occlusion"][:2], given["occlusion"][2:]
                images = fn.erase(images, anchor=corner, shape=extent, axis_names="WH", fill_value=GREY)
            return images

        pipeline = graph(
            batch_size=self._rows,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._prefetch,
        )
        pipeline.build()
        return pipeline

    def close(self) -> None:
        self._pipeline = None


# change -> how its parameters are handed over, DALI's name of the type, dimensions per row
_FEEDS = {
    "flip": (lambda flip: flip.astype(np.int32), "INT32", 0),
    "low": (lambda low: low, "INT32", 0),
    "colour": (lambda colour: colour, "FLOAT", 1),
    "occlusion": (lambda box: box.astype(np.float32), "FLOAT", 1),
}


def _refused(message: str, encoded: list[bytes]) -> dict[int, str]:
    """The rows that made DALI fail: those its message names, and all others that libjpeg cannot decode either."""
    reasons = {int(row): "DALI cannot decode it" for row in re.findall(r"Failed to decode sample #(\d+)", message)}
    for row, data in enumerate(encoded):
        try:
            decode_tolerant(data)
        except ValueError as error:
            reasons[row] = str(error)
    if not reasons:  # something else than an image is wrong
        raise RuntimeError(message)
    return reasons
