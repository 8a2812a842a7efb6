"""Token recycling: what was likely is proposed again, by the longest sequence known, to the same tenant only."""

import torch

from local_engine.sampler import Sampler
from local_engine.spec.recycle import UNKNOWN, RecycleProposer, RecycleTable
from local_engine.types import SamplingParams
from tests.local_engine.spec.spec_harness import writing

SAMPLER = Sampler(SamplingParams(temperature=0), torch.device("cpu"))


def test_a_chain_is_proposed_again_from_its_first_tokens() -> None:
    proposer = RecycleProposer()
    tokens = [1, 2, 3, 4, 5, 6]
    sequence = writing(tokens, SAMPLER)
    for start in range(2, 6):
        proposer.observe(sequence, start, [], tokens[start : start + 1])
    other = writing([9, 1, 2], SAMPLER)
    assert proposer.propose([other], 3)[0].tokens == [3, 4, 5]
    assert proposer.propose([writing([77], SAMPLER)], 3)[0].grades == [UNKNOWN] * 3


def test_rows_behind_a_wrong_draft_teach_too() -> None:
    proposer = RecycleProposer()
    sequence = writing([1, 2], SAMPLER)
    proposer.observe(sequence, 2, drafted=[50, 51], predictions=[3, 60, 61])
    assert proposer.propose([writing([1, 2], SAMPLER)], 1)[0].tokens == [3]
    assert proposer.propose([writing([1, 2, 50], SAMPLER)], 1)[0].tokens == [60]
    assert proposer.propose([writing([1, 2, 50, 51], SAMPLER)], 1)[0].tokens == [61]


def test_the_longest_known_context_decides() -> None:
    table = RecycleTable()
    for _ in range(3):
        table.learn(0, [1, 2, 3], 10)
    table.learn(0, [7, 8, 9, 3], 20)
    token, grade = table.favourite(0, [7, 8, 9, 3]) or (-1, -1)
    assert token == 20
    shorter = table.favourite(0, [5, 5, 5, 3])
    assert shorter is not None
    assert shorter[0] == 10
    assert grade < shorter[1]


def test_a_confirmed_favourite_outlives_one_surprise_but_not_two_more() -> None:
    table = RecycleTable()
    for token in (10, 10, 10):
        table.learn(0, [1], token)
    table.learn(0, [1], 20)
    assert (table.favourite(0, [1]) or (-1,))[0] == 10
    for _ in range(2):
        table.learn(0, [1], 20)
    assert (table.favourite(0, [1]) or (-1,))[0] == 20


def test_one_tenant_does_not_learn_from_another() -> None:
    proposer = RecycleProposer()
    proposer.observe(writing([1, 2], SAMPLER, salt=b"one"), 2, [], [3])
    assert proposer.propose([writing([1, 2], SAMPLER, salt=b"two")], 1)[0].grades == [UNKNOWN]
    assert proposer.propose([writing([1, 2], SAMPLER, salt=b"one")], 1)[0].tokens == [3]


def test_the_table_takes_less_than_two_megabytes_and_never_more() -> None:
    table = RecycleTable()
    before = table.bytes_used
    assert before < 2e6
    for token in range(40_000):
        table.learn(0, [token, token + 1], token)
    assert table.bytes_used == before
