"""Whatever is stored, matched, held, pinned and evicted in whatever order, the store keeps to its rules."""

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from local_engine.prefix_match import Match
from tests.local_engine.prefix_harness import BLOCK, Row, commit, kv_of, new_store

SALTS = st.sampled_from([b"a", b"b"])
TOKENS = st.lists(st.sampled_from([0, 1]), max_size=4 * BLOCK + 1).map(lambda coarse: [t for t in coarse for _ in "xx"])


class PrefixRules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = new_store(blocks=9)
        self.open: list[tuple[Match, bytes, Sequence[int]]] = []

    @rule(salt=SALTS, tokens=TOKENS, taps=st.booleans())
    def commit(self, salt: bytes, tokens: list[int], taps: bool) -> None:
        commit(self.store, salt, tokens, taps=taps)

    @rule(salt=SALTS, tokens=TOKENS, taps=st.booleans())
    def lookup(self, salt: bytes, tokens: list[int], taps: bool) -> None:
        match = self.store.lookup(salt, tokens, taps=taps)
        assert match.tokens % BLOCK == 0
        assert match.tokens <= max(0, len(tokens) - 1)
        self.open.append((match, salt, tokens))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        match, salt, tokens = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        row = Row()
        match.load(row, 0)
        assert torch.equal(row.data, kv_of(salt, tokens[: match.tokens]))
        match.close()

    @rule(salt=SALTS, tokens=TOKENS)
    def pin(self, salt: bytes, tokens: list[int]) -> None:
        assert self.store.pin(salt, tokens) <= len(tokens)

    @rule(salt=SALTS, tokens=TOKENS)
    def unpin(self, salt: bytes, tokens: list[int]) -> None:
        self.store.unpin(salt, tokens)

    @rule(salt=SALTS, tokens=TOKENS)
    def evict(self, salt: bytes, tokens: list[int]) -> None:
        self.store.evict(salt, tokens)

    @invariant()
    def books_are_right(self) -> None:
        assert self.store.problems() == []


TestPrefixRules = PrefixRules.TestCase
TestPrefixRules.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
