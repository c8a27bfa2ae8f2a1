"""Augmentation: which change each row of a batch gets, and the plain implementation of these changes.

`draw` is a pure function of (seed, epoch, position in the epoch), hashed per row: an image gets the same augmentation
at any world size, with any number of threads and in either loader. `resample` and `apply` are what the torch loader
runs; dali.py does the same with DALI's operators. Order: crop and resize, flip, low resolution, photometric, occlusion.

Legend: b rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from protomem.seeds import uniform
from protomem.errors import UserError

GREY = 127  # fill of an occlusion: the level that is nearest to 0 once normalised
CONTRAST_CENTRE = 128.0  # grey level that a change of contrast keeps, as in DALI's color_twist
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_WHOLE = np.array([0.0, 0.0, 1.0, 1.0])  # the crop that is none
_STREAMS = {"flip": 16, "crop": 24, "low_resolution": 32, "photometric": 40, "occlusion": 48}  # the sampler has 0-15


@dataclass(frozen=True)
class AugmentOptions:
    """Probability of each change per image (0 leaves it out altogether), and how strong it can be. All in [0, 1].

    flip              mirrored left to right
    crop              a window, resized to the full size: sides `crop_min`..1 of the image's, aspect 3/4..4/3
    low_resolution    shrunk to `low_resolution_min`..1 of its size and enlarged again
    photometric       brightness, contrast and saturation, each times 1 - strength .. 1 + strength
    occlusion         one grey rectangle, sides up to `occlusion_max` of the image's
    All values are our defaults.
    """

    flip: float = 0.5
    crop: float = 0.0
    low_resolution: float = 0.0
    photometric: float = 0.0
    occlusion: float = 0.0
    crop_min: float = 0.7
    low_resolution_min: float = 0.2
    photometric_strength: float = 0.4
    occlusion_max: float = 0.5

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise UserError(f"data.augment.{field.name}={value} is not between 0 and 1")


def draw(options: AugmentOptions, seed: int, epoch: int, positions: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Parameters of the rows at `positions` (int64 [b], place of each row in the epoch: step * B + row of the batch).

    Only changes of non-zero probability appear, one array each:
    flip       bool [b]
    crop       float64 [b, 4]: x, y, width, height as fractions of the image in the file; (0, 0, 1, 1) where off
    low        int32 [b]: the side in pixels to shrink to, `size` where off
    colour     float32 [b, 3]: factors of brightness, contrast and saturation, 1 where off
    occlusion  int32 [b, 4]: x, y, width, height in pixels of the output; width and height 0 where off
    """

    def u(change: str, number: int) -> np.ndarray:  # streams of their own, so that no change moves another's numbers
        return uniform(seed, _STREAMS[change] + number, epoch, positions)

    def on(change: str) -> np.ndarray:
        return u(change, 0) < getattr(options, change)

    params = {}
    if options.flip:
        params["flip"] = on("flip")
    if options.crop:
        side = options.crop_min + (1 - options.crop_min) * u("crop", 1)
        stretch = (4 / 3) ** (u("crop", 2) - 0.5)  # the square root of the aspect
        extent = np.minimum(np.stack([side * stretch, side / stretch], axis=1), 1)
        corner = np.stack([u("crop", 3), u("crop", 4)], axis=1) * (1 - extent)
        window = np.concatenate([corner, extent], axis=1)
        params["crop"] = np.where(on("crop")[:, None], window, _WHOLE)
    if options.low_resolution:
        scale = options.low_resolution_min + (1 - options.low_resolution_min) * u("low_resolution", 1)
        low = np.maximum(np.rint(scale * size), 1)
        params["low"] = np.where(on("low_resolution"), low, size).astype(np.int32)
    if options.photometric:
        shifts = np.stack([2 * u("photometric", number) - 1 for number in (1, 2, 3)], axis=1)
        factors = 1 + options.photometric_strength * shifts
        params["colour"] = np.where(on("photometric")[:, None], factors, 1).astype(np.float32)
    if options.occlusion:
        extent = np.stack([u("occlusion", 1), u("occlusion", 2)], axis=1)
        extent = np.ceil(extent * options.occlusion_max * size) * on("occlusion")[:, None]
        corner = np.floor(np.stack([u("occlusion", 3), u("occlusion", 4)], axis=1) * (size - extent + 1))
        params["occlusion"] = np.concatenate([corner, extent], axis=1).astype(np.int32)
    return params


def windows(sizes: np.ndarray, crop: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What to cut from each source image, and whether it has to be resampled at all.

    sizes: int [b, 2], height and width of the images in the files; crop: `draw`'s fractions, or None.
    Returns int32 [b, 4] (x, y, width, height in source pixels, at least 1 x 1) and bool [b].
    """
    extent = np.asarray(sizes)[:, ::-1]  # width, height
    if crop is None:
        crop = np.broadcast_to(_WHOLE, (len(extent), 4))
    start = np.minimum(np.floor(crop[:, :2] * extent), extent - 1)
    stop = np.clip(np.rint((crop[:, :2] + crop[:, 2:]) * extent), start + 1, extent)
    window = np.concatenate([start, stop - start], axis=1).astype(np.int32)
    return window, (window != np.array([0, 0, size, size])).any(axis=1) | (extent != size).any(axis=1)


def resample(image: np.ndarray, window, size: int) -> np.ndarray:
    """Cut (x, y, width, height) from uint8 [H, W, 3] and resize it to [size, size, 3]: linear, with antialiasing."""
    x, y, width, height = (int(v) for v in window)
    return _resize(image[y : y + height, x : x + width], size)


def apply(images: np.ndarray, params: dict[str, np.ndarray]) -> None:
    """All changes but the crop, in place, on uint8 [b, size, size, 3]; `params` as `draw` returns them."""
    size = images.shape[1]
    if "flip" in params:
        rows = np.flatnonzero(params["flip"])
        source = images[rows]
        mirrored = np.empty_like(source)
        for channel in range(3):  # numpy mirrors one channel at a time five times faster than pixels of three bytes
            mirrored[..., channel] = source[:, :, ::-1, channel]
        images[rows] = mirrored
    for row in np.flatnonzero(params["low"] != size) if "low" in params else ():
        images[row] = _resize(_resize(images[row], int(params["low"][row])), size)
    for row in np.flatnonzero((params["colour"] != 1).any(axis=1)) if "colour" in params else ():
        images[row] = _recolour(images[row], *params["colour"][row])
    for row in np.flatnonzero(params["occlusion"][:, 2]) if "occlusion" in params else ():
        x, y, width, height = params["occlusion"][row]
        images[row, y : y + height, x : x + width] = GREY


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _recolour(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """brightness * (centre + contrast * (x - centre)) of x mixed with its own luma; rounded and clipped to 0..255."""
    mix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * LUMA[:, None]
    out = image.reshape(-1, 3).astype(np.float32) @ (brightness * contrast * mix)
    out += brightness * CONTRAST_CENTRE * (1 - contrast)
    return np.clip(np.rint(out, out=out), 0, 255, out=out).astype(np.uint8).reshape(image.shape)
