"""What a request may ask of the engine: choices, priority, deadline, salt, taps, scores; and who gets the room."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from local_engine.arithmetic import problems
from local_engine.chat import parse_messages, prompt_tokens
from local_engine.kv import KVShape
from local_engine.model import LocalModel, load_model
from local_engine.types import SamplingParams, ScoreResult, Tapped, TapSpec
from tests.local_engine.engine_harness import Caller, StartEngine, Watch, user

DRAWN = SamplingParams(temperature=3.0, seed=11, max_tokens=25)


@pytest.fixture(scope="module")
def network() -> Any:
    """The bundled model's, as transformers runs it."""
    return load_model("m", "bundled/base", "float32", "cpu").network


def prompt_of(model: LocalModel, text: str, effort: Any = "low") -> list[int]:
    return prompt_tokens(model.tokenizer, parse_messages(user(text)), effort=effort)


def said(caller: Caller, id: int, choice: int = 0) -> tuple[str, str]:
    return caller.reasoning(id, choice), caller.content(id, choice)


def rows(model: LocalModel, number: int, tokens: int = 256) -> int:
    """Bytes of KV for so many rows."""
    return number * tokens * KVShape.of(model).token_bytes


# ---- choices --------------------------------------------------------------------------------------------------------


def test_choices_are_what_separate_requests_get_and_read_the_prompt_once(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    watch = Watch()
    caller = Caller(start_engine(bundled, prefix_bytes=0, make_runner=watch))
    text = "What is 3 + 4?"
    alone = [caller.generate(text, msgspec.structs.replace(DRAWN, seed=11 + choice)) for choice in range(4)]
    expected = [said(caller, id) for id in alone]
    watch.passes.clear()
    id = caller.generate(text, DRAWN, n=4)
    assert [said(caller, id, choice) for choice in range(4)] == expected
    assert len(set(expected)) > 1
    prompt, read = prompt_of(bundled, text), watch.passes[0]
    assert [list(segment.tokens) for segment in read] == [prompt]
    assert watch.sizes[1] == [1, 1, 1, 1], "the first choice's token, and the prompt's last one for each other"
    ends = [caller.finished(id, choice) for choice in range(4)]
    assert {end.input_tokens for end in ends} == {len(prompt)}
    assert [end.output_tokens for end in ends] == [caller.finished(one).output_tokens for one in alone]


def test_one_token_of_each_choice(bundled: LocalModel, start_engine: StartEngine) -> None:
    """The first choice is over in the very step in which the others are forked from it."""
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?", SamplingParams(temperature=0, max_tokens=1), n=3)
    assert [caller.finished(id, choice).output_tokens for choice in range(3)] == [1, 1, 1]


def test_a_cancel_ends_every_choice(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(endless, make_runner=gate))
    id = caller.generate("What is 3 + 4?", n=3)
    gate.allow(4)
    gate.wait_for_pass(5)
    caller.cancel(id)
    gate.allow(100)
    assert [caller.finished(id, choice).finish_reason for choice in range(3)] == ["cancelled"] * 3
    assert len(gate.passes) == 5


# ---- room -----------------------------------------------------------------------------------------------------------


def test_little_room_changes_no_answer(bundled: LocalModel, start_engine: StartEngine) -> None:
    """KV for two: four requests with two choices each take turns, are preempted, and say what they say alone."""
    asked = [problem.question for problem in problems(3, 2, 4)]
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=60)
    roomy = Caller(start_engine(bundled, max_running=32))
    expected = [[said(roomy, roomy.generate(text, params, n=2), choice) for choice in range(2)] for text in asked]
    for prefix_bytes in (0, 1 << 24):
        engine = start_engine(bundled, kv_bytes=rows(bundled, 2), prefix_bytes=prefix_bytes, prefill_chunk=32)
        caller = Caller(engine)
        ids = [caller.generate(text, params, n=2) for text in asked]
        assert [[said(caller, id, choice) for choice in range(2)] for id in ids] == expected
        assert engine.stats().preemptions > 0


def test_a_step_that_runs_out_of_memory_preempts_and_goes_on(bundled: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    watch.error = torch.OutOfMemoryError("made to fail")
    watch.fails = lambda segments: len(segments) > 2
    engine = start_engine(bundled, make_runner=watch)
    caller = Caller(engine)
    ids = [caller.generate(f"What is 3 + {n}?") for n in range(5)]
    assert [caller.content(id) for id in ids] == [f"The answer is {n + 3}." for n in range(5)]
    assert engine.stats().preemptions > 0


def test_what_can_never_fit_is_refused_at_once(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled, kv_bytes=rows(bundled, 1)))
    failed = caller.failed(caller.generate("1 + " * 200))
    assert failed.code == "context_length_exceeded"
    assert "holds 256" in failed.message
    assert "the operator's LEADLINE_KV_MIB" in failed.message


@pytest.mark.parametrize("tokens", [256, 400], ids=["to the byte", "no longer row fits"])
def test_an_answer_that_fills_all_room_ends_there(
    tokens: int, endless: LocalModel, start_engine: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Caller(start_engine(endless, kv_bytes=rows(endless, 1, tokens)))
    finished = caller.finished(caller.generate("What is 3 + 4?"))
    assert finished.finish_reason == "length"
    assert 256 <= finished.input_tokens + finished.output_tokens <= 257
    assert not caplog.records, "it is no failure"


def test_room_that_is_too_little_for_a_row_is_said(bundled: LocalModel, start_engine: StartEngine) -> None:
    """By the bytes it would fit; by the way that rows are laid out it does not."""
    caller = Caller(start_engine(bundled, kv_bytes=rows(bundled, 1, 200)))
    failed = caller.failed(caller.generate("What is 3 + 4?"))
    assert failed.code == "context_length_exceeded"
    assert "the operator's LEADLINE_KV_MIB" in failed.message
    failed = caller.failed(caller.score("What is 3 + 4?", ["7"]))
    assert failed.code == "context_length_exceeded"
    assert "the operator's LEADLINE_KV_MIB" in failed.message


# ---- prefixes -------------------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_read_again_by_the_same_tenant(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    text = "Anna has 12 apples. She buys 7 more. How many apples are there now?"
    first, again, other, longer = (
        caller.finished(caller.generate(text, salt="a")),
        caller.finished(caller.generate(text, salt="a")),
        caller.finished(caller.generate(text, salt="b")),
        caller.finished(caller.generate(text + " And then?", salt="a")),
    )
    assert (first.cached_tokens, other.cached_tokens) == (0, 0)
    assert again.cached_tokens == (again.input_tokens - 1) // 16 * 16 > 0
    assert 0 < longer.cached_tokens < longer.input_tokens
    assert (again.input_tokens, again.output_tokens) == (first.input_tokens, first.output_tokens)


def test_a_cached_answer_is_the_same_answer(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    for problem in problems(5, 2, 4):
        cold, warm = caller.generate(problem.question), caller.generate(problem.question)
        assert said(caller, cold) == said(caller, warm)


def test_prompts_that_come_together_and_begin_alike_are_read_once(
    bundled: LocalModel, gate: Watch, start_engine: StartEngine
) -> None:
    """Four at once, none of whose prefix is stored yet: one reads it, the others the rest of theirs."""
    caller = Caller(start_engine(bundled, prefill_chunk=32, make_runner=gate))
    shared = "Anna has 12 apples. " * 12
    texts = [shared + f"What is {n} + 4?" for n in range(4)]
    first = caller.generate(texts[0], salt="a")
    gate.wait_for_pass(1)  # held while the others come
    others = [caller.generate(text, salt="a") for text in texts[1:]]
    stranger = caller.generate(texts[0], salt="b")
    gate.allow(10_000)
    ends = [caller.finished(id) for id in (first, *others, stranger)]
    assert [end.cached_tokens > 0 for end in ends] == [False, True, True, True, False]
    read = sum(len(segment.tokens) for segments in gate.passes for segment in segments)
    written = sum(end.output_tokens - 1 for end in ends)
    assert read == written + sum(end.input_tokens - end.cached_tokens for end in ends), "each token once"
    assert read - written < 3 * ends[0].input_tokens
    alone = Caller(start_engine(bundled))
    assert [said(caller, id) for id in others] == [said(alone, alone.generate(text)) for text in texts[1:]]


def test_who_waits_for_a_prefix_goes_on_when_its_reader_leaves(
    bundled: LocalModel, gate: Watch, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled, prefill_chunk=32, make_runner=gate))
    text = "Anna has 12 apples. " * 12
    first = caller.generate(text)
    gate.wait_for_pass(1)
    second = caller.generate(text)
    gate.allow(1)
    gate.wait_for_pass(2)
    caller.cancel(first)
    gate.allow(10_000)
    assert caller.finished(first).finish_reason == "cancelled"
    ended = caller.finished(second)
    assert 0 < ended.cached_tokens <= 64, "what two chunks had read is not lost either"


# ---- order and time -------------------------------------------------------------------------------------------------


def test_the_more_urgent_goes_first(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(endless, max_running=1, make_runner=gate))
    brief = SamplingParams(temperature=0, max_tokens=2)
    first = caller.generate("0 + 1", brief)
    gate.wait_for_pass(1)
    late = {priority: caller.generate(f"{priority} + 1", brief, priority=priority) for priority in (0, 1, 2)}
    gate.allow(100)
    for id in (first, *late.values()):
        caller.finished(id)
    prompts = {tuple(prompt_of(endless, f"{priority} + 1")): priority for priority in (1, 2)}
    order = [prompts[read] for segments in gate.passes for s in segments if (read := tuple(s.tokens)) in prompts]
    assert order == [2, 1]


def test_who_has_waited_long_enough_goes_before_the_more_urgent(
    endless: LocalModel, gate: Watch, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_engine.sequence.AGING_S", 0.01)
    caller = Caller(start_engine(endless, max_running=1, make_runner=gate))
    brief = SamplingParams(temperature=0, max_tokens=2)
    first = caller.generate("0 + 1", brief)
    gate.wait_for_pass(1)
    patient, since = caller.generate("1 + 1", brief), time.perf_counter()
    while time.perf_counter() < since + 0.05:  # five steps of priority
        pass
    urgent = {priority: caller.generate(f"{priority} + 1", brief, priority=priority) for priority in (3, 1000)}
    gate.allow(100)
    for id in (first, patient, *urgent.values()):
        caller.finished(id)
    prompts = {tuple(prompt_of(endless, f"{number} + 1")): number for number in (1, 3, 1000)}
    order = [prompts[read] for segments in gate.passes for s in segments if (read := tuple(s.tokens)) in prompts]
    assert order == [1000, 1, 3]


def test_a_deadline_ends_with_what_there_is(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    engine = start_engine(endless, max_running=1, make_runner=gate)
    caller = Caller(engine)
    running = caller.generate("What is 3 + 4?", deadline_s=0.2)
    waiting = caller.generate("What is 3 + 4?", deadline_s=0.0)
    scoring = caller.score("What is 3 + 4?", ["7"], deadline_s=0.0)
    gate.allow(1_000_000)
    assert caller.finished(waiting).finish_reason == "deadline"
    assert caller.finished(waiting).output_tokens == 0
    assert caller.failed(scoring).code == "deadline"
    ended = caller.finished(running)
    assert ended.finish_reason in ("deadline", "length")  # a fast machine fills the window in that time
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


# ---- taps -----------------------------------------------------------------------------------------------------------


def hidden_states(network: Any, tokens: list[int]) -> list[np.ndarray[Any, Any]]:
    """[layers + 1] of [tokens, width]; the last is transformers' own but for the final norm, which comes after ours."""
    kept: list[Any] = []
    hook = network.model.norm.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        states = network(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hook.remove()
    return [state[0].numpy() for state in (*states[:-1], kept[0])]


def arrays(tapped: list[Tapped]) -> list[tuple[list[int], np.ndarray[Any, Any]]]:
    return [(one.positions, np.frombuffer(one.data, "<f2").reshape(one.shape).astype(np.float32)) for one in tapped]


@pytest.mark.parametrize("room", [1 << 28, None], ids=["room", "preempted"])
@pytest.mark.parametrize("where", ["prompt", "generated", "tokens"])
def test_taps_bring_the_hidden_states_of_transformers(
    where: Any, room: int | None, bundled: LocalModel, network: Any, start_engine: StartEngine
) -> None:
    text = "What is 3 + 4 - 2?"
    prompt = prompt_of(bundled, text)
    with torch.no_grad():
        ids = torch.tensor([prompt])
        whole = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
    tokens: list[int] = whole[0].tolist()
    cue = tokens[len(prompt) + 4 : len(prompt) + 6]
    layers = (0, 3, network.config.num_hidden_layers)
    taps = TapSpec(layers, where, tuple(cue) if where == "tokens" else ())
    engine = start_engine(bundled, kv_bytes=room or rows(bundled, 2), prefill_chunk=16)
    caller = Caller(engine)
    rivals = [caller.generate("What is 12 + 30 - 8?", salt="b", priority=n % 2) for n in range(0 if room else 6)]
    id = caller.generate(text, SamplingParams(temperature=0), taps=taps, salt="a")
    finished = caller.finished(id)
    for rival in rivals:
        caller.finished(rival)
    assert len(tokens) == len(prompt) + finished.output_tokens
    written = range(len(prompt), len(tokens) - 1)
    expected = {
        "prompt": [len(prompt) - 1],
        "generated": list(written),
        "tokens": [at for at in written if tokens[at] in cue],
    }[where]
    assert expected
    found = arrays([one for delta in caller.deltas(id) for one in delta.tapped])
    assert [at for positions, _ in found for at in positions] == expected, "each once, in order"
    states = hidden_states(network, tokens)
    for positions, values in found:
        for row, at in enumerate(positions):
            for column, layer in enumerate(layers):
                np.testing.assert_allclose(values[row, column], states[layer][at], rtol=2e-3, atol=2e-3)


def test_nothing_comes_back_where_nothing_was_asked(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?")
    caller.finished(id)
    assert not any(delta.tapped for delta in caller.deltas(id))


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_transformers(bundled: LocalModel, network: Any, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled, prefill_chunk=16))
    candidates = ["The answer is 7.", "The answer is 8.", "no"]
    result = caller.wait(caller.score("What is 3 + 4?", candidates))[-1]
    assert isinstance(result, ScoreResult)
    prompt = prompt_of(bundled, "What is 3 + 4?", "none")
    assert result.input_tokens == len(prompt)
    for candidate, scored in zip(candidates, result.candidates, strict=True):
        assert bundled.tokenizer.decode(scored.tokens) == candidate
        with torch.no_grad():
            logits = network(torch.tensor([prompt + scored.tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)
        own = logprobs[torch.arange(len(scored.tokens)), torch.tensor(scored.tokens)]
        np.testing.assert_allclose(scored.logprobs, own, atol=1e-4)
        np.testing.assert_allclose(scored.entropies, -(logprobs.exp() * logprobs).sum(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"taps": TapSpec(())}, "taps.layers"),
        ({"taps": TapSpec((99,))}, "taps.layers"),
        ({"taps": TapSpec((1,), "tokens")}, "taps.tokens"),
        ({"taps": TapSpec((1,), "tokens", (1 << 30,))}, "taps.tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], message: str, bundled: LocalModel, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled))
    failed = caller.failed(caller.generate("hi", **options))
    assert (failed.code, message in failed.message) == ("invalid_request", True)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [([], "candidates must hold"), (["a", ""], "candidates[1] has no"), (["a", "7 " * 2000], "candidates[1] has ")],
)
def test_candidates_that_cannot_be_scored_are_refused(
    candidates: list[str], words: str, bundled: LocalModel, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled))
    failed = caller.failed(caller.score("hi", candidates))
    assert (failed.code, failed.param) == ("invalid_request", "candidates")
    assert failed.message.startswith(words)


def test_a_prompt_that_leaves_candidates_no_room_is_refused_for_itself(
    bundled: LocalModel, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled))
    failed = caller.failed(caller.score("1 + " * 900, ["7"]))
    assert failed.code == "context_length_exceeded"


# ---- several models -------------------------------------------------------------------------------------------------


def test_models_share_an_engine_and_nothing_else(
    bundled: LocalModel, tiny_folder: Callable[[str], Path], start_engines: Any
) -> None:
    tiny = load_model("tiny", str(tiny_folder("llama")), "float32", "cpu")
    caller = Caller(start_engines({"m": bundled, "tiny": tiny}))
    brief = SamplingParams(temperature=0, max_tokens=20)
    alone = {name: said(caller, caller.generate("What is 3 + 4?", brief, name)) for name in ("m", "tiny")}
    ids = [(name, caller.generate("What is 3 + 4?", brief, name)) for name in ("m", "tiny") * 4]
    for name, id in ids:
        assert said(caller, id) == alone[name]
