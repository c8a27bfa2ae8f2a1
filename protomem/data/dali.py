"""The same batches through NVIDIA DALI: decoding and augmentation in its C++ threads, on the CPU or on a GPU.

The order is ours: DALI is fed encoded images and per-row parameters and draws nothing itself, so it has no state worth
a checkpoint. Changes that touch few rows run conditionally, on those rows only: on the CPU an idle resize or colour
change costs more than the decoding. Each operator costs bookkeeping per row, so the graph computes no parameter that
numpy can hand over ready made.
"""

from __future__ import annotations

import collections
import re
from typing import Iterable, Iterator

import numpy as np
import torch

from protomem.data.augment import CONTRAST_CENTRE, GREY, windows
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
        self._rows, self._size, self._changes, self._device = rows, size, sorted(changes), device
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
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        rows = next(self._batches)
        self._pending.append(rows)
        window, resampled = windows(np.array(rows.sizes), rows.params.get("crop"), self._size)
        encoded = TensorListCPU([TensorCPU(data) for data in rows.encoded], contiguous=False)  # half the cost of arrays
        fed = [encoded, resampled]
        for change in self._changes:
            fed += _FEEDS[change][0](window if change == "crop" else rows.params[change], self._size)
        return fed

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types

        inputs = ["UINT8 1", "BOOL 0"]
        given = {}  # change -> which of the outputs of the source are its own
        for change in self._changes:
            given[change] = slice(len(inputs), len(inputs) + len(_FEEDS[change][1]))
            inputs += _FEEDS[change][1]
        dtypes = [getattr(types, name.split()[0]) for name in inputs]
        ndims = [int(name.split()[1]) for name in inputs]
        on_gpu, size = self._device.type == "cuda", self._size

        @pipeline_def(enable_conditionals=True)
        def graph():
            fed = fn.external_source(source=self._feed, num_outputs=len(ndims), batch=True, dtype=dtypes, ndim=ndims)
            encoded, resampled = fed[:2]
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # as libjpeg and Pillow leave it
                jpeg_fancy_upsampling=True,  # on the GPU: the CPU's smooth chroma
            )
            if resampled:
                if "crop" in given:  # fn.resize's own window is hardly cheaper, and pixels beyond it bleed into its edge
                    corner, extent = fed[given["crop"]]
                    images = fn.slice(images, start=corner, shape=extent, axis_names="HW")
                images = fn.resize(images, size=[size, size])
            if "flip" in given:
                images = fn.flip(images, horizontal=fed[given["flip"]][0], vertical=0)
            if "low" in given:
                shrunk, low = fed[given["low"]]
                if shrunk:
                    images = fn.resize(fn.resize(images, size=low), size=[size, size])
            if "colour" in given:
                recoloured, of_image, of_grey, shift = fed[given["colour"]]
                if recoloured:  # fn.color_twist rounds floats, which costs four times as much on the CPU
                    grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
                    grey = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
                    images = fn.brightness_contrast(images, brightness=of_image, dtype=types.INT16)
                    images += fn.brightness_contrast(grey, brightness=of_grey, brightness_shift=shift, dtype=types.INT16)
                    images = fn.cast(images, dtype=types.UINT8)
            if "occlusion" in given:
                corner, extent = fed[given["occlusion"]]
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


def _crop(window: np.ndarray, size: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(window[:, 1::-1]), np.ascontiguousarray(window[:, :1:-1])]  # y, x; height, width


def _flip(flip: np.ndarray, size: int) -> list[np.ndarray]:
    return [flip.astype(np.int32)]


def _low(low: np.ndarray, size: int) -> list[np.ndarray]:
    return [low < size, np.stack([low, low], axis=1).astype(np.float32)]


def _colour(colour: np.ndarray, size: int) -> list[np.ndarray]:
    """Which rows change, and the change as factor * image + factor * its luma + shift (see augment.py), the shift in parts
    of the largest int16."""
    brightness, contrast, saturation = colour.T
    gain = brightness * contrast
    shift = brightness * (1 - contrast) * np.float32(CONTRAST_CENTRE / 32767)
    return [(colour != 1).any(axis=1), gain * saturation, gain * (1 - saturation), shift]


def _occlusion(box: np.ndarray, size: int) -> list[np.ndarray]:
    corner, extent = np.split(box.astype(np.float32), 2, axis=1)
    return [np.ascontiguousarray(corner), np.ascontiguousarray(extent)]


# change -> its parameters (the windows of a crop) as the graph takes them, and DALI's type and the dimensions per row of each
_FEEDS = {
    "crop": (_crop, ["INT32 1", "INT32 1"]),
    "flip": (_flip, ["INT32 0"]),
    "low": (_low, ["BOOL 0", "FLOAT 1"]),
    "colour": (_colour, ["BOOL 0", "FLOAT 0", "FLOAT 0", "FLOAT 0"]),
    "occlusion": (_occlusion, ["FLOAT 1", "FLOAT 1"]),
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
