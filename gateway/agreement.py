"""Do two models say the same? By what their answers come to, which is compared exactly; nobody is asked for it.

An ensemble's agreement as the sign that an answer can be taken: agreement-based cascading (Kolawole et al. 2024, arXiv
2407.02348) and answer consistency (Yue et al. 2023, arXiv 2310.03094: "performance comparable to using solely the
stronger LLM but require only 40% of its cost"). To be compared, an answer must come to something: a box, a last line
`Answer: 42` or `#### 42`, JSON at its end, or else the whole text. What is left open counts as a difference: the dearer
mistake is to take two different answers for one.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from local_engine.reason.answers import boxed, last_number

_FENCE = re.compile(r"(?:\A|\n)```\w*\n((?:(?!```).)*?)\n?```\Z", re.DOTALL)
_JSON_STARTS = re.compile(r"^[{[]", re.MULTILINE)
_ODD_ESCAPE = re.compile(r'\\(?!["\\/bfnrtu])')
_LAST_LINE = re.compile(r"####|\b(?:final\s+)?answer\b\s*(?:is\b|:|=)\s*:?", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?\.?")
_ROUND = "*`$€£¥.! \t\n"
_CODE = re.compile(r"[\"'\[\]{}=_<>\\/]")
"""Where one of these stands, case and spaces may be part of what is meant."""
_WORKING = frozenset({"reasoning", "explanation", "rationale", "thought", "thoughts", "analysis", "steps", "working"})
"""Fields of a JSON answer that say how it was found, and differ where answers do not."""


def said(body: bytes) -> str | None:
    """What a whole chat answer comes to; two of them agree if these are equal. None: nothing that could be compared.

    A call of tools is its names and arguments. An answer that was cut off or filtered comes to nothing.
    """
    try:
        choice = msgspec.json.decode(body)["choices"][0]
        if choice.get("finish_reason") in ("length", "content_filter"):
            return None
        message = choice["message"]
        if calls := message.get("tool_calls"):
            told = [[call["function"]["name"], json.loads(call["function"]["arguments"])] for call in calls]
            return "tools " + _canonical(told)
        content = message.get("content")
        return final_answer(content) if isinstance(content, str) else None
    except (msgspec.DecodeError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def agreed(answers: Sequence[str | None], least: int) -> list[int]:
    """The places of the first answer that `least` of them give; empty: there is none. None agrees with nobody."""
    for answer in answers:
        same = [at for at, other in enumerate(answers) if other == answer]
        if answer is not None and len(same) >= least:
            return same
    return []


def undecided(answers: Sequence[str | None], to_come: int, least: int) -> bool:
    """Whether the answers that are still to come can change what `least` of them agree on."""
    most = Counter(answer for answer in answers if answer is not None).most_common(1)
    given = most[0][1] if most else 0
    return given < least <= given + to_come


def final_answer(text: str) -> str | None:
    """What a text comes to, written one way only; None: it says nothing."""
    text = text.rpartition("</think>")[2].strip()
    if fenced := _FENCE.search(text):
        text = fenced[1].strip()
    if text[-1:] in ("}", "]") and (value := _json(text)) is not None:
        return _of_json(value)
    if boxes := boxed(text):
        return _plain(boxes[-1]) or None
    lines = text.splitlines()
    marks = list(_LAST_LINE.finditer(lines[-1])) if lines else []
    if marks and (plain := _plain(lines[-1][marks[-1].end() :])):
        return plain
    return _plain(text) or None


def _json(text: str) -> Any:
    """What it ends in, also with what models leave in their strings: line ends, and the backslashes of formulas."""
    start = _JSON_STARTS.search(text)
    if start is None:
        return None
    text = text[start.start() :]
    for words in (text, _ODD_ESCAPE.sub(r"\\\\", text)):
        try:
            return json.loads(words, strict=False)
        except (ValueError, RecursionError):
            continue
    return None


def _of_json(value: Any) -> str | None:
    """Without its working; of one field, that field's value alone."""
    if isinstance(value, dict):
        value = {key: kept for key, kept in value.items() if key.casefold() not in _WORKING}
        if len(value) == 1:
            value = next(iter(value.values()))
    if isinstance(value, str):
        return final_answer(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _plain(str(value))
    return _canonical(value) if value not in ({}, [], None) else None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(text: str) -> str:
    """Without emphasis, money signs and the full stop; words without case; a number in one spelling."""
    plain = text.replace("**", "").strip(_ROUND)
    if _CODE.search(plain) is None:
        plain = " ".join(plain.casefold().split())
    if len(plain) > 2 and plain[0] == "(" and plain[-1] == ")" and "(" not in plain[1:]:
        plain = plain[1:-1].strip()
    number = last_number(plain) if _NUMBER.fullmatch(plain) else None
    return plain if number is None else number
