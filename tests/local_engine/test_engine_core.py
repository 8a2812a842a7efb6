"""The engine in this process: the same tokens as transformers, in turns, and gone when cancelled."""

import dataclasses
import math
import shutil
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from local_engine.arithmetic import problems
from local_engine.chat import parse_messages, prompt_tokens
from local_engine.config import Device
from local_engine.engine import Engine
from local_engine.errors import ModelLoadError
from local_engine.model import LocalModel, load_model
from local_engine.types import Delta, ProbeResult, SamplingParams
from tests.local_engine.devices import ON_DEVICES, ON_TYPES
from tests.local_engine.engine_harness import ARCHITECTURES, GREEDY, PATIENCE_S, Caller, StartEngine, Watch, user
from tests.local_engine.fake_prober import FakeProber

QUESTION = "Anna has 12 apples. She buys 7 more. How many apples are there now?"


@pytest.fixture(scope="module")
def load(device: torch.device, tiny_folder: Callable[[str], Path]) -> Callable[[str], LocalModel]:
    where: Device = "cuda" if device.type == "cuda" else "cpu"

    def load(family: str) -> LocalModel:
        source = "bundled/base" if family == "bundled" else str(tiny_folder(family))
        return load_model("m", source, "float32", where)

    return load


@pytest.fixture(scope="module")
def references(load: Callable[[str], LocalModel]) -> Callable[[str], LocalModel]:
    """Models that no engine has taken: their networks run by transformers' own forward pass."""
    return cache(load)


def generated_by_transformers(model: LocalModel, text: str, n: int) -> list[int]:
    prompt = prompt_tokens(model.tokenizer, parse_messages(user(text)))
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out: Any = model.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@ON_DEVICES
@pytest.mark.parametrize("prefill_chunk", [7, 256])
@pytest.mark.parametrize("family", ["bundled", *ARCHITECTURES])
def test_greedy_tokens_equal_those_of_generate(
    family: str,
    prefill_chunk: int,
    bundled: LocalModel,
    load: Callable[[str], LocalModel],
    references: Callable[[str], LocalModel],
    start_engine: StartEngine,
) -> None:
    """Read in chunks of any size, and beside others: what is computed is the prompt, then what transformers says."""
    expected = generated_by_transformers(references(family), QUESTION, 40)
    model = bundled if family == "bundled" else load(family)
    model = model if family == "bundled" else dataclasses.replace(model, end_tokens=frozenset())
    watch = Watch()
    caller = Caller(start_engine(model, max_running=2, prefill_chunk=prefill_chunk, make_runner=watch))
    beside = caller.generate("1 + 1 " * 9, SamplingParams(temperature=0, max_tokens=60))
    id = caller.generate(QUESTION, SamplingParams(temperature=0, max_tokens=40))
    finished = caller.finished(id)
    caller.finished(beside)
    prompt = prompt_tokens(model.tokenizer, parse_messages(user(QUESTION)))
    assert list(watch.read_in(prompt)) == prompt + expected[:-1]
    assert (finished.input_tokens, finished.output_tokens) == (len(prompt), len(expected))


@ON_DEVICES
def test_parallel_requests_get_what_they_get_alone(bundled: LocalModel, start_engine: StartEngine) -> None:
    questions = [problem.question for problem in problems(9, 2, 6)]
    caller = Caller(start_engine(bundled, max_running=4, prefill_chunk=8))
    alone = [caller.content(caller.generate(question)) for question in questions]
    ids = [caller.generate(question) for question in questions]
    assert [caller.content(id) for id in ids] == alone


@ON_TYPES
def test_the_bundled_model_answers_held_out_questions(bundled: LocalModel, start_engine: StartEngine) -> None:
    asked = problems(77, 1, 60)
    caller = Caller(start_engine(bundled))
    ids = [caller.generate(problem.question) for problem in asked]
    right = sum(
        caller.content(id) == f"The answer is {problem.answer}." for id, problem in zip(ids, asked, strict=True)
    )
    assert right >= 0.85 * len(asked)


def test_thinking_is_counted_and_kept_apart(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?")
    finished = caller.finished(id)
    assert caller.reasoning(id) == "3 + 4 = 7\n\n"
    assert caller.content(id) == "The answer is 7."
    spelled = "<think>\n3 + 4 = 7\n\n</think>", "\n\nThe answer is 7.<|im_end|>"
    thought, said = (len(bundled.tokenizer(part).input_ids) for part in spelled)
    assert (finished.reasoning_tokens, finished.output_tokens) == (thought, thought + said)
    assert finished.finish_reason == "stop"


def test_no_effort_means_no_thinking(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?", SamplingParams(temperature=0, effort="none"))
    assert caller.finished(id).reasoning_tokens == 0
    assert caller.reasoning(id) == ""
    assert caller.content(id).startswith("The answer is")


def test_a_stop_string_across_tokens_ends_the_answer(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?", SamplingParams(temperature=0, stop=("er is",)))
    assert caller.finished(id).finish_reason == "stop"
    assert caller.content(id) == "The answ"


def test_max_tokens_cut_the_answer(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    finished = caller.finished(caller.generate("What is 3 + 4?", SamplingParams(temperature=0, max_tokens=5)))
    assert (finished.finish_reason, finished.output_tokens) == ("length", 5)


@ON_DEVICES
def test_a_seed_decides_the_answer(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))

    def said(seed: int) -> str:
        params = SamplingParams(temperature=5.0, seed=seed, max_tokens=30)
        id = caller.generate("What is 3 + 4?", params)
        caller.finished(id)
        return caller.reasoning(id) + caller.content(id)

    assert said(1) == said(1)
    assert len({said(seed) for seed in (1, 2, 3)}) > 1


@ON_DEVICES
def test_logprobs_belong_to_the_content(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    id = caller.generate("What is 3 + 4?", SamplingParams(temperature=0, logprobs=True, top_logprobs=3))
    caller.finished(id)
    entries = [entry for event in caller.wait(id) if isinstance(event, Delta) for entry in event.logprobs]
    assert b"".join(entry.token for entry in entries).decode().strip() == caller.content(id)
    for entry in entries:
        assert entry.top[0] == (entry.token, entry.logprob)
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        assert sum(math.exp(logprob) for _, logprob in entry.top) <= 1 + 1e-5


def test_a_cancel_stops_before_the_next_forward_pass(
    endless: LocalModel, gate: Watch, start_engine: StartEngine
) -> None:
    engine = start_engine(endless, make_runner=gate)
    caller = Caller(engine)
    id = caller.generate("What is 3 + 4?")
    gate.allow(5)
    gate.wait_for_pass(6)  # the sixth is asked for, and held
    caller.cancel(id)
    gate.allow(100)
    finished = caller.finished(id)
    assert (finished.finish_reason, finished.output_tokens) == ("cancelled", 6)
    assert len(gate.passes) == 6
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.kv_tokens, stats.kv_bytes) == (0, 0, 6, 0, 0)


def test_a_closed_link_cancels_its_commands_only(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    engine = start_engine(endless, max_running=2, make_runner=gate)
    leaving, staying = Caller(engine), Caller(engine)
    for _ in range(3):
        leaving.generate("What is 3 + 4?")
    gate.allow(5)
    gate.wait_for_pass(6)
    leaving.link.close()
    gate.allow(10_000)
    assert staying.finished(staying.generate("1 + 1", SamplingParams(temperature=0, max_tokens=9))).output_tokens == 9
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_waiting_request_can_be_cancelled(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(endless, max_running=1, make_runner=gate))
    first, second = caller.generate("1 + 1"), caller.generate("2 + 2")
    gate.wait_for_pass(1)
    caller.cancel(second)
    gate.allow(2)
    assert caller.finished(second).finish_reason == "cancelled"
    caller.cancel(first)
    gate.allow(10)
    assert caller.finished(first).finish_reason == "cancelled"


def test_a_long_prompt_does_not_starve_decoding(endless: LocalModel, gate: Watch, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(endless, prefill_chunk=16, make_runner=gate))
    short = caller.generate("1 + 1", SamplingParams(temperature=0, max_tokens=30))
    gate.allow(6)
    gate.wait_for_pass(7)
    long = caller.generate("1 + 1 " * 120, SamplingParams(temperature=0, max_tokens=1))
    gate.allow(10_000)
    caller.finished(short)
    caller.finished(long)
    beside = [sizes for sizes in gate.sizes if len(sizes) == 2]
    assert len(beside) > 10, "the long prompt was read while the short one decoded"
    assert all(one == 1 and one + chunk <= 16 for one, chunk in beside)


def test_a_probe_is_answered_while_others_generate(
    endless: LocalModel, gate: Watch, prober: FakeProber, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(endless, prober, make_runner=gate))
    running = caller.generate("1 + 1")
    gate.allow(2)
    gate.wait_for_pass(3)
    prober.leave.clear()
    first = caller.probe(user("first"))
    gate.allow(1)  # the pass under way; then it is handed to the encoder
    assert prober.entered.acquire(timeout=PATIENCE_S)
    ids = [first, *(caller.probe(user(text)) for text in ("a", "bbb", "cc"))]
    gate.allow(3)  # decoding goes on while the encoder is held, and the three wait together
    gate.wait_for_pass(7)
    prober.leave.set()  # and its answers do not wait for a step
    results = [caller.wait(id)[-1] for id in ids]
    assert [result.p_success["m"] for result in results if isinstance(result, ProbeResult)] == [1 / 6, 0.5, 0.25, 1 / 3]
    assert prober.batches == [1, 3]
    assert len(gate.passes) == 7
    caller.cancel(running)
    gate.allow(10)
    caller.finished(running)


def test_a_probe_counts_the_prompt_as_generate_does(
    bundled: LocalModel, prober: FakeProber, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled, prober))
    probed = caller.wait(caller.probe(user(QUESTION)))[-1]
    assert isinstance(probed, ProbeResult)
    assert probed.input_tokens == {"m": caller.finished(caller.generate(QUESTION)).input_tokens}


def test_an_engine_without_a_prober_still_counts(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    probed = caller.wait(caller.probe(user("hello")))[-1]
    assert isinstance(probed, ProbeResult)
    assert probed.p_success == {}
    assert probed.input_tokens["m"] > 0


def test_a_broken_probe_fails_alone(bundled: LocalModel, prober: FakeProber, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled, prober))
    assert caller.failed(caller.probe(user("break"))).code == "internal"
    assert caller.failed(caller.probe(b"{")).code == "invalid_request"
    assert isinstance(caller.wait(caller.probe(user("fine")))[-1], ProbeResult)


def test_a_prober_that_loses_answers_fails_its_batch_only(
    bundled: LocalModel, prober: FakeProber, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(start_engine(bundled, prober))
    monkeypatch.setattr(prober, "sound", lambda conversations: [])
    assert caller.failed(caller.probe(user("hello"))).code == "internal"
    monkeypatch.undo()
    assert isinstance(caller.wait(caller.probe(user("hello")))[-1], ProbeResult)


def test_a_prompt_over_the_window_names_both_numbers(bundled: LocalModel, start_engine: StartEngine) -> None:
    caller = Caller(start_engine(bundled))
    text = "1 + " * 600
    failed = caller.failed(caller.generate(text))
    assert failed.code == "context_length_exceeded"
    n = len(prompt_tokens(bundled.tokenizer, parse_messages(user(text))))
    assert f"{n} tokens" in failed.message
    assert "1024" in failed.message


@ON_DEVICES
def test_an_answer_ends_where_the_window_ends(bundled: LocalModel, start_engine: StartEngine) -> None:
    never_ending = dataclasses.replace(bundled, end_tokens=frozenset())
    caller = Caller(start_engine(never_ending))
    finished = caller.finished(caller.generate("1 + " * 330, SamplingParams(temperature=0, max_tokens=5000)))
    assert finished.finish_reason == "length"
    assert finished.input_tokens + finished.output_tokens == 1024


@pytest.mark.parametrize(
    ("messages", "sampling", "model", "code"),
    [
        (user("hi"), GREEDY, "other", "model_not_found"),
        (b"[1]", GREEDY, "m", "invalid_request"),
        (user("hi"), SamplingParams(top_p=2), "m", "invalid_request"),
    ],
)
def test_a_request_that_cannot_run_is_refused(
    messages: bytes, sampling: SamplingParams, model: str, code: str, bundled: LocalModel, start_engine: StartEngine
) -> None:
    caller = Caller(start_engine(bundled))
    assert caller.failed(caller.generate(messages, sampling, model)).code == code


@ON_DEVICES
def test_a_failing_step_fails_the_request_that_fails_it(bundled: LocalModel, start_engine: StartEngine) -> None:
    """Six together; the pass that holds the last prompt's tokens fails, and so it does alone. The others go on."""
    watch = Watch()
    engine = start_engine(bundled, make_runner=watch)
    caller = Caller(engine)
    poison = bundled.tokenizer.encode("8", add_special_tokens=False)[0]
    watch.fails = lambda segments: any(list(segment.tokens).count(poison) >= 3 for segment in segments)
    good = [caller.generate(f"What is 3 + {n}?") for n in range(5)]
    assert caller.failed(caller.generate("888 + 888")).code == "internal"
    assert [caller.content(id) for id in good] == [f"The answer is {n + 3}." for n in range(5)]
    assert engine.stats().running == 0


def test_stopping_ends_everything_as_cancelled(endless: LocalModel, gate: Watch) -> None:
    engine = Engine({"m": endless}, max_running=1, make_runner=gate)
    engine.start()
    caller = Caller(engine)
    ids = [caller.generate("1 + 1") for _ in range(3)]
    gate.wait_for_pass(1)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while stopping.is_alive():  # slowly: none is to fill its window before the engine is told
        gate.allow(1)
        stopping.join(0.01)
    assert not engine.alive
    assert [caller.finished(id).finish_reason for id in ids] == ["cancelled"] * 3


def test_another_family_is_named(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        load_model("m", str(tmp_path))


def test_pickled_weights_are_never_read(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model("m", str(tmp_path / "m"))


def test_weights_that_are_none_are_named(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelLoadError, match=r"'m' cannot be loaded from .*header"):
        load_model("m", str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("source", "reason"), [("bundled/none", "bundled are: base, draft, nano"), ("./no/such/folder", "no folder")]
)
def test_a_missing_model_is_named(source: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        load_model("m", source)
