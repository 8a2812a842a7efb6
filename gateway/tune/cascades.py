"""When a smaller model's answer is good enough, fitted on questions of their own: what a cascade is measured with."""

import queue
from collections.abc import Sequence

import msgspec
import numpy as np

from local_engine.engine import Engine
from local_engine.reason.accept import AnswerWatch
from local_engine.reason.trajectories import AskingFailed, Question, ask, is_right
from local_engine.types import Delta, Event, Failed, Finished, Generate, SamplingParams, ThoughtSoFar
from probes.accept import FEATURES, fit_accept
from probes.accept_rule import FittedAccept
from probes.calibrate import Array


def fitted_cascade(
    engine: Engine, base: str, draft: str, questions: Sequence[Question], sampling: SamplingParams
) -> FittedAccept:
    """The rule for `draft`'s answers before `base`: those it accepts shall be right as often as base is.

    Raises TableError where too few of them are right or wrong, or no threshold does it.
    """
    alone = [
        end.finish_reason == "stop" and is_right(said, question.answer)
        for question, said, end in ask(engine, base, questions, sampling)
    ]
    rows, right = _drafted(engine, draft, questions, sampling)
    return fit_accept(rows, right, right_at_least=float(np.mean(alone)))


def _drafted(
    engine: Engine, draft: str, questions: Sequence[Question], sampling: SamplingParams
) -> tuple[Array, Array]:
    """([n, 3] features as `FEATURES`, [n] whether right) of the draft's own answers, thoughts included."""
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(arrived.put)
    watches, said, right = [AnswerWatch() for _ in questions], ["" for _ in questions], np.zeros(len(questions))
    told = msgspec.structs.replace(sampling, logprobs=True)
    try:
        for id, question in enumerate(questions):
            messages = msgspec.json.encode([{"role": "user", "content": question.text}])
            link.submit(
                Generate(id, draft, messages, told, thought=ThoughtSoFar(""))
            )  # so that its thought is measured
        running = len(questions)
        while running:
            for event in arrived.get():
                if isinstance(event, Failed):
                    raise AskingFailed(f"{questions[event.id].text!r}: {event.message}")
                if isinstance(event, Delta):
                    said[event.id] += event.content
                    for token in event.logprobs:
                        watches[event.id].push(token.logprob, token.entropy or 0.0)
                elif isinstance(event, Finished):
                    running -= 1
                    ended = event.finish_reason == "stop"
                    right[event.id] = ended and is_right(said[event.id], questions[event.id].answer)
    finally:
        link.close()
    found: list[dict[str, float]] = [
        {str(name): value for name, value in watch.features().items()} for watch in watches
    ]
    return np.array([[one[name] for name in FEATURES] for one in found], np.float64), right
