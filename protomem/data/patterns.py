"""Generated pictures that carry an identity: for tests and benchmarks at 10**5 to 10**7 identities, nothing stored.

A person is a 7 x 7 grid of random colours, drawn as a smooth field; a picture of it is shifted, has its own
brightness and contrast, and noise. All of it is a hash of (seed, identity, image) and exact arithmetic.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache

import numpy as np

from protomem.data.faces.hashing import bits, key
from protomem.errors import UserError

_GRID = 7  # colour cells each way; the picture shows 5.5 x 5.5 of the 6 x 6 between their centres
_SHIFTS = 16  # positions of the picture, 1/32 of a cell apart
_WEIGHT = 64  # interpolation weights are integers that sum to this
_NOISE = 1 << 16


class PatternRecords:
    """`images_per_identity` pictures of each of `num_identities` patterns, uint8 size x size RGB, sorted by identity.

    The reader interface of protomem.data.records, plus `array(i)`, the picture without JPEG encoding. Opened by the
    path "patterns:identities=100000,images=4,seed=1,size=112" (seed 0 and size 112 unless given)."""

    def __init__(self, num_identities: int, images_per_identity: int, seed: int = 0, size: int = 112):
        if num_identities < 1 or images_per_identity < 1 or not 16 <= size <= 1024:
            raise UserError(
                f"patterns need identities >= 1, images >= 1 and 16 <= size <= 1024, not {num_identities}, "
                f"{images_per_identity} and {size}"
            )
        self.num_classes, self.images_per_identity, self.seed, self.size = (
            num_identities,
            images_per_identity,
            seed,
            size,
        )
        self.path = f"patterns:identities={num_identities},images={images_per_identity},seed={seed},size={size}"
        self.fingerprint = hashlib.sha256(f"v1 {self.path}".encode()).hexdigest()[:16]
        self.damaged = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.num_classes * self.images_per_identity

    def label(self, i: int) -> int:
        return self._check(i) // self.images_per_identity

    def where(self, i: int) -> str:
        """The place of position i, for messages."""
        return f"picture {i} of {self.path}"

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]; made at the first use."""
        return np.arange(len(self), dtype=np.int64) // self.images_per_identity

    def column(self, name: str) -> np.ndarray:
        raise UserError(f"{self.path} has no column '{name}': generated patterns carry labels only")

    def bytes(self, i: int) -> bytes:  # noqa: A003
        """JPEG, quality 92."""
        from protomem.data.images import encode_jpeg

        return encode_jpeg(self.array(i), 92)

    def array(self, i: int) -> np.ndarray:
        """uint8 [size, size, 3] RGB."""
        identity, image = divmod(self._check(i), self.images_per_identity)
        colours = bits(key(self.seed, "pattern", identity), 19)[0].view(np.uint8)[: _GRID * _GRID * 3]
        own = bits(key(self.seed, "pattern image", identity, image), 4)[0]
        table = _interpolation(self.size)
        down, across = table[int(own[0]) % _SHIFTS], table[int(own[1]) % _SHIFTS]
        # products of integers below 2**24: exact in float32, whatever order the matrix product sums them in
        columns = np.matmul(across, colours.reshape(_GRID, _GRID * 3).astype(np.float32))
        columns = columns.reshape(self.size, _GRID, 3).transpose(1, 0, 2).reshape(_GRID, -1)
        field = np.matmul(down, columns).reshape(self.size, self.size, 3)  # _WEIGHT**2 times the colour
        contrast, offset = (
            128 + int(own[2]) % 48,
            int(own[2] >> np.uint64(32)) % 50,
        )  # of 256; levels: at most 254 in all
        field *= np.float32(contrast / (256 * _WEIGHT**2))
        start = int(own[3] % np.uint64(_NOISE))
        noise = _noise()[start : start + field.size].reshape(field.shape)
        field += noise
        field += np.float32(offset)
        return field.astype(np.uint8)

    def _check(self, i: int) -> int:
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return i

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "labels"}


@lru_cache(maxsize=4)
def _interpolation(size: int) -> np.ndarray:
    """float32 [_SHIFTS, size, _GRID]: integer weights of the colour cells at each row (or column) for each shift."""
    at = np.arange(size) * ((_GRID - 1.5) / (size - 1))
    at = at[None, :] + (np.arange(_SHIFTS) * (0.5 / _SHIFTS))[:, None]
    low = np.floor(at).astype(int)
    t = at - low
    high = np.round(_WEIGHT * t * t * (3 - 2 * t))
    out = np.zeros((*at.shape, _GRID), np.float32)
    shift, place = np.indices(at.shape)
    out[shift, place, low] += _WEIGHT - high
    out[shift, place, low + 1] += high
    return out


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """float32, one sequence for all: a picture takes its noise (0..31, mean 16) from its own place in it."""
    count = _NOISE + 3 * 1024 * 1024
    b = bits(key(0, "pattern noise"), count // 8 + 1)[0].view(np.uint8)[:count]
    return ((b >> 4) + (b & 15)).astype(np.float32)
