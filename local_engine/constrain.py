"""Holding an answer to a JSON schema, a regular expression or a tool call: which tokens may come next.

The grammar work is llguidance's (why: docs/decisions.md). Here is what ties it to an engine: one `Grammars` per model,
one `GrammarConstraint` per sequence, which follows the output it is shown, forwards and back, so that speculation and
preemption need no word with it. What the model thinks before it answers is not held to the grammar.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from local_engine.chat import InvalidRequest, Tool
from local_engine.tool_calls import BEGINS, HERMES_END, ToolFormat
from local_engine.types import TextFormat

MAX_DEFINITION_CHARACTERS: Final = 100_000
_WHITE_SPACE: Final = r"[ \t\n\r]{0,24}"
"""Between the parts of a JSON text. Bounded, so that no model can fill its answer with it."""
_TAIL: Final = 4
"""Tokens at a prompt's end among which a thinking block that the template opened or closed has its marker."""

_BESIDE: Final = re.compile(
    r"\Aat \d+\(\d+\): |failed to compile JSON schema: |invalid regex .*? \(in regex\): "
    r"|\n<(?:state|non-verbose/)>.*|\n +\d+ \| .*",
    re.DOTALL,
)
"""In the library's messages: where the grammar is wrong that was made of the request, its text and its state."""
_REGEX: Final = re.compile(r"regex parse error:\s+(.*?)\s+\^[\s^~]*error: ", re.DOTALL)
_MALFORMED: Final = re.compile(r"Invalid type|Expected |Pointer |\S+ must be ")
"""How it begins to say that something is no JSON schema; anything else it only cannot hold."""


class Grammars:
    """Compiles constraints for one model's tokens. Building one takes seconds for a vocabulary of 150,000."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocabulary: int,
        end_tokens: Collection[int],
        think_tokens: tuple[int, int] | None,
        tools: ToolFormat | None,
    ) -> None:
        """`vocabulary`: the width of a row of logits. `think_tokens`: what opens and closes the thinking block."""
        self._tokenizer: LLTokenizer = from_tokenizer(
            tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=sorted(end_tokens)
        )
        self._ends = sorted(end_tokens)
        self._think_tokens = think_tokens
        self._tools = tools
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._controls = {token.content: id for id, token in added.items() if token.special}

    def formatted(self, format: TextFormat, prompt: Sequence[int]) -> "GrammarConstraint":
        """An answer of this format. Raises InvalidRequest naming the field, what is wrong and what would be right."""
        if len(format.definition) > MAX_DEFINITION_CHARACTERS:
            raise InvalidRequest(
                f"{format.field}: {len(format.definition)} characters; send at most {MAX_DEFINITION_CHARACTERS}",
                format.field,
            )
        if format.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(format.definition)
            fix = "write it in Rust's regex syntax, which has no look-around and no back-references"
        else:
            grammar = _schema_grammar(format)
            fix = "leave out or rewrite what cannot be held"
        return self._constraint(grammar, prompt, format.field, fix)

    def tool_call(self, tools: Sequence[Tool], name: str, prompt: Sequence[int]) -> "GrammarConstraint":
        """An answer that is exactly one call: of the tool `name`, of any tool where it is empty."""
        if self._tools is None:
            raise InvalidRequest(
                "tool_choice: this model's chat template knows no tool calls; leave it out or ask another model",
                "tool_choice",
            )
        chosen = {at: tool for at, tool in enumerate(tools) if name in ("", tool["function"]["name"])}
        if not chosen:
            raise InvalidRequest(f"tool_choice: no tool is named {name!r}; name one of tools", "tool_choice")
        fix = "leave out or rewrite what cannot be held"
        try:
            grammar = _call_grammar(self._tools, list(chosen.values()), self._controls)
            return self._constraint(grammar, prompt, "tools", fix)
        except InvalidRequest:
            for at, tool in chosen.items():  # which one is it?
                self._constraint(_json_grammar(_parameters(tool)), prompt, f"tools[{at}].function.parameters", fix)
            raise

    def _constraint(self, grammar: str, prompt: Sequence[int], field: str, fix: str) -> "GrammarConstraint":
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        problem = matcher.get_error() or "; ".join(matcher.get_grammar_warnings())
        if problem:
            raise InvalidRequest(f"{field}: {_reason(problem)}; {fix}", field)
        matcher.compute_bitmask()  # tells, before anything is written, where nothing can match
        if matcher.is_error():
            raise InvalidRequest(f"{field}: {_stuck(matcher)}", field)
        return GrammarConstraint(matcher, self._tokenizer.vocab_size, self._ends, self._think_tokens, prompt, field)


class GrammarConstraint:
    """One sequence's constraint, as `local_engine.sampler.Constraint`.

    The thinking block, if the prompt opened one or the model opens one as its first token, is free, but for the turn's
    end: an answer has to follow.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: int,
        end_tokens: Sequence[int],
        think_tokens: tuple[int, int] | None,
        prompt: Sequence[int],
        field: str,
    ) -> None:
        """`field`: of the request, that asked for it."""
        self._matcher = matcher
        self._field = field
        self._packed = np.zeros(-(-vocabulary // 32), dtype=np.uint32)
        self._ends = list(end_tokens)
        self._think_tokens = think_tokens
        marks = [token for token in prompt[-_TAIL:] if think_tokens is not None and token in think_tokens]
        self._open = bool(marks) and think_tokens is not None and marks[-1] == think_tokens[0]
        self._may_open = think_tokens is not None and not marks
        self._told: list[int] = []

    def mask(self, logits: torch.Tensor, output: Sequence[int]) -> None:
        """Set to -inf, in place, what may not come after `output`. After an output that breaks the grammar: nothing."""
        answer = self._answer(output)
        if answer is None:
            logits[self._ends] = -torch.inf
            return
        if not self._follow(answer):
            return
        self._matcher.unsafe_compute_mask_ptr(self._packed.ctypes.data, self._packed.nbytes)
        bits = np.unpackbits(self._packed.view(np.uint8), count=logits.numel(), bitorder="little")
        if self._may_open and not output and self._think_tokens is not None:
            bits[self._think_tokens[0]] = 1
        logits.masked_fill_(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)

    def done(self, output: Sequence[int]) -> bool:
        """Whether nothing but the end may come after `output`.

        Raises InvalidRequest when the grammar became too complex to go on with: then `mask` leaves only the end.
        """
        answer = self._answer(output)
        allowed = answer is not None and self._follow(answer)
        if self._matcher.is_error():
            raise InvalidRequest(f"{self._field}: {_stuck(self._matcher)}", self._field)
        return allowed and self._matcher.is_stopped()

    def _answer(self, output: Sequence[int]) -> list[int] | None:
        """The output after its thinking block; None inside it."""
        if self._think_tokens is not None:
            begin, end = self._think_tokens
            if self._open or (self._may_open and output and output[0] == begin):
                return list(output[output.index(end) + 1 :]) if end in output else None
        return list(output)

    def _follow(self, answer: list[int]) -> bool:
        """Bring the matcher to the end of `answer`; whether the grammar allows all of it."""
        told = self._told
        if answer[: len(told)] != told:
            kept = next((at for at, (a, b) in enumerate(zip(answer, told, strict=False)) if a != b), len(answer))
            self._matcher.rollback(len(told) - kept)
            del told[kept:]
        rest = answer[len(told) :]
        taken = self._matcher.try_consume_tokens(rest) if rest else 0
        told += rest[:taken]
        return taken == len(rest)


def _schema_grammar(format: TextFormat) -> str:
    if format.kind == "json_object":
        schema: Any = {"type": "object"}
    else:
        try:
            schema = json.loads(format.definition)
        except ValueError as error:
            raise InvalidRequest(f"{format.field}: no JSON ({error}); send a JSON schema", format.field) from error
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{format.field}: {_brief(format.definition)} is no object", format.field)
    return _json_grammar(schema)


def _json_grammar(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """`lenient`: what cannot be held is left out of it."""
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    )


def check_schemas(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequest for parameters that are no JSON schema, whether or not a call will be held to them."""
    for at, tool in enumerate(tools):
        problem = _what_is_malformed(json.dumps(_parameters(tool)))
        if problem:
            field = f"tools[{at}].function.parameters"
            raise InvalidRequest(f"{field}: {_reason(problem)}; correct the JSON schema", field)


@lru_cache(maxsize=1024)
def _what_is_malformed(schema: str) -> str:
    """In the library's words, of a text of JSON; empty: nothing. Agents send the same tools with every turn."""
    problem: str = LLMatcher.validate_grammar(_json_grammar(json.loads(schema), lenient=True))
    return problem if _MALFORMED.match(problem) else ""


def _parameters(tool: Tool) -> dict[str, Any]:
    schema: dict[str, Any] = tool["function"].get("parameters") or {"type": "object"}
    return schema


def _call_grammar(format: ToolFormat, tools: Sequence[Tool], controls: Mapping[str, int]) -> str:
    """llguidance's Lark. `controls`: the vocabulary's control tokens, which no text stands for."""
    key = "parameters" if format == "llama" else "arguments"
    rules = []
    for at, tool in enumerate(tools):
        function = tool["function"]
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                key: _moved(_parameters(tool), f"#/properties/{key}"),
            },
            "required": ["name", key],
            "additionalProperties": False,
            "x-guidance": {"whitespace_pattern": _WHITE_SPACE},
        }
        rules.append(f"tool{at}: %json {json.dumps(schema)}")
    starts: dict[ToolFormat, list[str | None]] = {
        "hermes": [BEGINS["hermes"], "\n", None, "\n", HERMES_END],
        "llama": [None],
        "mistral": [BEGINS["mistral"], "[", None, "]"],
    }
    parts = ["call" if part is None else f"<[{controls[part]}]>" if part in controls else json.dumps(part)
             for part in starts[format]]  # fmt: skip
    return "\n".join(
        ["start: " + " ".join(parts), "call: " + " | ".join(f"tool{at}" for at in range(len(tools))), *rules]
    )


def _moved(schema: Any, root: str) -> Any:
    """The schema, with its references to its own root led to where it stands now."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:] if name == "$ref" and str(value).startswith("#") else _moved(value, root)
        for name, value in schema.items()
    }


def _stuck(matcher: LLMatcher) -> str:
    """Why a grammar that could be read leads no further."""
    problem = _reason(matcher.get_error())
    if problem.startswith("NoExtension"):
        return "nothing can match it; correct it"
    return f"too complex for this text ({problem}); simplify it"


def _reason(problem: str) -> str:
    """What the library says is wrong, without the grammar that was made of the request, and where in that."""
    return _brief(_REGEX.sub(lambda found: f'"{found[1][:100]}": ', _BESIDE.sub("", problem)))


def _brief(text: str) -> str:
    """On one line of bounded length."""
    return re.sub(r"\s+", " ", text).strip()[:300]
