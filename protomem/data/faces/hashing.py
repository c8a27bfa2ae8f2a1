"""Randomness as a pure function of integers: no library's random stream is used, so a seed means the same for ever.

A stream is a uint64 key; its values are the splitmix64 sequence that starts at the key (Steele, Lea, Flood 2014).
All arithmetic is on 64-bit integers, or on float64 in a way that is exact, so every machine gets the same numbers.
"""

from __future__ import annotations

import zlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent of its input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts) -> np.ndarray:
    """One uint64 key [n] from integers and integer arrays [n] (negative ones wrap); a str part names a stream."""
    h = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, str):
            part = zlib.crc32(part.encode())
        part = np.atleast_1d(np.asarray(part)).astype(np.int64).astype(np.uint64)
        h = mix(h * np.uint64(3) + mix(part + _STEP))
    return h


def bits(keys: np.ndarray, count: int) -> np.ndarray:
    """uint64 [n, count]: the first `count` values of each key's stream."""
    return mix(keys[:, None] + _STEP * np.arange(1, count + 1, dtype=np.uint64))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count] in [0, 1)."""
    return (bits(keys, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count], mean 0, deviation 1: the sum of four 16-bit uniforms: exact, never beyond 3.47."""
    b = bits(keys, count)
    total = sum(((b >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.float64) for s in (0, 16, 32, 48))
    return (total - 2.0 * 65535) * (1.0 / 37837.22772)


def snap(x: np.ndarray, grid: float = 2.0**-16) -> np.ndarray:
    """Round to multiples of `grid`: what cos or a power differ by between two maths libraries disappears here."""
    return np.round(np.asarray(x, np.float64) * (1 / grid)) * grid
