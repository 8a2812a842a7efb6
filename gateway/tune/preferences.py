"""What a person may prefer, and what each preference gives up. Light: the command line loads it."""

from collections.abc import Mapping
from typing import Final, Literal

Preference = Literal["quality", "balanced", "economy"]
ALLOWED_LOSS: Final[Mapping[Preference, float]] = {"quality": 0.0, "balanced": 0.01, "economy": 0.05}
"""Accuracy that may be given up for a cheaper plan, of the best one's."""
