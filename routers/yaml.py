"""A strict YAML reader: plain data with the line of every field, and a problem for everything that hides a surprise.

It reads mappings, lists, strings, whole numbers, decimals and true/false, in the YAML 1.2 sense: `off`, `no` and
`12:30` are strings. It refuses what a policy never needs and what has misled people elsewhere: keys given twice,
empty values, anchors and aliases (with them the "billion laughs" files), tags, several documents in one file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from routers.errors import PolicyError, Problem

Path = tuple[str | int, ...]

MAX_CHARACTERS = 262_144
MAX_DEPTH = 12
MAX_NODES = 20_000

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}\Z")
_DECIMAL = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_NULL = {"", "~", "null", "Null", "NULL"}
_SECRET = re.compile(r"(?:sk|pk|rk|gsk|xai|ghp|gho|ghs|glpat|hf|pat|xox[a-z]|whsec)[-_]\w|AKIA|AIza|eyJ|Bearer ", re.I)


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and where it says it."""

    file: str
    data: dict[str, object]
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of a field, or of its nearest parent that was written."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def at(self, path: Path) -> object:
        """The value at a path, or None where nothing is written."""
        node: object = self.data
        for step in path:
            if isinstance(node, dict):
                node = node.get(step)
            elif isinstance(node, list) and isinstance(step, int) and step < len(node):
                node = node[step]
            elif not (isinstance(node, str) and step == 0):  # a list of one may be written without its brackets
                return None
        return node

    def report(self, path: Path, message: str, fix: str, *, show: bool = True) -> None:
        """Note a problem. `show=False` keeps the value out of the message."""
        value = self.at(path)
        shown = _shown(value) if show and isinstance(value, (str, int, float, bool)) else None
        self.problems.append(Problem(self.file, self.line(path), written(path), message, fix, shown))


def read(text: str, file: str) -> Document:
    """The content of a policy file, with its problems noted. Raises PolicyError where it cannot be read to its end."""
    document = Document(file, {})
    if len(text) > MAX_CHARACTERS:
        document.report((), f"the file has more than {MAX_CHARACTERS} characters", "split the policy, or shorten it")
        raise PolicyError(document.problems)
    try:
        _Reader(document, text).run()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, message, fix = mark.line + 1 if mark else 1, f"not YAML: {error.problem}", "correct the YAML on this line"
        if isinstance(error, yaml.scanner.ScannerError):
            fix += '; a value that starts with >, *, &, % or @ needs quotes, such as ">= 0.90"'
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message, fix = "a character that YAML does not allow", "remove the control character on this line"
    else:
        return document
    _stop(document, line, (), message, fix)  # not inside `except`: PyYAML's error quotes the file, secrets and all


def written(path: Path) -> str:
    """A path as people write it: `routes[1].when.tag`."""
    parts = [f"[{step}]" if isinstance(step, int) else f".{concealed(step)}" for step in path]
    return "".join(parts).removeprefix(".")


def concealed(text: str) -> str:
    """The text, or a placeholder where it looks like a credential."""
    return "(not shown)" if _SECRET.match(text) else text


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    text = concealed(text)
    return f"`{text[:80]}…`" if len(text) > 80 else f"`{text}`"


def _stop(document: Document, line: int, path: Path, message: str, fix: str) -> NoReturn:
    document.problems.append(Problem(document.file, line, written(path), message, fix))
    raise PolicyError(document.problems)


class _Reader:
    """Walks the parser's events, so that a hostile file is refused before it is built."""

    def __init__(self, document: Document, text: str) -> None:
        self._document = document
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._nodes = 0

    def run(self) -> None:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            _stop(self._document, 1, (), "the file is empty", "start with `version: 1`")
        first = self._next((), 0)
        value = self._value(first, (), 0)
        next(self._events)  # the document's end
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            _stop(self._document, _line(after), (), "a second document starts here", "keep one policy per file")
        if not isinstance(value, dict):
            _stop(self._document, _line(first), (), "a policy is a mapping", "start with `version: 1`")
        self._document.data.update(value)

    def _next(self, path: Path, depth: int) -> yaml.Event:
        event = next(self._events)
        self._nodes += 1
        line = _line(event)
        if self._nodes > MAX_NODES:
            _stop(self._document, line, path, f"the file has more than {MAX_NODES} values", "shorten the policy")
        if depth > MAX_DEPTH:
            _stop(self._document, line, path, f"nested deeper than {MAX_DEPTH} levels", "flatten this part")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            _stop(
                self._document, line, path, "anchors and aliases are not read", "write the value out where it is used"
            )
        if getattr(event, "tag", None) not in (None, "!"):
            _stop(self._document, line, path, "tags are not read", "remove the tag (the word that starts with `!`)")
        return event

    def _value(self, event: yaml.Event, path: Path, depth: int) -> object:
        self._document.lines.setdefault(path, _line(event))
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, depth + 1)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path, depth + 1)
        assert isinstance(event, yaml.ScalarEvent)
        return _scalar(event) if event.implicit[0] else str(event.value)

    def _mapping(self, path: Path, depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        while not isinstance(key_event := self._next(path, depth), yaml.MappingEndEvent):
            line = _line(key_event)
            if not isinstance(key_event, yaml.ScalarEvent):
                _stop(self._document, line, path, "a key must be a plain word", "write `key: value`")
            key = str(key_event.value)
            here = (*path, key)
            if key in result:
                first = self._document.lines[here]
                message = f"the key is given twice, first on line {first}"
                self._document.problems.append(
                    Problem(self._document.file, line, written(here), message, "keep one of the two")
                )
                self._value(self._next(here, depth), (*here, line), depth)  # read past it, filed under its own line
                continue
            self._document.lines[here] = line
            value = self._value(self._next(here, depth), here, depth)
            result[key] = value
            if value is None:
                self._document.report(here, "there is no value", "give a value, or remove the key")
        return result

    def _list(self, path: Path, depth: int) -> list[object]:
        result: list[object] = []
        while not isinstance(event := self._next(path, depth), yaml.SequenceEndEvent):
            here = (*path, len(result))
            value = self._value(event, here, depth)
            result.append(value)
            if value is None:
                self._document.report(here, "there is no value", "give a value, or remove the dash")
        return result


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return int(event.start_mark.line) + 1


def _scalar(event: yaml.ScalarEvent) -> object:
    text = str(event.value)
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.match(text):
        return int(text)
    return float(text) if _DECIMAL.match(text) else text
