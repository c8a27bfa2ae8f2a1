"""One integer hash for every seed, so that streams are functions of what they are for, on every machine and version."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash64(*values) -> np.ndarray:
    """Mix integers (scalars or arrays, broadcast together; their order counts) into uint64; negative ones mod 2**64."""
    state = np.zeros(1, np.uint64)  # arrays, not scalars: numpy warns about scalars that wrap around
    for value in values:
        state = (state ^ np.asarray(value).astype(np.uint64)) + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MULTIPLIERS[0]
        state = (state ^ (state >> np.uint64(27))) * _MULTIPLIERS[1]
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(*values) -> np.ndarray:
    """Float64 in [0, 1) from the same integers as `hash64`, in steps of 2**-53."""
    return (hash64(*values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(*values: int) -> int:
    """One seed in [0, 2**63) from integers."""
    return int(hash64(*values)[0] >> np.uint64(1))
