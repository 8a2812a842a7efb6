"""Graded arithmetic problems, as a person would type them: what the bundled models are trained and judged on.

Everything is a function of the seed. Training and evaluation never share a question: each question belongs to one of
the two by a hash of its text. No torch here, so demos and tests can ask for problems cheaply.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Split = Literal["train", "eval"]
LEVELS = (1, 2, 3, 4)
"""A problem's level is its number of operations."""
REFUSAL = "I am a tiny arithmetic model; I can only add, subtract and multiply."
_EVAL_SHARE = 10  # one question in this many is held out
_MAX_VALUE = 999


@dataclass(frozen=True, slots=True)
class Problem:
    question: str
    answer: int
    level: int
    n_ops: int
    steps: tuple[str, ...]
    """The working, one operation per line, e.g. ("48 * 2 = 96", "23 + 96 = 119")."""


def problems(seed: int, level: int, n: int, split: Split = "eval") -> list[Problem]:
    """`n` different problems of one level. The default split is the one no bundled model was trained on."""
    seen: set[str] = set()
    fresh = (p for p in problem_stream(random.Random(f"{seed}/{level}/{split}"), level, split) if not _seen(p, seen))
    return list(islice(fresh, n))


def problem_stream(rng: random.Random, level: int, split: Split) -> Iterator[Problem]:
    """Endless problems of one level; repeats are possible."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, not {level!r}")
    while True:
        problem = _word_problem(rng, level) if rng.random() < 0.35 else _expression(rng, level)
        if problem is not None and split_of(problem.question) == split:
            yield problem


def other_prompt(rng: random.Random) -> str:
    """A prompt that is not arithmetic, or arithmetic beyond the model: the right answer is REFUSAL."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return rng.choice(_OTHER).format(
        thing=rng.choice(_TOPICS),
        place=rng.choice(_PLACES),
        name=rng.choice(_NAMES),
        year=rng.randint(1500, 2030),
        a=a,
        b=b,
    )


def split_of(question: str) -> Split:
    """Which side of the fence a question lies on; stable across processes and versions of Python."""
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_SHARE == 0 else "train"


def _seen(problem: Problem, seen: set[str]) -> bool:
    known = problem.question in seen
    seen.add(problem.question)
    return known


# ---- expressions ----------------------------------------------------------------------------------------------------

_FRAMES = (
    "What is {e}?",
    "What is {e}?",
    "What's {e}?",
    "what is {e}",
    "Compute {e}",
    "Compute {e}.",
    "Calculate {e}.",
    "calculate {e}",
    "How much is {e}?",
    "{e}",
    "{e} =",
    "{e} = ?",
    "{e}=?",
    "{e}?",
    "Please work out {e}.",
    "Solve {e}",
    "Can you tell me what {e} is?",
    "Evaluate: {e}",
)
_WORDS = {"+": " plus ", "-": " minus ", "*": " times "}


def _expression(rng: random.Random, level: int) -> Problem | None:
    ops = [rng.choice("++--*") for _ in range(level)]
    values = [_operand(rng, i, ops) for i in range(level + 1)]
    worked = _work_out(values, ops)
    if worked is None:
        return None
    steps, answer = worked
    return Problem(rng.choice(_FRAMES).format(e=_written(rng, values, ops)), answer, level, level, steps)


def _operand(rng: random.Random, index: int, ops: list[str]) -> int:
    if index > 0 and ops[index - 1] == "*":
        return rng.randint(2, 9)
    if index < len(ops) and ops[index] == "*":
        return rng.randint(2, 30) if rng.random() < 0.75 else rng.randint(2, 99)
    if index == 0 and rng.random() < 0.2:
        return rng.randint(100, 900)
    return rng.randint(1, 20) if rng.random() < 0.25 else rng.randint(1, 99)


def _work_out(values: list[int], ops: list[str]) -> tuple[tuple[str, ...], int] | None:
    """Products first, then left to right; None when a value leaves 0..999 (the last difference may be negative)."""
    values, ops = list(values), list(ops)
    steps: list[str] = []
    while ops:
        at = ops.index("*") if "*" in ops else 0
        a, op, b = values[at], ops.pop(at), values.pop(at + 1)
        values[at] = a * b if op == "*" else a + b if op == "+" else a - b
        if abs(values[at]) > _MAX_VALUE or (values[at] < 0 and ops):
            return None
        steps.append(f"{a} {op} {b} = {values[at]}")
    return tuple(steps), values[0]


def _written(rng: random.Random, values: list[int], ops: list[str]) -> str:
    style = rng.random()
    if style < 0.12:
        symbols = _WORDS
    else:
        times = rng.choice(("*", "*", "*", "×", "x"))
        space = "" if style < 0.4 else " "
        symbols = {op: f"{space}{times if op == '*' else op}{space}" for op in "+-*"}
    return str(values[0]) + "".join(symbols[op] + str(value) for op, value in zip(ops, values[1:], strict=True))


# ---- word problems --------------------------------------------------------------------------------------------------

_NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Maria", "Leo", "Nina", "Omar", "Eva")
_THINGS = ("apples", "books", "coins", "pens", "cards", "stamps", "marbles", "cookies", "shells", "stickers")
_BAGS = ("boxes", "bags", "packs", "jars")
_STARTS = (
    "{name} has {x} {things}.",
    "{name} starts with {x} {things}.",
    "There are {x} {things} on the table.",
    "A shop has {x} {things}.",
)
_PRODUCT_STARTS = (
    "{name} has {x} {bags} with {y} {things} each.",
    "There are {x} {bags} of {y} {things}.",
    "{name} buys {x} {bags} of {things}, {y} in each.",
)
_GAINS = ("Then {x} more arrive.", "{name} buys {x} more.", "{name} finds {x} more.", "A friend adds {x} more.")
_LOSSES = ("{name} gives away {x}.", "{name} loses {x}.", "Then {x} are sold.", "{x} of them break.")
_MULTIPLES = ("Then the number grows {x} times.", "Now there are {x} times as many.")
_ASKS = ("How many {things} are there now?", "How many {things} are left?", "How many {things} is that in the end?")


def _word_problem(rng: random.Random, level: int) -> Problem | None:
    words = {"name": rng.choice(_NAMES), "things": rng.choice(_THINGS), "bags": rng.choice(_BAGS)}
    steps: list[str] = []
    if rng.random() < 0.3:
        x, y = rng.randint(2, 9), rng.randint(2, 30)
        text = [rng.choice(_PRODUCT_STARTS).format(x=x, y=y, **words)]
        total = x * y
        steps.append(f"{x} * {y} = {total}")
    else:
        total = rng.randint(2, 99)
        text = [rng.choice(_STARTS).format(x=total, **words)]
    while len(steps) < level:
        op = rng.choice("+++---*")
        x = rng.randint(2, 5) if op == "*" else rng.randint(1, 99)
        result = total * x if op == "*" else total + x if op == "+" else total - x
        if not 0 <= result <= _MAX_VALUE:
            return None
        event = rng.choice({"+": _GAINS, "-": _LOSSES, "*": _MULTIPLES}[op])
        text.append(event.format(x=x, **words))
        steps.append(f"{total} {op} {x} = {result}")
        total = result
    text.append(rng.choice(_ASKS).format(**words))
    return Problem(" ".join(text), total, level, level, tuple(steps))


# ---- everything else ------------------------------------------------------------------------------------------------

_TOPICS = (
    "the sea",
    "cats",
    "a black hole",
    "music",
    "bread",
    "rain",
    "history",
    "a car",
    "love",
    "recursion",
    "trees",
)
_PLACES = ("France", "Japan", "Peru", "Egypt", "Norway", "Kenya", "India", "Canada", "Italy", "Spain")
_OTHER = (
    "Hello",
    "hi",
    "Hi there!",
    "Hello, how are you?",
    "Good morning",
    "Thanks!",
    "Who are you?",
    "What can you do?",
    "What is the capital of {place}?",
    "What is the population of {place}?",
    "Where is {place}?",
    "Who is {name}?",
    "What is {thing}?",
    "What happened in {year}?",
    "Who won the election in {year}?",
    "Tell me about {thing}.",
    "Tell me a joke about {thing}.",
    "Write a poem about {thing}.",
    "Write a short story about {name} and {thing}.",
    "Write a Python function that sorts a list.",
    "Explain {thing} to a child.",
    "Explain how {thing} works.",
    "Summarise this text: {name} went to {place} in {year} to see {thing}.",
    "Translate '{thing}' into French.",
    "Is {thing} older than {name}?",
    "Fix this code: for i in range({a}): print(i)",
    "What is {a} / {b}?",
    "Divide {a} by {b}.",
    "What is {a} divided by {b}?",
    "What is the square root of {a}?",
    "What is {a}% of {b}?",
    "Is {a} a prime number?",
    "Solve x + {a} = {b} for x.",
    "Prove that {thing} is infinite.",
    "Give me {a} ideas for a birthday party.",
    "What is the weather in {place} today?",
    "Why do people like {thing}?",
    "Plan a trip to {place} for {b} days.",
)
