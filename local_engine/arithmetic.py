"""Graded arithmetic problems, as a person would type them: what the bundled models are trained and judged on.

Everything is a function of the seed. Training and evaluation never share a question: each question belongs to one of
the two by a hash of its text. No torch here, so demos and tests can ask for problems cheaply.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

from local_engine.arithmetic_steps import Operation, Operator, Result, Step, work_out
from local_engine.arithmetic_words import other_prompt, word_text

__all__ = ["LEVELS", "REFUSAL", "VERDICT_CUE", "Problem", "other_prompt", "problem_stream", "problems", "split_of"]

Split = Literal["train", "eval"]
LEVELS = (1, 2, 3, 4, 5, 6)
"""Harder by more operations and longer numbers; 5 and 6 leave room for a stronger model."""
REFUSAL = "I am a tiny arithmetic model; I can only add, subtract, multiply and take remainders."
VERDICT_CUE = "Rate this step 0-9:"
"""Appended after a step of the working, makes `bundled/base` rate it: the next token is a digit, 9 for right."""
_EVAL_SHARE = 10  # one question in this many is held out
_WORD_SHARE = 1 / 3
_OPERATIONS = {1: (1, 1), 2: (2, 2), 3: (3, 3), 4: (4, 5), 5: (6, 7), 6: (8, 10)}
_LARGEST = {1: 999, 2: 999, 3: 9999, 4: 9999, 5: 9999, 6: 9999}
_BRACKETED = ("bracket", "bracket", "bracket_times", "mod")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: int
    level: int
    operations: tuple[Operation, ...]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        return work_out(self.operations)

    @property
    def carries(self) -> int:
        """How hard its numbers are, whatever its length."""
        return sum(step.carries for step in self.steps)


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
        made = _word_problem(rng, level) if rng.random() < _WORD_SHARE else _expression(rng, level)
        if made is None:
            continue
        question, operations = made
        values = [step.value for step in work_out(operations)]
        small = all(value <= _LARGEST[level] for value in values) and all(value >= 0 for value in values[:-1])
        # A negative answer is possible, as people ask for it, but rare where it would be hard.
        usual = values[-1] >= 0 or (level == 1 and values[-1] > -100) or rng.random() < 0.2
        if small and usual and split_of(question) == split:
            yield Problem(question, values[-1], level, operations)


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


class _Sheet:
    """Operations in the order in which a reader meets them, term by term from the left."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def add(self, operator: Operator, left: int | Result, right: int | Result) -> Result:
        self.operations.append(Operation(operator, left, right))
        return Result(len(self.operations) - 1)


def _expression(rng: random.Random, level: int) -> tuple[str, tuple[Operation, ...]] | None:
    wanted = rng.randint(*_OPERATIONS[level])
    sheet = _Sheet()
    symbols = _symbols(rng)
    written, total = _term(rng, sheet, level, wanted, symbols, first=True)
    while len(sheet.operations) < wanted:
        sign: Operator = rng.choice(("+", "-"))
        text, value = _term(rng, sheet, level, wanted - len(sheet.operations) - 1, symbols, first=False)
        total = sheet.add(sign, total, value)
        written += symbols[sign] + text
    if len(sheet.operations) != wanted:
        return None
    return rng.choice(_FRAMES).format(e=written), tuple(sheet.operations)


def _term(
    rng: random.Random, sheet: _Sheet, level: int, room: int, symbols: dict[str, str], *, first: bool
) -> tuple[str, int | Result]:
    """One term of at most `room` operations, its operations on the sheet: what is written, and its value."""
    kind = "number"
    if room >= 1 and rng.random() < 0.45:
        kind = rng.choice(_BRACKETED) if level >= 2 and rng.random() < 0.3 else "product"
    if kind == "product":
        a, b = _factors(rng, level)
        return f"{a}{symbols['*']}{b}", sheet.add("*", a, b)
    if kind == "mod":
        a, b = rng.randint(20, 999 if level >= 3 else 99), rng.randint(3, 9)
        alone = first and room == 1
        return f"{a} mod {b}" if alone else f"({a} mod {b})", sheet.add("mod", a, b)
    if kind == "bracket":
        return _bracket(rng, sheet, level, symbols)
    if kind == "bracket_times" and room >= 2:
        text, inner = _bracket(rng, sheet, min(level, 2), symbols)
        factor = rng.randint(2, 9)
        return f"{text}{symbols['*']}{factor}", sheet.add("*", inner, factor)
    number = _number(rng, level)
    return str(number), number


def _bracket(rng: random.Random, sheet: _Sheet, level: int, symbols: dict[str, str]) -> tuple[str, Result]:
    a, b = sorted((_number(rng, level), _number(rng, level)), reverse=True)
    sign: Operator = rng.choice(("+", "-"))
    return f"({a}{symbols[sign]}{b})", sheet.add(sign, a, b)


def _number(rng: random.Random, level: int) -> int:
    """Two digits mostly, then three, and four from level 3 on; every level knows the small ones."""
    draw = rng.random()
    if draw < 0.2:
        return rng.randint(1, 20)
    if draw < (0.75 if level <= 2 else 0.5):
        return rng.randint(2, 99)
    return rng.randint(100, 999) if level <= 2 or draw < 0.9 else rng.randint(1000, 5000)


def _factors(rng: random.Random, level: int) -> tuple[int, int]:
    if level >= 3 and rng.random() < 0.25:
        return rng.randint(11, 99), rng.randint(11, 99)
    a, b = rng.randint(2, 30) if rng.random() < 0.5 else rng.randint(2, 99), rng.randint(2, 9)
    return (a, b) if rng.random() < 0.85 else (b, a)


def _symbols(rng: random.Random) -> dict[str, str]:
    style = rng.random()
    if style < 0.12:
        return _WORDS
    times = rng.choice(("*", "*", "*", "×", "x"))
    space = "" if style < 0.4 else " "
    return {operator: f"{space}{times if operator == '*' else operator}{space}" for operator in "+-*"}


# ---- word problems --------------------------------------------------------------------------------------------------


def _word_problem(rng: random.Random, level: int) -> tuple[str, tuple[Operation, ...]] | None:
    wanted = rng.randint(*_OPERATIONS[level])
    sheet = _Sheet()
    events: list[tuple[str, int, int]] = []
    total: int | Result
    if rng.random() < 0.3:
        x, y = rng.randint(2, 9), rng.randint(2, 40)
        if level >= 3 and rng.random() < 0.4:
            x, y = rng.randint(11, 40), rng.randint(11, 60)
        start = ("product", x, y)
        total, value = sheet.add("*", x, y), x * y
    else:
        value = total = _number(rng, level)
        start = ("start", value, 0)
    while len(sheet.operations) < wanted:
        last = len(sheet.operations) == wanted - 1
        kind = rng.choice(("gain", "gain", "gain", "loss", "loss", "loss", "multiple", "boxes_in", "left_over"))
        if kind == "left_over" and (not last or not 20 <= value <= 999 or level == 1):
            continue
        if kind == "boxes_in":
            if wanted - len(sheet.operations) < 2:
                continue
            x, y = rng.randint(2, 9), rng.randint(2, 40)
            product = sheet.add("*", x, y)
            total, value = sheet.add("+", total, product), value + x * y
        elif kind == "left_over":
            x, y = rng.randint(3, 9), 0
            total, value = sheet.add("mod", total, x), value % x
        elif kind == "multiple":
            x, y = rng.randint(2, 5), 0
            total, value = sheet.add("*", total, x), value * x
        else:
            x, y = _number(rng, level), 0
            total = sheet.add("+" if kind == "gain" else "-", total, x)
            value += x if kind == "gain" else -x
        if not 0 <= value <= _LARGEST[level]:
            return None
        events.append((kind, x, y))
    return word_text(rng, start, events), tuple(sheet.operations)
