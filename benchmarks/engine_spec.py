"""Tokens per second of the engine with and without speculation, by who drafts and how many write side by side.

    python -m benchmarks.engine_spec bundled/base --draft bundled/draft --cpu-time

Arithmetic questions, greedy, a batch of them sent at once. Every batch is answered by an engine without drafts and by
one of each kind, in a new order each time, some 50 ms each, so that what else the machine does meets all alike; the
ratio to plain decoding is the median over batches, with the middle half of them. The text of every kind is compared
with that of plain decoding. The last kind, `off again`, is plain decoding too: read the others by how far it is from 1.
"""

import argparse
import json
import queue
import random
import statistics
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
AGAIN: Final = " again"
WARM_TURNS: Final = 12
SAMPLING: Final = SamplingParams(temperature=0, max_tokens=256, effort="high")


@dataclass(slots=True)
class Round:
    text: list[str]
    tokens: int
    seconds: float
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Compared:
    kind: str
    tokens_per_s: float
    over_plain: list[float]
    """Quartiles of plain decoding's time over this kind's, batch by batch."""
    drafted_per_token: float
    accepted: int
    drafted: int


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
    model: LocalModel,
    drafters: dict[str, LocalModel],
    kinds: list[str],
    batch: int,
    turns: int,
    clock: Callable[[], float],
    seed: int,
) -> list[Compared]:
    """What each of `kinds`, of which the first is plain decoding, gives for the same batches of questions."""
    engines = {
        kind: Engine(
            {"m": model}, max_running=batch, make_speculator=speculators({"m": kind.removesuffix(AGAIN)}, drafters)
        )
        for kind in kinds
    }
    for engine in engines.values():
        engine.start()
    rounds: dict[str, list[Round]] = {kind: [] for kind in kinds}
    for turn in range(-WARM_TURNS, turns):
        # New questions in every turn: nobody may remember the answers, only how answers go.
        first = 1_000_000 * seed + 1000 * (turn + WARM_TURNS)
        questions = [problems(first + at, 1 + (turn + at) % 4, 1)[0].question for at in range(batch)]
        order = sorted(kinds, key=lambda kind: random.Random(f"{turn} {kind}").random())
        done = {kind: run(engines[kind], questions, batch, clock) for kind in order}
        for kind in kinds:
            if done[kind].text != done[kinds[0]].text:
                raise RuntimeError(f"{kind} wrote another text than {kinds[0]}")
            if turn >= 0:
                rounds[kind].append(done[kind])
    for engine in engines.values():
        engine.stop()
    found = []
    for kind, own in rounds.items():
        ratios = [plain.seconds / one.seconds for plain, one in zip(rounds[kinds[0]], own, strict=True)]
        tokens = sum(one.tokens for one in own)
        drafted, accepted = sum(one.drafted for one in own), sum(one.accepted for one in own)
        rate = statistics.median(one.tokens / one.seconds for one in own)
        found.append(Compared(kind, rate, statistics.quantiles(ratios, n=4), drafted / tokens, accepted, drafted))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", nargs="+", default=[], help="smaller models with the same tokenizer")
    parser.add_argument("--exit", type=int, help="a layer to draft from")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--turns", type=int, default=40, help="batches of questions that every kind answers")
    parser.add_argument("--seed", type=int, default=0, help="of the questions; the limits of debt were chosen by 0's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a shared machine; one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = ["off", "ngram", "recycle", "auto"]
    drafters = {}
    for draft in options.draft:
        drafters[draft] = load_model(draft, draft, options.dtype, "cpu")
        kinds += [f"draft:{draft}", f"auto+draft:{draft}"]
    if options.exit:
        kinds.append(f"exit:{options.exit}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    kinds.append("off" + AGAIN)
    model = load_model("m", options.model, options.dtype, "cpu")
    for batch in options.batches:
        for one in compare(model, drafters, kinds, batch, options.turns, clock, options.seed):
            low, middle, high = one.over_plain
            kept = one.accepted / one.drafted if one.drafted else 0.0
            print(
                f"batch {batch:2} {one.kind:28} {one.tokens_per_s:8.0f} tokens/s  x{middle:.2f} ({low:.2f}-{high:.2f})"
                f"  drafted {one.drafted_per_token:.2f} per token, {kept:4.0%} kept",
                flush=True,
            )


if __name__ == "__main__":
    main()
