"""Whatever the model wants, what it writes is of the format; what cannot be held is refused with a reason."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from local_engine.chat import InvalidRequest
from local_engine.constrain import GrammarConstraint, Grammars, check_schemas
from local_engine.sampler import Sampler
from local_engine.tool_calls import ToolCallParser, ToolFormat
from local_engine.types import SamplingParams, TextFormat
from tests.local_engine.small_tokenizers import byte_level, sentencepiece

CPU = torch.device("cpu")
TOKENIZER = byte_level(specials=("<think>", "</think>", "[TOOL_CALLS]"))
THINK, END_THINK, BEGIN = (TOKENIZER.get_vocab()[token] for token in ("<think>", "</think>", "[TOOL_CALLS]"))
END = TOKENIZER.eos_token_id
PADDED = len(TOKENIZER) + 21
"""Models have wider rows of logits than their tokenizers have tokens."""
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", 3, None]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
                     "additionalProperties": False}
        },
        "type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1, "maxItems": 3,
    },
    {"anyOf": [{"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"}, {"type": "null"}, {"const": {"a": [1, 2]}}]},
]  # fmt: skip


def grammars(tools: ToolFormat | None = None, think: bool = False) -> Grammars:
    return Grammars(
        TOKENIZER,
        vocabulary=PADDED,
        end_tokens=[END],
        think_tokens=(THINK, END_THINK) if think else None,
        tools=tools,
    )


PLAIN = grammars()
THINKING = grammars(think=True)


def schema(definition: Any, field: str = "response_format") -> TextFormat:
    return TextFormat("json_schema", json.dumps(definition), field)


def write(constraint: GrammarConstraint, seed: int, limit: int = 600) -> list[int]:
    """What a model without a mind writes, to the end of its turn."""
    sampler = Sampler(SamplingParams(seed=seed, temperature=2), CPU, constraint, end_tokens=[END])
    noise = torch.Generator().manual_seed(seed)
    output: list[int] = []
    while len(output) < limit:
        output.append(sampler.pick(torch.randn(PADDED, generator=noise), output).token)
        if output[-1] == END:
            return output[:-1]
    raise AssertionError(f"no end: {TOKENIZER.decode(output)!r}")


@pytest.mark.parametrize("definition", SCHEMAS, ids=["object", "references", "any of"])
@pytest.mark.parametrize("seed", range(4))
def test_a_model_without_a_mind_answers_by_the_schema(definition: dict[str, Any], seed: int) -> None:
    output = write(PLAIN.formatted(schema(definition), []), seed)
    jsonschema.validate(json.loads(TOKENIZER.decode(output)), definition)


def test_a_regular_expression_is_matched_whole() -> None:
    for seed in range(5):
        text = TOKENIZER.decode(
            write(PLAIN.formatted(TextFormat("regex", r"([0-9]{1,3}\.){3}[0-9]{1,3}|ü+!"), []), seed)
        )
        assert re.fullmatch(r"([0-9]{1,3}\.){3}[0-9]{1,3}|ü+!", text)


def test_a_json_object_is_an_object() -> None:
    constraint = PLAIN.formatted(TextFormat("json_object"), [])
    for text, allowed in (('{"a": [1, {"b": null}]}', True), ("[1]", False), ("so: {}", False)):
        output = TOKENIZER.backend_tokenizer.encode(text).ids
        assert all(permits(constraint, output[:at], token) for at, token in enumerate(output)) == allowed
    assert permits(constraint, TOKENIZER.backend_tokenizer.encode("{}").ids, END)
    assert not permits(constraint, TOKENIZER.backend_tokenizer.encode("{").ids, END)


def allowed(constraint: GrammarConstraint, output: list[int]) -> set[int]:
    logits = torch.zeros(PADDED)
    constraint.mask(logits, output)
    return set(torch.nonzero(logits == 0).flatten().tolist())


def permits(constraint: GrammarConstraint, output: list[int], token: int) -> bool:
    return token in allowed(constraint, output)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), data=st.data())
def test_a_constraint_follows_the_output_forwards_and_back(seed: int, data: st.DataObject) -> None:
    """Verify windows, rejected drafts, preemption: the same mask as one that saw nothing else."""
    written = write(PLAIN.formatted(schema(SCHEMAS[0]), []), seed)
    followed = PLAIN.formatted(schema(SCHEMAS[0]), [])
    for _ in range(4):
        cut = data.draw(st.integers(0, len(written)))
        output = written[:cut] + data.draw(st.lists(st.integers(0, PADDED - 1), max_size=2))
        fresh = PLAIN.formatted(schema(SCHEMAS[0]), [])
        assert allowed(followed, output) == allowed(fresh, output)
        assert followed.done(output) == fresh.done(output)
    assert followed.done(written)
    assert allowed(followed, written) == {END}
    assert not followed.done(written[:-1])


def test_thinking_is_free_but_an_answer_must_follow() -> None:
    words = TOKENIZER.backend_tokenizer.encode("hm, {").ids
    form = TextFormat("regex", "yes|no")
    may_think = THINKING.formatted(form, [1, 2, 3])
    begun = THINKING.formatted(form, [1, 2, THINK])
    closed = THINKING.formatted(form, [1, THINK, 2, END_THINK, 2])
    assert THINK in allowed(may_think, [])
    assert THINK not in allowed(closed, []) == allowed(may_think, []) - {THINK}
    for constraint, output in ((may_think, [THINK, *words]), (begun, words)):
        assert len(allowed(constraint, output)) == PADDED - 1
        assert not permits(constraint, output, END)
        assert not constraint.done(output)
        answer = allowed(constraint, [*output, END_THINK])
        assert answer == allowed(closed, [])
        assert TOKENIZER.decode(write_after(constraint, [*output, END_THINK])) in ("yes", "no")


def write_after(constraint: GrammarConstraint, output: list[int]) -> list[int]:
    written: list[int] = []
    while not constraint.done(output + written):
        written.append(random.Random(1).choice(sorted(allowed(constraint, output + written))))
    return written


def test_a_grammar_that_grows_too_complex_ends_with_an_error() -> None:
    matcher = LLMatcher(
        from_tokenizer(TOKENIZER, n_vocab=PADDED, eos_token=[END]),
        LLMatcher.grammar_from_json_schema(SCHEMAS[0]),
        log_level=0,
        limits=LLParserLimits(step_lexer_fuel=500),
    )
    constraint = GrammarConstraint(matcher, PADDED, [END], None, [], "response_format")
    output = TOKENIZER.backend_tokenizer.encode('{"name": "Ann", "age": 4').ids
    fine = next(at for at in range(len(output)) if allowed(constraint, output[:at]) == {END})
    assert 0 < fine < len(output)
    with pytest.raises(InvalidRequest, match="too complex"):
        constraint.done([*output[:fine], END])


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "$defs": {"day": {"enum": ["today", "tomorrow"]}},
        "type": "object", "properties": {"day": {"$ref": "#/$defs/day"}, "n": {"type": "integer", "maximum": 9}},
        "required": ["day"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "clock"}},
]  # fmt: skip


@pytest.mark.parametrize("format", ["hermes", "llama", "mistral"])
def test_a_required_call_is_a_call(format: ToolFormat) -> None:
    kind = grammars(format)
    for seed in range(3):
        output = write(kind.tool_call(TOOLS, "weather", []), seed)
        assert format != "mistral" or output[0] == BEGIN
        parser = ToolCallParser(format)
        told = parser.push(TOKENIZER.decode(output))
        assert (told.content, parser.finish().content, parser.calls) == ("", "", 1)
        assert told.calls[0].name == "weather"
        arguments = "".join(delta.arguments for delta in told.calls)
        jsonschema.validate(json.loads(arguments), TOOLS[0]["function"]["parameters"])  # type: ignore[index]
    assert len({write_name(kind, format, seed) for seed in range(12)}) == 2, "any tool may be called"


def write_name(kind: Grammars, format: ToolFormat, seed: int) -> str:
    constraint = kind.tool_call(TOOLS, "", [])
    sampler = Sampler(SamplingParams(seed=seed), CPU, constraint)
    output: list[int] = []
    while not (found := re.search(r'"name"\s*:\s*"(weather|clock)"', TOKENIZER.decode(output))):
        output.append(sampler.pick(torch.zeros(PADDED), output).token)
    return found[1]


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        (schema({"not": {"type": "string"}}), "response_format", ["not", "leave out"]),
        (schema({"type": "strin"}), "response_format", ["strin"]),
        (schema({"$ref": "#/$defs/x"}), "response_format", ["/$defs/x"]),
        (schema(False), "response_format", ["false", "no object"]),
        (schema({"type": "string", "pattern": "(?=a)b"}), "response_format", ["(?=a)b", "look-around"]),
        (TextFormat("json_schema", "{"), "response_format", ["no JSON"]),
        (TextFormat("json_schema", " " * 100_001), "response_format", ["100001", "at most 100000"]),
        (TextFormat("regex", "(a", "structured_outputs.regex"), "structured_outputs.regex", ["(a", "unclosed", "Rust"]),
        (TextFormat("regex", "a" * 999 + "("), "response_format", ["unclosed group"]),
        (TextFormat("regex", "a\n(b"), "response_format", ["unclosed group"]),
        (TextFormat("regex", "a\\zb", "structured_outputs.regex"), "structured_outputs.regex", ["lookarounds"]),
        (TextFormat("regex", r"[^\s\S]"), "response_format", ["nothing can match it"]),
        (schema({"$ref": "#"}), "response_format", ["nothing can match it"]),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(form: TextFormat, param: str, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        PLAIN.formatted(form, [])
    assert refused.value.param == param
    assert str(refused.value).startswith(param)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert len(str(refused.value)) < 500
    assert not re.search(r"start:|\^ |\d\(\d+\)|<|NoExtension", str(refused.value)), "no words of the grammar's own"


def test_tool_choices_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="knows no tool calls"):
        PLAIN.tool_call(TOOLS, "", [])
    with pytest.raises(InvalidRequest, match="no tool is named 'rain'"):
        grammars("hermes").tool_call(TOOLS, "rain", [])


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "not": {}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "pattern": "(?=a)b"}, '"(?=a)b": look-around'),
    ],
)
@pytest.mark.parametrize("format", ["hermes", "llama", "mistral"])
def test_a_tool_whose_arguments_cannot_be_held_is_named(format: ToolFormat, parameters: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars(format).tool_call([*TOOLS, tool(parameters)], "f", [])
    assert str(refused.value).startswith(f"tools[2].function.parameters: {words}")
    assert refused.value.param == "tools[2].function.parameters"
    assert not re.search(r"start:|tool\d:", str(refused.value))


@pytest.mark.parametrize(
    "parameters", [{"type": "objekt"}, {"properties": 5}, {"properties": {"a": {"$ref": "#/$defs/x"}}}]
)
def test_what_is_no_schema_is_refused_where_nothing_is_held_to_it(parameters: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"tools\[2\].function.parameters: .*; correct the JSON schema"):
        check_schemas([*TOOLS, tool(parameters)])


def test_what_cannot_be_held_is_fine_where_nothing_is() -> None:
    password = {"type": "string", "pattern": "^(?=.*[0-9]).+$", "not": {"const": "1"}}
    check_schemas([*TOOLS, tool({"properties": {"a": password}}), tool(None), tool({"minimum": 1, "maximum": 0})])


def test_a_sentencepiece_vocabulary_is_held_too() -> None:
    tokenizer = sentencepiece()
    kind = Grammars(
        tokenizer, vocabulary=len(tokenizer), end_tokens=[tokenizer.eos_token_id], think_tokens=None, tools=None
    )
    sampler = Sampler(SamplingParams(seed=4), CPU, constraint := kind.formatted(schema(SCHEMAS[0]), []))
    output: list[int] = []
    while not constraint.done(output):
        output.append(sampler.pick(torch.zeros(len(tokenizer)), output).token)
    jsonschema.validate(json.loads(tokenizer.decode(output)), SCHEMAS[0])
