"""Chance that can be repeated: the draws of one decision, all of them from its one seed."""

_MASK = (1 << 64) - 1


def draw(seed: int, purpose: int) -> float:
    """Uniform in [0, 1) over seeds, and independent between purposes: two rounds of SplitMix64 (Steele et al., 2014).

    Any integer is a seed; only its lowest 64 bits count.
    """
    return (_mixed(_mixed(seed & _MASK) + purpose) >> 11) / (1 << 53)


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


EXPLORE, EXPLORED_ARM, SHADOW = 1, 2, 3
"""Purposes; each draw has one of its own."""
UNEXPLORED = 7254
"""For who asks what a policy holds for best: its draw, 0.9999, explores for no smaller share."""
