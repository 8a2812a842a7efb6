"""Prompt lookup: finds the longest earlier occurrence, as a search through everything does, within its bounds."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from local_engine.sampler import Sampler
from local_engine.spec.ngram import NGramProposer, SuffixIndex
from local_engine.types import SamplingParams
from tests.local_engine.spec.spec_harness import writing

SAMPLER = Sampler(SamplingParams(temperature=0), torch.device("cpu"))


def longest_earlier_match(tokens: list[int]) -> int:
    """How many of the last tokens occurred before, in the same order, at one place; by looking everywhere."""
    lengths = [0]
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[-1 - length]:
            length += 1
        lengths.append(length)
    return max(lengths)


@given(st.lists(st.integers(0, 3), max_size=60))
def test_the_match_is_real_and_nearly_the_longest(tokens: list[int]) -> None:
    index = SuffixIndex()
    index.extend(tokens)
    proposed, length = index.following(1)
    longest = longest_earlier_match(tokens)
    if not proposed:
        assert longest < 2
        return
    assert 2 <= length <= longest
    suffix = tokens[-length:]
    places = [at for at in range(len(tokens) - length) if tokens[at : at + length] == suffix]
    assert proposed[0] in {tokens[at + length] for at in places}


def test_the_longer_match_wins_over_the_later_one() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3])
    assert index.following(2) == ([9, 5], 3)


def test_a_repetition_is_proposed_without_end() -> None:
    index = SuffixIndex()
    index.extend([8, 1, 2, 1, 2])
    assert index.following(5) == ([1, 2, 1, 2, 1], 2)


def test_a_copied_text_is_followed_to_its_end() -> None:
    rng = random.Random(5)
    text = [rng.randrange(1000) for _ in range(200)]
    index = SuffixIndex()
    index.extend(text)
    for at, token in enumerate(text):
        if at >= 2:
            assert index.following(3)[0][0] == token
        index.extend([token])


def test_the_index_stays_within_its_cap_and_still_finds_what_is_near() -> None:
    rng = random.Random(6)
    index = SuffixIndex(most_tokens=100)
    for _ in range(50):
        index.extend([rng.randrange(40) for _ in range(17)])
        assert index.held <= 100
    index.extend([77, 78, 79, 80, 77, 78])
    assert index.following(2)[0] == [79, 80]
    assert len(index) == 50 * 17 + 6


def test_proposals_follow_the_sequence_and_end_with_it() -> None:
    sequence = writing([4, 5, 6, 7], SAMPLER)
    proposer = NGramProposer()
    assert proposer.propose([sequence], 4)[0].tokens == []
    sequence.ids.extend([4, 5])
    draft = proposer.propose([sequence], 3)[0]
    assert draft.tokens == [6, 7, 4]
    assert draft.cut(1).tokens == [6]
    del sequence.ids[3:]
    proposer.forget(sequence)
    assert proposer.propose([sequence], 4)[0].tokens == []
