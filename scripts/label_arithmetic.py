"""What `bundled/base` gets right: `python scripts/label_arithmetic.py OUT.parquet`, a table for `leadline probe fit`.

Held-out problems of every level, answered greedily at low effort by the engine itself; columns prompt, level, correct
(the last number is right) and tokens (of the answer, thinking included).
"""

import argparse
import json
import queue
import re
from pathlib import Path

import pandas as pd
import torch

from local_engine.arithmetic import LEVELS, problems
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.types import Delta, Event, Failed, Finished, Generate, SamplingParams

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
GREEDY = SamplingParams(temperature=0, max_tokens=400, effort="low")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-level", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn = [problem for level in LEVELS for problem in problems(args.seed, level, args.per_level)]
    texts, tokens = answers([problem.question for problem in drawn])
    found = [NUMBER.findall(text) for text in texts]
    table = pd.DataFrame(
        {
            "prompt": [problem.question for problem in drawn],
            "level": [f"level {problem.level}" for problem in drawn],
            "correct": [
                float(bool(numbers) and float(numbers[-1].replace(",", "")) == problem.answer)
                for numbers, problem in zip(found, drawn, strict=True)
            ],
            "tokens": tokens,
        }
    )
    table.to_parquet(args.out)
    print(table.groupby("level")["correct"].mean().to_string())


def answers(questions: list[str]) -> tuple[list[str], list[int]]:
    """(what is said after the thought, tokens written) of each question."""
    engine = Engine({"base": load_model("base", "bundled/base", "float32", "cpu")}, max_running=32)
    engine.start()
    arrived: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(arrived.put)
    texts, tokens, left = [""] * len(questions), [0] * len(questions), len(questions)
    for at, question in enumerate(questions):
        messages = json.dumps([{"role": "user", "content": question}]).encode()
        link.submit(Generate(at, "base", messages, GREEDY))
    while left:
        for event in arrived.get():
            if isinstance(event, Delta):
                texts[event.id] += event.content
            elif isinstance(event, Finished):
                tokens[event.id], left = event.output_tokens, left - 1
            elif isinstance(event, Failed):
                raise RuntimeError(f"question {event.id}: {event.message}")
    engine.stop()
    return texts, tokens


if __name__ == "__main__":
    main()
