"""The working of an arithmetic problem: operations, the lines that show them, and how hard each is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Operator = Literal["+", "-", "*", "mod"]


@dataclass(frozen=True, slots=True)
class Result:
    """What an earlier operation gave."""

    of: int


@dataclass(frozen=True, slots=True)
class Operation:
    operator: Operator
    left: int | Result
    right: int | Result


@dataclass(frozen=True, slots=True)
class Step:
    """One operation with its numbers filled in. `value` may be wrong where somebody slipped."""

    left: int
    operator: Operator
    right: int
    value: int

    @property
    def short(self) -> str:
        """One line, as it is thought at first, e.g. "347 + 285 = 632". All parts of the line are equal."""
        return " = ".join((self._asked, *self._needed_parts(), str(self.value)))

    @property
    def long(self) -> str:
        """The same in smaller parts, as it is checked, e.g. "347 + 285 = 547 + 85 = 627 + 5 = 632"."""
        return " = ".join((self._asked, *self._careful_parts(), str(self.value)))

    @property
    def carries(self) -> int:
        """Carries, borrows and reductions of the written method: what makes the step hard at a given length."""
        a, b = self.left, self.right
        if self.operator == "+":
            return _carries(a, b)
        if self.operator == "-":
            return _carries(max(a, b) - min(a, b), min(a, b))
        if self.operator == "mod":
            return max(1, len(str(a)) - 1)
        rows = [a * digit * 10**place for place, digit in _places(b)]
        inner = sum(x * digit >= 10 for _, digit in _places(b) for _, x in _places(a))
        return inner + sum(_carries(sum(rows[:at]), row) for at, row in enumerate(rows) if at)

    @property
    def _asked(self) -> str:
        return f"{self.left} {self.operator} {self.right}"

    def _needed_parts(self) -> tuple[str, ...]:
        """What nobody does in the head: products of two numbers over 10, remainders of three digits."""
        if self.operator == "mod":
            return self._reductions()
        if self.operator == "*" and self.left >= 10 and len(_places(self.right)) > 1:
            return (" + ".join(str(self.left * digit * 10**place) for place, digit in _places(self.right)),)
        return ()

    def _careful_parts(self) -> tuple[str, ...]:
        if self.operator == "mod" or self.left < 10:
            return self._needed_parts()
        if self.operator == "*":
            if len(_places(self.right)) > 1:
                rows = " + ".join(f"{self.left} * {digit * 10**place}" for place, digit in _places(self.right))
                return (rows, *self._needed_parts())
            return self._folded([digit * 10**place * self.right for place, digit in _places(self.left)])
        if self.right < 10 or (self.operator == "-" and self.right > self.left):
            return ()
        parts = [digit * 10**place for place, digit in _places(self.right)]
        total, sign, lines = self.left, 1 if self.operator == "+" else -1, []
        for at, part in enumerate(parts[:-1]):
            total += sign * part
            lines.append(f"{total} {self.operator} {sum(parts[at + 1 :])}")
        return tuple(lines)

    def _folded(self, parts: list[int]) -> tuple[str, ...]:
        lines = []
        while len(parts) > 1:
            lines.append(" + ".join(map(str, parts)))
            parts = [parts[0] + parts[1], *parts[2:]]
        return tuple(lines)

    def _reductions(self) -> tuple[str, ...]:
        """The leading digits, one more than the divisor has, give way to their remainder until no more are left."""
        number, lines, width = self.left, [], len(str(self.right)) + 1
        while len(str(number)) > width:
            zeros = 10 ** (len(str(number)) - width)
            number = number // zeros % self.right * zeros + number % zeros
            lines.append(f"{number} mod {self.right}")
        return tuple(lines)


def work_out(operations: Sequence[Operation], slips: Mapping[int, int] | None = None) -> tuple[Step, ...]:
    """The steps in order. `slips` adds an error to the value of a step; later steps go on from the wrong value."""
    steps: list[Step] = []
    for at, operation in enumerate(operations):
        left, right = (
            steps[operand.of].value if isinstance(operand, Result) else operand
            for operand in (operation.left, operation.right)
        )
        value = _value(left, operation.operator, right) + (slips or {}).get(at, 0)
        steps.append(Step(left, operation.operator, right, value))
    return tuple(steps)


def _value(left: int, operator: Operator, right: int) -> int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left % right


def _places(number: int) -> list[tuple[int, int]]:
    """(place, digit) from the highest place down, zeros left out."""
    digits = str(number)
    return [(len(digits) - 1 - at, int(digit)) for at, digit in enumerate(digits) if digit != "0"]


def _carries(a: int, b: int) -> int:
    count = carry = 0
    while a or b:
        carry = int(a % 10 + b % 10 + carry >= 10)
        count += carry
        a, b = a // 10, b // 10
    return count
