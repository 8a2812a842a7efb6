"""Greedy answers of a model with what it thought of each token: what accept rules are fitted on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from local_engine.arithmetic import Problem
from local_engine.chat import prompt_tokens
from local_engine.lane import Lane
from local_engine.model import LocalModel
from local_engine.primitives import Primitives
from local_engine.reason.accept import AnswerWatch
from local_engine.runner import Runner, new_kv
from local_engine.sampler import Sampler
from local_engine.types import AnswerFeature, SamplingParams

BATCH: Final = 32
MOST_TOKENS: Final = 400


@dataclass(slots=True)
class Attempt:
    right: bool = False
    tokens: int = 0
    so_far: list[dict[AnswerFeature, float]] = field(default_factory=list)
    """Features after each token."""

    @property
    def features(self) -> dict[AnswerFeature, float]:
        return self.so_far[-1]


def attempts(model: LocalModel, asked: Sequence[Problem]) -> list[Attempt]:
    with torch.inference_mode():
        return [found for at in range(0, len(asked), BATCH) for found in _together(model, asked[at : at + BATCH])]


def _together(model: LocalModel, asked: Sequence[Problem]) -> list[Attempt]:
    kv = new_kv(model, 1 << 29)
    lane = Lane(model, kv, Runner(model, kv), max_running=BATCH)
    engine = Primitives({"m": lane}, None, serials=itertools.count(), arrived=0.0)
    found, watches = [Attempt() for _ in asked], [AnswerWatch() for _ in asked]
    said: list[list[int]] = [[] for _ in asked]
    which = {}
    for at, problem in enumerate(asked):
        prompt = prompt_tokens(model.tokenizer, [{"role": "user", "content": problem.question}])
        sampler = Sampler(SamplingParams(temperature=0), model.device, measure=True)
        which[engine.open("m", prompt, sampler, limit=len(prompt) + MOST_TOKENS)] = at
    while lane.scheduler.busy:
        for turn in lane.step():
            at = which[turn.sequence]
            for choice in turn.choices:
                said[at].append(choice.token)
                watches[at].push(choice.logprob, choice.entropy)
                found[at].so_far.append(watches[at].features())
            if turn.choices and turn.choices[-1].token in model.end_tokens:
                engine.close(turn.sequence)
    engine.close_all()
    for attempt, tokens, problem in zip(found, said, asked, strict=True):
        text = model.tokenizer.decode(tokens, skip_special_tokens=False)
        attempt.tokens = len(tokens)
        attempt.right = text.rpartition("</think>")[2].strip() == f"The answer is {problem.answer}.<|im_end|>"
    return found
