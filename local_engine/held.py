"""Prompts that were read for a probe and wait, for a while, for the request that writes on from them.

A held prompt keeps its slot, and the logits after its last token: who goes on with it computes none of it again. The
prefix store, which has its whole blocks as well, serves everybody else.
"""

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from local_engine.sequence import common_prefix

if TYPE_CHECKING:
    from torch import Tensor

MOST_HELD: Final = 64
OTHER_TAIL: Final = 8
"""At most so many last tokens may differ, as the start of the answer does with the effort: a text that shares less is
another conversation."""


@dataclass(slots=True, eq=False)
class Held:
    """A prompt that is read."""

    ids: "array[int]"
    salt: bytes
    slot: int
    logits: "Tensor"
    """[vocabulary], after the last token."""
    until: float


class HeldPrompts:
    """Oldest first. Who takes one out owns its slot."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        self.found = 0
        """How often somebody went on with one."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def next_end(self) -> float:
        """When the first of them has waited long enough; infinity where there is none."""
        return min((held.until for held in self._held), default=float("inf"))

    def add(self, held: Held) -> None:
        self._held.append(held)

    def find(self, salt: bytes, ids: "array[int]") -> tuple[Held, int] | None:
        """The one whose text `ids` goes on with, and how many tokens they share; None where there is none."""
        best: tuple[Held, int] | None = None
        for held in self._held:
            if held.salt == salt:
                shared = common_prefix(held.ids, ids)
                if shared > max(0, len(held.ids) - OTHER_TAIL) and (best is None or shared >= best[1]):
                    best = held, shared
        return best

    def take(self, held: Held) -> None:
        self._held.remove(held)
        self.found += 1

    def oldest(self) -> Held | None:
        """Taken out, as is what `ended` gives."""
        return self._held.pop(0) if self._held else None

    def ended(self, now: float) -> list[Held]:
        gone = [held for held in self._held if held.until <= now]
        self._held = [held for held in self._held if held.until > now]
        return gone
