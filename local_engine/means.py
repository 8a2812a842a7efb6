"""The mean of a prompt's hidden states, for probes that hear all of it.

Tokens that a stored prefix brings are not computed, so blocks carry the sums of their own tokens' states: what is
matched is added from there, the rest as it is computed.
"""

from collections.abc import Sequence as Sized

import torch
from torch import Tensor

from local_engine.prefix_match import Match


class Means:
    """Sums of the first `tokens` tokens, block by block, in float32."""

    def __init__(self, layers: Sized[int], width: int, tokens: int, block_tokens: int) -> None:
        self.layers = tuple(layers)
        self._tokens = tokens
        self._block_tokens = block_tokens
        self._sums = torch.zeros(-(-tokens // block_tokens), len(self.layers), width)
        self._summed = 0

    def restart(self, match: Match | None) -> None:
        """The sequence has nothing but what this match brings."""
        self._sums.zero_()
        self._summed = 0
        for at, block in enumerate(match.blocks if match is not None else ()):
            assert block.taps is not None, "it is looked up with them"
            self._sums[at] = block.taps
            self._summed += self._block_tokens

    def add(self, rows: Tensor) -> None:
        """The next tokens' states, [tokens, layers, width]."""
        blocks = torch.arange(self._summed, self._summed + len(rows)) // self._block_tokens
        self._sums.index_add_(0, blocks, rows.to("cpu", torch.float32))
        self._summed += len(rows)

    def blocks(self, start: int, stop: int) -> Tensor:
        """The sums of these whole blocks, as a prefix store takes them."""
        assert stop * self._block_tokens <= self._summed, "only what is computed is stored"
        return self._sums[start:stop]

    def mean(self, layers: Sized[int]) -> Tensor:
        """[layers, width] over all tokens."""
        assert self._summed == self._tokens, "the prompt is read"
        return self._sums[:, [self.layers.index(layer) for layer in layers]].sum(0) / self._tokens
