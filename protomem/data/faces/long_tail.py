"""How many images each person has: the same number for all, or few people with many and many with few."""

from __future__ import annotations

import numpy as np

from protomem.data.faces.hashing import bits, key


def images_per_person(identities: int, mean: int, long_tail: bool, seed: int) -> np.ndarray:
    """int64 [identities]. Long tail: proportional to rank ** -0.7, at least 2, at most 20 times the mean, scaled to the
    mean; half of the people then have half of the mean or less (as far as 2 allows). Ranks are dealt to the identities at
    random. Ten million identities take about four seconds, and 0.4 GB while it works. The form is our own."""
    if not long_tail:
        return np.full(identities, mean, np.int64)
    falling = np.arange(1, identities + 1, dtype=np.float64) ** -0.7
    least, most = 2, 20 * mean
    levels = np.arange(least + 1, most + 1)

    def at_least(first: float) -> np.ndarray:
        """How many of the ranks have floor(first * falling) >= each level; falling falls, so a binary search finds it."""
        low, high = np.zeros_like(levels), np.full_like(levels, identities)
        while (low < high).any():
            middle = (low + high) // 2
            enough = (low < high) & (first * falling[np.minimum(middle, identities - 1)] >= levels)
            low, high = np.where(enough, middle + 1, low), np.where(enough | (low >= high), high, middle)
        return low

    low, high = 0.0, 20.0 * mean * identities
    for _ in range(60):
        middle = 0.5 * (low + high)
        total = least * identities + int(at_least(middle).sum())
        low, high = (middle, high) if total < mean * identities else (low, middle)
    ends = at_least(high)  # the first ends[0] ranks have more than 2, the first ends[1] of these more than 3, ...
    counts = np.repeat(np.arange(most, least - 1, -1), np.diff(np.append(ends[::-1], identities), prepend=0))
    dealt = np.empty(identities, np.int64)
    dealt[bits(key(seed, "long tail"), identities)[0].argsort(kind="stable")] = counts
    return dealt
