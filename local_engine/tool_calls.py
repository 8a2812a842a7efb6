"""Tool calls out of generated text, in the formats that models are trained to write.

- `hermes` (Hermes, Qwen): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number, after any text
- `llama` (Llama 3): the whole answer is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; more
  follow after `;`
- `mistral`: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, after any text

Which one a model writes is read from its chat template. A call is told as soon as its name is known, and its arguments
as they come. What begins like a call and is none is content, to the letter.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from local_engine.chat import InvalidRequest, Tool
from local_engine.types import ToolCallDelta

ToolFormat = Literal["hermes", "llama", "mistral"]
BEGINS: Final[dict[ToolFormat, str]] = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
HERMES_END: Final = "</tool_call>"
_ENDS: Final[dict[ToolFormat, str]] = {"hermes": HERMES_END, "llama": "", "mistral": "]"}
_NEXT: Final[dict[ToolFormat, str]] = {"hermes": "", "llama": ";", "mistral": ","}
MARKERS: Final = frozenset({*BEGINS.values(), HERMES_END})
"""What begins or ends a call; some vocabularies have tokens of their own for them."""

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""OpenAI's rule for a tool's name."""
_KEYS: Final = frozenset({"name", "arguments", "parameters", "type", "function", "id"})
_HEAD: Final = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_FIRST_KEY: Final = re.compile(r'\{\s*"([^"]*)"')
_BEFORE_KEY: Final = re.compile(r'\{\s*(?:"[^"]*)?')


def check_functions(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequest for tools that calls could not tell apart, and for a description that is no text."""
    named: dict[str, int] = {}
    for at, tool in enumerate(tools):
        function = tool["function"]
        name, field = function["name"], f"tools[{at}].function.name"
        if not _NAME.fullmatch(name):
            problem = f"{name[:80]!r} is no name; send 1 to 64 letters (a-z, A-Z), digits, _ and -"
            raise InvalidRequest(f"{field}: {problem}", field)
        if (first := named.setdefault(name, at)) != at:
            raise InvalidRequest(f"{field}: {name!r} is tools[{first}]'s already; give each its own", field)
        if not isinstance(description := function.get("description"), str | None):
            field = f"tools[{at}].function.description"
            raise InvalidRequest(f"{field}: {str(description)[:80]} is no text; send a string", field)


def tool_format(chat_template: str) -> ToolFormat | None:
    """How a model with this template writes tool calls; None when it knows of none."""
    if "<tool_call>" in chat_template:
        return "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<|python_tag|>" in chat_template or '"parameters": dictionary' in chat_template:
        return "llama"
    return None


@dataclass(frozen=True, slots=True)
class Told:
    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ToolCallParser:
    """Reads the text of one answer as it comes. What it tells does not depend on how the text is cut."""

    def __init__(self, format: ToolFormat) -> None:
        self._format: ToolFormat = format
        self._state: Literal["start", "text", "bracket", "call", "between"] = "start" if format == "llama" else "text"
        self._held = ""
        """Text that was not read yet."""
        self._marker = ""
        """What led to the call that is looked for, to be given back if there is none."""
        self._call: _Call | None = None
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self.calls = 0
        """Calls told of."""
        self._after_call = False
        """No text has come since the last one."""

    def push(self, text: str) -> Told:
        """What this text sets free."""
        self._held += text
        self._read()
        return self._take()

    def finish(self) -> Told:
        """What was held back; call when no more text will come. A call that was told of stays as far as it came."""
        while self._state in ("bracket", "call") and not (self._call and self._call.told):
            self._give_back()
            self._read()
        if self._state in ("start", "text") and not self._is_gap(self._held):
            self._tell(self._held)
        self._held = ""
        return self._take()

    def _read(self) -> None:
        steps = {"start": self._start, "text": self._text, "bracket": self._bracket, "call": self._read_call,
                 "between": self._between}  # fmt: skip
        while self._held and steps[self._state]():
            pass

    def _start(self) -> bool:
        """Llama: an answer that begins with an object may be a call."""
        bare = self._held.lstrip()
        if bare:
            self._state = "call" if bare[0] == "{" else "text"
        return bool(bare)

    def _text(self) -> bool:
        begin = BEGINS[self._format]
        at = self._held.find(begin)
        end = at if at >= 0 else len(self._held) - _overlap(self._held, begin)
        if self._is_gap(self._held[:end]):  # white space after a call is told only if more text follows
            if at < 0:
                return False
        else:
            self._tell(self._held[:end])
        if at < 0:
            self._held = self._held[end:]
            return False
        self._marker, self._held = begin, self._held[at + len(begin) :]
        self._state = "bracket" if self._format == "mistral" else "call"
        return True

    def _bracket(self) -> bool:
        bare = self._held.lstrip()
        if not bare:
            return False
        if bare[0] != "[":
            return self._give_back()
        self._marker += self._held[: len(self._held) - len(bare) + 1]
        self._held, self._state = bare[1:], "call"
        return True

    def _read_call(self) -> bool:
        if self._call is None:
            bare = self._held.lstrip()
            if not bare:
                return False
            if bare[0] != "{":
                return self._give_back()
            self._marker += self._held[: len(self._held) - len(bare)]
            self._call, self._held = _Call(self.calls), bare
        self._held = self._call.push(self._held)
        self._deltas += self._call.take()
        self.calls = self._call.index + self._call.told
        if self._call.refused:
            return self._give_back()
        if self._call.complete:
            self._call, self._state, self._after_call = None, "between", True
        return True

    def _between(self) -> bool:
        bare = self._held.lstrip()
        end, more = _ENDS[self._format], _NEXT[self._format]
        if not bare or (len(bare) < len(end) and end.startswith(bare)):
            return False
        if end and bare.startswith(end):
            self._held, self._state = bare[len(end) :], "text"
        elif more and bare.startswith(more):
            self._marker, self._held, self._state = more, bare[len(more) :], "call"
        else:
            self._state = "text"
        return True

    def _give_back(self) -> Literal[True]:
        """What looked like a call is none: its marker is content, and what follows is read as text."""
        self._tell(self._marker)
        self._held = (self._call.text if self._call else "") + self._held
        self._marker, self._call, self._state = "", None, "text"
        return True

    def _tell(self, text: str) -> None:
        self._content.append(text)
        self._after_call &= not text

    def _is_gap(self, text: str) -> bool:
        return self._after_call and not text.strip()

    def _take(self) -> Told:
        told = Told("".join(self._content), tuple(self._deltas))
        self._content, self._deltas = [], []
        return told


class _Call:
    """One JSON object that should be a call: found complete by its brackets, told of as early as possible."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.told = False
        self.complete = False
        self.refused = False
        """It is no call after all."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._untold: int | None = None  # where the arguments that were not told yet begin, while they come
        self._deltas: list[ToolCallDelta] = []

    def push(self, text: str) -> str:
        """Read to the object's end; what follows it."""
        for at, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                else:
                    self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
                if self._depth == 2 and not self.told:
                    self._look_for_head(self.text + text[:at])
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._tell_arguments(self.text + text[: at + 1])
                    self._untold = None
                elif self._depth == 0:
                    self.text += text[: at + 1]
                    self._end()
                    return text[at + 1 :]
        self.text += text
        self._tell_arguments(self.text)
        self.refused = self._is_foreign()
        return ""

    def take(self) -> list[ToolCallDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _look_for_head(self, text: str) -> None:
        """The name is known when the arguments begin; in another order, only when the object ends."""
        head = _HEAD.fullmatch(text)
        if head and (name := _string(head[1])):
            self._tell(name)
            self._untold = len(text)

    def _tell_arguments(self, text: str) -> None:
        if self._untold is not None and len(text) > self._untold:
            self._deltas.append(ToolCallDelta(self.index, arguments=text[self._untold :]))
            self._untold = len(text)

    def _is_foreign(self) -> bool:
        first = _FIRST_KEY.match(self.text)
        return first[1] not in _KEYS if first else not _BEFORE_KEY.fullmatch(self.text)

    def _end(self) -> None:
        """The object is complete; if nothing was told of it, all of it is told now, or it is no call."""
        self.complete = True
        if self.told:
            return
        try:
            call = msgspec.json.decode(self.text, type=dict[str, Any])
        except msgspec.DecodeError:
            call = {}
        name = call.get("name") or call.get("function")
        arguments = call.get("arguments", call.get("parameters"))
        if self._is_foreign() or not isinstance(name, str) or not isinstance(arguments, dict | str):
            self.refused = True
            return
        self._tell(name)
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        self._deltas.append(ToolCallDelta(self.index, arguments=text))

    def _tell(self, name: str) -> None:
        self.told = True
        # Nine letters and digits: what Mistral's templates accept when the call comes back.
        self._deltas.append(ToolCallDelta(self.index, id=secrets.token_hex(5)[:9], name=name))


def _string(json: str) -> str:
    """A JSON string's text; empty for what is none."""
    try:
        return msgspec.json.decode(json, type=str)
    except msgspec.DecodeError:
        return ""


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
