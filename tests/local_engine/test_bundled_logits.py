"""The bundled models' logits on what they are for, against transformers' and against exact ones."""

import copy

import pytest
import torch
from torch import Tensor

from local_engine.arithmetic import LEVELS, problems
from local_engine.chat import prompt_tokens
from local_engine.model import load_model
from local_engine.runner import Runner, Segment, new_kv

WRITTEN = 100
"""Tokens after a question: the most probable ones, which are a model's working and answer, and what it adds to them."""


@pytest.mark.parametrize("name", ["base", "draft", "nano"])
@torch.no_grad()
def test_logits_are_as_near_to_transformers_as_the_largest_one_allows_and_no_farther_from_exact_ones(name: str) -> None:
    model = load_model(name, f"bundled/{name}", "float32", "cpu")
    theirs = copy.deepcopy(model.network)
    exact = copy.deepcopy(model.network).double()
    kv = new_kv(model, 64 << 20)
    runner = Runner(model, kv)
    ours_off = theirs_off = 0.0
    for level in LEVELS:
        (problem,) = problems(seed=3, level=level, n=1)
        tokens = prompt_tokens(model.tokenizer, [{"role": "user", "content": problem.question}])
        read = len(tokens)
        slot = kv.open(read + WRITTEN)
        rows = [runner.run([Segment(slot, 0, tokens, logits=read)]).logits]
        while len(tokens) < read + WRITTEN:
            tokens.append(int(rows[-1][-1].argmax()))
            rows.append(runner.run([Segment(slot, len(tokens) - 1, tokens[-1:], logits=1)]).logits)
        kv.close(slot)
        ours = torch.cat(rows)
        expected, true = (network(torch.tensor([tokens])).logits[0] for network in (theirs, exact))
        assert apart(ours, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))
        ours_off, theirs_off = max(ours_off, apart(ours, true)), max(theirs_off, apart(expected, true))
    assert ours_off <= 1.5 * theirs_off


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
