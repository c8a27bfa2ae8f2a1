"""One integer hash for every seed, so that streams are functions of what they are for, on every machine and version."""

MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers to a seed in [0, 2^63) with splitmix64's finaliser (Steele, Lea & Flood 2014), one round a value."""
    state = 0
    for value in values:
        state = (state + (value & MASK) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state >> 1
