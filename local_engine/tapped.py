"""Hidden states that a step tapped, in one piece of memory, so that a tap costs the step no tensor of its own.

A runner uses that memory again: what comes from the system anew has to be cleared and mapped, page by page.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor


class Tapped(Mapping[int, Tensor]):
    """Layer -> [tapped tokens, width], in segment order."""

    __slots__ = ("layers", "states")

    def __init__(self, layers: Sequence[int], states: Tensor) -> None:
        """`states` [layers, tapped tokens, width], contiguous."""
        self.layers = layers
        self.states = states

    @classmethod
    def room(cls, layers: Sequence[int], rows: int, like: Tensor) -> "Tapped":
        """For `rows` tokens, `like` [..., width]. A layer that is named twice is held once."""
        named = list(dict.fromkeys(layers))
        return cls(named, torch.empty(len(named), rows, like.shape[-1], dtype=like.dtype, device=like.device))

    def fits(self, layers: Sequence[int], rows: int) -> bool:
        """Whether it is room for just these."""
        return self.layers == list(dict.fromkeys(layers)) and self.states.shape[1] == rows

    def addresses(self) -> Iterator[tuple[int, int]]:
        """Each layer, and where its states begin."""
        first, size = self.states.data_ptr(), self.states.stride(0) * self.states.itemsize
        return ((layer, first + at * size) for at, layer in enumerate(self.layers))

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.layers:
            raise KeyError(layer)
        return self.states[self.layers.index(layer)]

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


NOTHING: Final = Tapped((), torch.empty(0, 0, 0))
