"""Tokens per second of the engine with and without speculation, by who drafts and how many write side by side.

    python -m benchmarks.engine_spec bundled/base --draft bundled/draft --cpu-time

Arithmetic questions, greedy, all requests sent at once; kinds take turns, and each is read by its best round. The text
of every kind is compared with that of plain decoding.
"""

import argparse
import json
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from local_engine.arithmetic import problems
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.spec.build import speculators
from local_engine.types import Delta, Event, Failed, Finished, Generate, SamplingParams

BATCHES: Final = (1, 8, 32)
SAMPLING: Final = SamplingParams(temperature=0, max_tokens=256, effort="high")


@dataclass(slots=True)
class Round:
    text: list[str]
    tokens: int
    seconds: float
    drafted: int
    accepted: int


def run(engine: Engine, questions: list[str], batch: int, clock: Callable[[], float]) -> Round:
    """Answer all questions, `batch` at a time."""
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(events.put)
    result = Round(["" for _ in questions], 0, 0.0, 0, 0)
    waiting = list(enumerate(questions))

    def submit() -> None:
        if waiting:
            id, question = waiting.pop(0)
            link.submit(Generate(id, "m", json.dumps([{"role": "user", "content": question}]).encode(), SAMPLING))

    began = clock()
    for _ in range(batch):
        submit()
    finished = 0
    while finished < len(questions):
        for event in events.get():
            if isinstance(event, Delta):
                result.text[event.id] += event.reasoning + event.content
            elif isinstance(event, Finished):
                result.tokens += event.output_tokens
                result.drafted += event.drafted_tokens
                result.accepted += event.accepted_tokens
                finished += 1
                submit()
            elif isinstance(event, Failed):
                raise RuntimeError(event.message)
    result.seconds = clock() - began
    link.close()
    return result


def compare(
    model: LocalModel, drafters: dict[str, LocalModel], kinds: list[str], rounds: int, clock: Callable[[], float]
) -> None:
    for batch in BATCHES:
        engines = {
            kind: Engine({"m": model}, max_running=batch, make_speculator=speculators({"m": kind}, drafters))
            for kind in kinds
        }
        for engine in engines.values():
            engine.start()
        best: dict[str, Round] = {}
        for number in range(rounds + 1):
            # New questions in every round: nobody may remember the answers, only how answers go.
            questions = [p.question for level in (1, 2, 3, 4) for p in problems(number, level, max(2, batch // 2))]
            said: list[str] | None = None
            for kind, engine in engines.items():
                done = run(engine, questions, batch, clock)
                said = said or done.text
                if done.text != said:
                    raise RuntimeError(f"{kind} wrote another text than {kinds[0]}")
                if number and (kind not in best or done.tokens / done.seconds > best[kind].tokens / best[kind].seconds):
                    best[kind] = done
        plain = best[kinds[0]].tokens / best[kinds[0]].seconds
        for kind, done in best.items():
            engines[kind].stop()
            rate = done.tokens / done.seconds
            kept = done.accepted / done.drafted if done.drafted else 0.0
            drafted = done.drafted / done.tokens
            print(
                f"batch {batch:2} {kind:28} {rate:8.0f} tokens/s  x{rate / plain:.2f}"
                f"  drafted {drafted:.2f} per token, {kept:4.0%} kept"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model with the same tokenizer")
    parser.add_argument("--exit", type=int, help="a layer to draft from")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a shared machine; one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = ["off", "ngram", "recycle", "auto"]
    drafters = {}
    if options.draft:
        drafters[options.draft] = load_model(options.draft, options.draft, options.dtype, "cpu")
        kinds += [f"draft:{options.draft}", f"auto+draft:{options.draft}"]
    if options.exit:
        kinds.append(f"exit:{options.exit}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    compare(load_model("m", options.model, options.dtype, "cpu"), drafters, kinds, options.rounds, clock)


if __name__ == "__main__":
    main()
