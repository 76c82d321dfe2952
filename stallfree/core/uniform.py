"""A random number that depends on a seed and a position alone. It keeps no state, so it may be asked in any order, and again."""

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that depends only on the arguments (SplitMix64, Steele et al. 2014, over both)."""
    return (_mix(_mix(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
