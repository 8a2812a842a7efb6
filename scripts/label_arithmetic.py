"""What `bundled/base` gets right: `python scripts/label_arithmetic.py OUT.parquet`, a table for `leadline probe fit`.

Held-out problems of every level, answered greedily at low effort by the engine itself; columns prompt, level, correct
(the last number is right) and tokens (of the answer, thinking included). With `--beside`, questions that are no sums
too: a probe that has never met one takes it for an easy sum.
"""

import argparse
import json
import queue
import re
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer

from local_engine.arithmetic import LEVELS, problems
from local_engine.config import locate
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
    parser.add_argument(
        "--beside", type=Path, help="answers.parquet that scripts/fit_default_probe.py --cache has kept"
    )
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
    if args.beside is not None:
        table = pd.concat([table, others(pd.read_parquet(args.beside))], ignore_index=True)
    table.to_parquet(args.out)
    print(table.groupby("level")["correct"].mean().to_string())


def others(said: pd.DataFrame) -> pd.DataFrame:
    """What base was asked that is no sum, and answered wrongly or refused; as much of it as base reads."""
    asked = said[said["local"].notna() & (said["source"] != "arithmetic")].drop_duplicates("prompt")
    tokenizer = AutoTokenizer.from_pretrained(locate("bundled/base")[0])
    asked = asked[[len(tokenizer(prompt)["input_ids"]) <= 1000 for prompt in asked["prompt"]]]
    return pd.DataFrame({"prompt": asked["prompt"], "level": asked["source"], "correct": asked["local"]})


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
