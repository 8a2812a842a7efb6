"""Greedy answers of a model with what it thought of each token: what accept rules are fitted on."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch

from local_engine.chat import prompt_tokens
from local_engine.lane import Lane
from local_engine.model import LocalModel
from local_engine.plan_types import AnswerFeature
from local_engine.primitives import Primitives
from local_engine.reason.accept import AnswerWatch
from local_engine.reason.trajectories import Question, is_right
from local_engine.runner import Runner, new_kv
from local_engine.sampler import Sampler
from local_engine.types import SamplingParams, TapSpec

BATCH: Final = 32
MOST_TOKENS: Final = 400
AFTER_THOUGHT: Final = "</think>"
END: Final = "<|im_end|>"


class Attempt(msgspec.Struct):
    right: bool = False
    tokens: int = 0
    so_far: list[dict[AnswerFeature, float]] = []
    """Features after each token."""
    doubt: list[float] = []
    """Hidden states after all layers at the least probable token; none where it is the last one of all."""

    @property
    def features(self) -> dict[AnswerFeature, float]:
        return self.so_far[-1]


def attempts(model: LocalModel, asked: Sequence[Question], path: Path) -> list[Attempt]:
    """Kept at `path`, and read from there where they are."""
    if not path.exists():
        with torch.inference_mode():
            parts = [_together(model, asked[at : at + BATCH]) for at in range(0, len(asked), BATCH)]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.msgpack.encode([found for part in parts for found in part]))
        unfinished.rename(path)
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Attempt])


def layers_of(model: LocalModel) -> tuple[int, ...]:
    return tuple(range(1, model.network.config.num_hidden_layers + 1))


def _together(model: LocalModel, asked: Sequence[Question]) -> list[Attempt]:
    kv = new_kv(model, 1 << 29)
    lane = Lane(model, kv, Runner(model, kv), max_running=BATCH)
    engine = Primitives({"m": lane}, None, serials=itertools.count(), arrived=0.0)
    found, watches = [Attempt() for _ in asked], [AnswerWatch() for _ in asked]
    said: list[list[int]] = [[] for _ in asked]
    which = {}
    for at, question in enumerate(asked):
        prompt = prompt_tokens(model.tokenizer, [{"role": "user", "content": question.text}])
        sampler = Sampler(SamplingParams(temperature=0), model.device, measure=True)
        taps = TapSpec(layers_of(model), "generated")
        sequence = engine.open("m", prompt, sampler, limit=len(prompt) + MOST_TOKENS, taps=taps)
        which[sequence] = at, len(prompt)
    while lane.scheduler.busy:
        for turn in lane.step():
            at, start = which[turn.sequence]
            if turn.hidden is not None:
                for position, states in zip(turn.hidden.positions, turn.hidden.states, strict=True):
                    if watches[at].in_doubt_at(position - start):
                        watches[at].doubt = states.flatten().tolist()
            for choice in turn.choices:
                said[at].append(choice.token)
                watches[at].push(choice.logprob, choice.entropy)
                found[at].so_far.append(watches[at].features())
            if turn.choices and turn.choices[-1].token in model.end_tokens:
                engine.close(turn.sequence)
    engine.close_all()
    for attempt, tokens, question, watch in zip(found, said, asked, watches, strict=True):
        text = model.tokenizer.decode(tokens, skip_special_tokens=False)
        attempt.tokens, attempt.doubt = len(tokens), list(watch.doubt)
        answer = text.rpartition(AFTER_THOUGHT)[2]
        attempt.right = answer.endswith(END) and is_right(answer.removesuffix(END), question.answer)
    return found
