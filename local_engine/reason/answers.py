"""When do two answers say the same? By what they come to, not by their words. No torch here."""

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation

_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANY_SIZE = Context(Emax=MAX_EMAX, Emin=MIN_EMIN)
"""For numbers such as 1e9999999, which overflow the usual one."""
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def answer_class(text: str) -> str:
    """What an answer comes to: what it boxes, else its last number, else its words; "" where it says nothing.

    Answers of one class agree. For tasks with short answers this is the clustering by meaning that semantic entropy
    (Kuhn et al. 2023, arXiv 2302.09664) needs a model of entailment for.
    """
    boxes = boxed(text)
    said = boxes[-1] if boxes else text
    number = last_number(said)
    return number if number is not None else " ".join(said.casefold().split()).strip(" .!")


def boxed(text: str) -> list[str]:
    r"""What stands in each `\boxed{…}`, one pair of braces deep."""
    found: list[str] = _BOXED.findall(text)
    return found


def last_number(text: str) -> str | None:
    """The last number in it, written one way only; None where there is none."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        value = Decimal(numbers[-1].replace(",", ""))
    except InvalidOperation:
        return None
    if value.adjusted() < 18 and value == value.to_integral_value():
        return str(int(value))
    return str(value.normalize(_ANY_SIZE))
