"""Leaving a thought inside the decode loop: the bundled model, and one whose tokens are written for it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from local_engine.kv import KVCache
from local_engine.model import LocalModel
from local_engine.plan_types import Exit, PlanUse
from local_engine.reason.artifact import Certified
from local_engine.runner import Runner, Segment, StepOutput
from local_engine.spec.build import speculators
from local_engine.types import Finished, SamplingParams, TapSpec, TextFormat
from tests.local_engine.engine_harness import Caller, StartEngine, Watch
from tests.local_engine.reason.test_rules import artifact

THINK = SamplingParams(temperature=0, effort="high", max_tokens=400)
ASKED = "What is 83 * 7 + 45?"
FIRST_PASS = "83 * 7 = 581\n\n581 + 45 = 626\n\n"


def use(finished: Finished) -> PlanUse:
    assert finished.plan is not None
    return finished.plan


class Scripted:
    """A runner whose model says these tokens after the prompt, over and over, whatever it is told; the rest is real."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self, model: LocalModel, kv: KVCache) -> "Scripted":
        tokens = model.tokenizer.encode(self._text, add_special_tokens=False)
        self._tokens = itertools.cycle(tokens)
        self._runner = Runner(model, kv)
        return self

    def run(self, segments: Sequence[Segment], *, tap_layers: Sequence[int] = ()) -> StepOutput:
        output = self._runner.run(segments, tap_layers=tap_layers)
        for row in output.logits:
            row.fill_(-20.0)
            row[next(self._tokens)] = 20.0
        return output


def test_an_exit_cuts_before_the_cue_and_answers(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    whole = caller.generate(ASKED, THINK)
    left = caller.generate(ASKED, THINK, plan=Exit(rule="cue"))
    assert caller.reasoning(whole).startswith(FIRST_PASS + "Wait, let me check.")
    assert caller.reasoning(left) == FIRST_PASS
    assert caller.content(left) == caller.content(whole) == "The answer is 626."
    full, end = caller.finished(whole), caller.finished(left)
    assert (use(end).closed_by, end.finish_reason, use(end).discarded_tokens) == ("cue", "stop", 2)
    assert full.plan is None
    assert end.output_tokens < 0.6 * full.output_tokens
    told = sum(delta.tokens for delta in caller.deltas(left))
    assert end.output_tokens == told + use(end).discarded_tokens + 1, "the end of the turn has no text"


def test_leaving_reads_nothing_again(bundled: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    caller = Caller(start_engine(bundled, make_runner=watch, prefix_bytes=0))
    end = caller.finished(caller.generate(ASKED, THINK, plan=Exit(rule="cue")))
    computed = sum(sum(sizes) for sizes in watch.sizes)
    # Computed: the prompt, every token but the last; at the cut, the last token of the thought a second time, and
    # the cue's last token was thrown away before it was.
    assert computed <= end.input_tokens + end.output_tokens + 1


def test_answers_that_are_tried_leave_no_trace(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    whole = caller.generate(ASKED, THINK)
    traced = caller.generate(ASKED, THINK, plan=Exit(rule="trace"))
    assert caller.reasoning(traced) == caller.reasoning(whole)
    assert caller.content(traced) == caller.content(whole)
    full, end = caller.finished(whole), caller.finished(traced)
    assert end.output_tokens - use(end).discarded_tokens == full.output_tokens
    assert end.reasoning_tokens - use(end).discarded_tokens == full.reasoning_tokens
    (cue,) = use(end).cues
    assert cue.answer == "The answer is 626."
    assert use(end).discarded_tokens == cue.answer_tokens


def test_hidden_states_at_the_cue_are_those_of_its_token(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    end = caller.finished(caller.generate(ASKED, THINK, plan=Exit(rule="trace", layers=(2, 6))))
    taps = TapSpec((2, 6), "tokens", (bundled.tokenizer.get_vocab()["Wait"],))
    plain = caller.generate(ASKED, THINK, taps=taps)
    (tapped,) = [tapped for delta in caller.deltas(plain) for tapped in delta.tapped]
    states = torch.frombuffer(bytearray(tapped.data), dtype=torch.float16).float()
    found = torch.tensor(use(end).cues[0].features[-len(states) :])
    assert torch.allclose(found, states, atol=2e-2, rtol=2e-3)


def test_speculation_changes_nothing(bundled: LocalModel, start_engine: StartEngine) -> None:
    plain = Caller(start_engine(bundled))
    drafting = Caller(start_engine(bundled, make_speculator=speculators({"m": "auto"}, {})))
    for asked in (Exit(rule="cue"), Exit(rule="trace"), Exit(rule="none", max_thinking_tokens=17)):
        left, right = (caller.generate(ASKED, THINK, plan=asked) for caller in (plain, drafting))
        assert plain.reasoning(left) == drafting.reasoning(right)
        assert plain.content(left) == drafting.content(right)


def test_a_thought_is_closed_at_its_limit(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate(ASKED, THINK, plan=Exit(rule="none", max_thinking_tokens=10))
    assert caller.reasoning(id) == "83 * 7 = 581\n\n"
    end = caller.finished(id)
    assert (use(end).closed_by, end.finish_reason) == ("limit", "stop")
    assert caller.content(id).startswith("The answer is")


def test_every_choice_leaves_its_own_thought(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(temperature=1.0, seed=1, effort="high", max_tokens=400)
    id = caller.generate(ASKED, sampling, n=4, plan=Exit(rule="cue"))
    for choice in range(4):
        assert "Wait" not in caller.reasoning(id, choice)
        assert caller.content(id, choice)


def test_a_format_is_held_after_a_thought_was_left(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(
        temperature=0, effort="high", max_tokens=400, response_format=TextFormat("regex", "[0-9]{1,4}")
    )
    for rule in ("cue", "trace"):
        id = caller.generate(ASKED, sampling, plan=Exit(rule=rule))
        assert caller.content(id).isdigit(), rule
        assert caller.finished(id).finish_reason == "stop"


def test_the_probe_of_the_artifact_decides(bundled: LocalModel, start_engine: StartEngine) -> None:
    certain = Certified(0.05, "expected", "wrong", 0.5, 1000)
    for bias, exited in ((4.0, "probe"), (-4.0, "")):
        model = dataclasses.replace(bundled, exits=artifact(certain, bias=bias))
        caller = Caller(start_engine(model))
        end = caller.finished(caller.generate(ASKED, THINK, plan=Exit()))
        assert use(end).closed_by == exited
        assert use(end).exit_p == pytest.approx(1 / (1 + 2.718281828**-bias))


def test_an_endless_wait_is_broken_off(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled, make_runner=Scripted("<think>" + "Wait, " * 400), prefix_bytes=0))
    sampling = SamplingParams(temperature=0, effort="high", max_tokens=300)
    end = caller.finished(caller.generate(ASKED, sampling, plan=Exit(rule="none")))
    assert use(end).closed_by == "loop"
    assert end.reasoning_tokens < 70


def test_a_thought_that_never_closes_is_closed_while_an_answer_fits(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    words = "<think>" + " ".join(str(n) for n in range(100, 400))
    caller = Caller(start_engine(bundled, make_runner=Scripted(words), prefix_bytes=0))
    sampling = SamplingParams(temperature=0, effort="high", max_tokens=160)
    id = caller.generate(ASKED, sampling, plan=Exit(rule="none"))
    end = caller.finished(id)
    assert use(end).closed_by == "limit"
    assert end.reasoning_tokens <= 140
    assert caller.content(id), "there was room for an answer"
    assert end.output_tokens == 160


def test_what_is_held_back_is_told_at_the_end(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled, make_runner=Scripted("<think>so Wait"), prefix_bytes=0))
    sampling = SamplingParams(temperature=0, effort="high", max_tokens=4)
    id = caller.generate(ASKED, sampling, plan=Exit(rule="trace"))
    assert caller.finished(id).output_tokens == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"plan": Exit()}, "needs a fitted artifact"),
        ({"plan": Exit(rule="cue", max_thinking_tokens=0)}, "must be at least 1"),
        ({"plan": Exit(rule="cue"), "prefix": "The"}, "the answer has begun"),
        ({"plan": Exit(rule="trace", layers=(9,))}, "names layer 9"),
        ({"plan": Exit(rule="trace", layers=(2,)), "taps": TapSpec((1,))}, "cannot be combined"),
    ],
)
def test_what_cannot_be_is_refused(
    bundled: LocalModel, start_engine: StartEngine, options: dict[str, Any], problem: str
) -> None:
    model = dataclasses.replace(bundled, exits=None)
    caller = Caller(start_engine(model))
    failure = caller.failed(caller.generate(ASKED, THINK, **options))
    assert failure.code == "invalid_request"
    assert problem in failure.message


def test_a_model_without_thinking_tags_is_refused(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(dataclasses.replace(bundled, end_think_token=None)))
    failure = caller.failed(caller.generate(ASKED, THINK, plan=Exit(rule="cue")))
    assert "no thinking tags" in failure.message


def test_no_thought_no_exit(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    sampling = SamplingParams(temperature=0, effort="none", max_tokens=50)
    plain, left = (caller.generate(ASKED, sampling, plan=exit) for exit in (None, Exit(rule="cue")))
    assert caller.content(plain) == caller.content(left)
    assert use(caller.finished(left)).closed_by == ""


def test_the_shipped_artifact_is_the_bundled_models(bundled: LocalModel, start_engine: StartEngine) -> None:
    assert bundled.exits is not None
    assert bundled.exits.manifest.layers == ()
    caller = Caller(start_engine(bundled))
    end = caller.finished(caller.generate(ASKED, THINK, plan=Exit(delta=0.01)))
    assert (use(end).closed_by, end.finish_reason) == ("probe", "stop")
    p = use(end).exit_p
    assert p is not None
    assert p > bundled.exits.manifest.threshold(0.01, "expected", "wrong")
