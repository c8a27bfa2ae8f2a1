"""Generated pictures that carry an identity: for tests and benchmarks at 10**5 to 10**7 identities, nothing stored.

A person is a 7 x 7 grid of random colours, drawn as a smooth field; a picture of it is shifted, has its own
brightness and contrast, and noise. All of it is a hash of (seed, identity, image) and exact arithmetic.

These are so easy that comparing pixels tells people apart (99.9 % of pairs). Hard pictures are for training (pixels 90 %,
an untrained small encoder 65 %, the same after 50,000 images of 2,000 people 93 %): shifted by up to a cell instead of half
of one, with contrast down to 3/8, twice the noise, and mixed with 12 to 56 % of a coarse field of the picture's own, like
coloured light, which an encoder must learn to ignore.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property, lru_cache

import numpy as np

from protomem.data.faces.hashing import bits, key
from protomem.data.faces.long_tail import images_per_person
from protomem.errors import UserError

_GRID = 7  # colour cells each way
_LIGHT_GRID = 3  # cells of a hard picture's own field
_SHIFTS = 16  # positions of the picture, 1/32 of a cell apart; it shows what they leave: 5.5 x 5.5 of the 6 x 6 between
_HARD_SHIFTS = 32  # the centres of the cells, and 5 x 5 with these
_WEIGHT = 64  # interpolation weights are integers that sum to this
_MIX = 16  # so are the weights of the person and of the picture's own field
_NOISE = 1 << 16


class PatternRecords:
    """`images_per_identity` pictures of each of `num_identities` patterns, uint8 size x size RGB, sorted by identity.

    tail: long-tailed numbers of images, at least 2, with images_per_identity as their mean (see images_per_person).
    first: label k is pattern number first + k, so that another range of numbers is other people. hard: see above.
    The reader interface of protomem.data.records, plus `array(i)`, the picture without JPEG encoding. Opened by the
    path "patterns:identities=100000,images=4,tail=1,seed=1,size=112,first=0,hard=1" (tail, seed, first and hard 0 and
    size 112 unless given). Memory: nothing per identity or image, but 8 bytes per identity with a tail, 8 per image once
    `labels` is used. Raises UserError for impossible numbers."""

    def __init__(
        self,
        num_identities: int,
        images_per_identity: int,
        seed: int = 0,
        size: int = 112,
        tail: bool = False,
        first: int = 0,
        hard: bool = False,
    ):
        if num_identities * images_per_identity >= 2**53:
            raise UserError(f"patterns of {num_identities} identities with {images_per_identity} images are too many: below 2**53")
        if num_identities < 1 or images_per_identity < 1 or not 16 <= size <= 1024:
            raise UserError(
                f"patterns need identities >= 1, images >= 1 and 16 <= size <= 1024, not {num_identities}, "
                f"{images_per_identity} and {size}"
            )
        if tail and images_per_identity < 2:
            raise UserError("patterns with tail=1 need images >= 2: it is the mean, and everybody has two at least")
        if not 0 <= first < 2**62:
            raise UserError(f"patterns need 0 <= first < 2**62, not {first}")
        self.num_classes, self.images_per_identity = num_identities, images_per_identity
        self.seed, self.size, self.tail, self.first, self.hard = seed, size, tail, first, hard
        self.path = f"patterns:identities={num_identities},images={images_per_identity},seed={seed},size={size}"
        self.path += ",tail=1" * tail + (f",first={first}" if first else "") + ",hard=1" * hard
        self.fingerprint = hashlib.sha256(f"v1 {self.path}".encode()).hexdigest()[:16]
        self.damaged = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.tail else self.num_classes * self.images_per_identity

    def label(self, i: int) -> int:
        return self._locate(i)[0]

    def changed(self) -> str:
        """A data file that was changed since the set was opened: there are none."""
        return ""

    def where(self, i: int) -> str:
        """The place of position i, for messages."""
        return f"picture {i} of {self.path}"

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]; made at the first use."""
        if self.tail:
            return np.repeat(np.arange(self.num_classes), np.diff(self._starts))
        return np.arange(len(self), dtype=np.int64) // self.images_per_identity

    @cached_property
    def _starts(self) -> np.ndarray:
        """int64 [num_classes + 1], with a tail: the first position of each identity, and the end."""
        counts = images_per_person(self.num_classes, self.images_per_identity, True, self.seed)
        return np.concatenate([[0], np.cumsum(counts)])

    def column(self, name: str) -> np.ndarray:
        raise UserError(
            f"{self.path} has no column '{name}': patterns carry labels only; use data with train.{name}.npy beside it "
            "(`protomem data synth` makes such)"
        )

    def bytes(self, i: int) -> bytes:  # noqa: A003
        """JPEG, quality 92."""
        from protomem.data.images import encode_jpeg

        return encode_jpeg(self.array(i), 92)

    def array(self, i: int) -> np.ndarray:
        """uint8 [size, size, 3] RGB."""
        label, image = self._locate(i)
        identity = self.first + label
        colours = bits(key(self.seed, "pattern", identity), 19)[0].view(np.uint8)[: _GRID * _GRID * 3]
        own = bits(key(self.seed, "pattern image", identity, image), 4)[0]
        field = _smooth(colours, self.size, _HARD_SHIFTS if self.hard else _SHIFTS, own[0], own[1])
        contrast, offset = int(own[2]), int(own[2] >> np.uint64(32))
        # contrast of 256 and offset in levels: with the noise at most 254 in all
        if self.hard:
            light = bits(key(self.seed, "pattern light", identity, image), 6)[0]
            cells = light[:4].view(np.uint8)[: _LIGHT_GRID * _LIGHT_GRID * 3]
            share = 2 + int(light[4]) % 8  # 2..9 of 16
            field *= np.float32(_MIX - share)
            field += _smooth(cells, self.size, _SHIFTS, light[5], light[5] >> np.uint64(32)) * np.float32(share)
            contrast, offset, unit, loudness = 96 + contrast % 80, offset % 20, _MIX, 2
        else:
            contrast, offset, unit, loudness = 128 + contrast % 48, offset % 50, 1, 1
        field *= np.float32(contrast / (256 * _WEIGHT**2 * unit))
        start = int(own[3] % np.uint64(_NOISE))
        noise = _noise()[start : start + field.size].reshape(field.shape)
        field += noise * np.float32(loudness)
        field += np.float32(offset)
        return field.astype(np.uint8)

    def _locate(self, i: int) -> tuple[int, int]:
        """Label of position i, and which of its pictures that is."""
        i = self._check(i)
        if not self.tail:
            return divmod(i, self.images_per_identity)
        label = int(np.searchsorted(self._starts, i, "right")) - 1
        return label, i - int(self._starts[label])

    def _check(self, i: int) -> int:
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return i

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("labels", "_starts")}


def write_pattern_pairs(path: str | os.PathLike, records: PatternRecords, pairs: int, seed: int = 0) -> int:
    """Write `pairs` pairs of pictures of `records` as a .bin in ten folds as LFW has them: a fold is pairs / 20 genuine
    pairs, then as many impostor pairs, and no identity is in two folds. Who and which pictures: a hash of `seed`.

    Returns the number of genuine pairs. Raises UserError for a number of pairs that does not fill the folds, for too few
    identities, and where an identity has a single picture."""
    from protomem.data.faces.pairs import plan_pairs
    from protomem.data.pairs import write_bin

    if pairs < 20 or pairs % 20 or records.num_classes < 20 or records.images_per_identity < 2:
        raise UserError(
            f"pairs need a number that is a multiple of 20, identities >= 20 and images >= 2, not {pairs} pairs of "
            f"{records.path}"
        )
    people, same = plan_pairs("clean", pairs, records.num_classes, 0, seed, 0.0)
    starts = records._starts if records.tail else np.arange(records.num_classes + 1) * records.images_per_identity
    counts = np.diff(starts)[people]
    drawn = (bits(key(seed, "pattern pair", np.arange(pairs)), 2) >> np.uint64(1)).astype(np.int64)
    number = drawn % counts
    other = (number[:, 0] + 1 + drawn[:, 1] % (counts[:, 1] - 1)) % counts[:, 1]  # genuine: another picture
    number[:, 1] = np.where(same, other, number[:, 1])
    write_bin(path, [records.bytes(i) for i in (starts[people] + number).ravel()], same.tolist())
    return int(same.sum())


def _smooth(colours: np.ndarray, size: int, shifts: int, down, across) -> np.ndarray:
    """float32 [size, size, 3]: _WEIGHT**2 times the smooth field of uint8 colours [grid * grid * 3], shifted.

    Products of integers below 2**24: exact in float32, whatever order the matrix product sums them in."""
    grid = round((len(colours) / 3) ** 0.5)
    table = _interpolation(size, grid, shifts)
    columns = np.matmul(table[int(across) % shifts], colours.reshape(grid, grid * 3).astype(np.float32))
    columns = columns.reshape(size, grid, 3).transpose(1, 0, 2).reshape(grid, -1)
    return np.matmul(table[int(down) % shifts], columns).reshape(size, size, 3)


@lru_cache(maxsize=8)
def _interpolation(size: int, grid: int, shifts: int) -> np.ndarray:
    """float32 [shifts, size, grid]: integer weights of the colour cells at each row (or column) for each shift."""
    at = np.arange(size) * ((grid - 1 - shifts / 32) / (size - 1))
    at = at[None, :] + (np.arange(shifts) / 32)[:, None]
    low = np.floor(at).astype(int)
    t = at - low
    high = np.round(_WEIGHT * t * t * (3 - 2 * t))
    out = np.zeros((*at.shape, grid), np.float32)
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
