"""The data plane's requests and answers as JSON Schema, by hand: it reads bytes, not models.

A request states what `wire.py` and `prompts.py` check, no more: every other field is passed on as it came. An answer
states what holds for every provider. tests/edge/test_openapi.py keeps both in step with the readers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from gateway.admission.limits import MAX_PATH, RUN_PATTERN
from gateway.edge.headers import PRIORITY_PATTERN, SECONDS_PATTERN
from gateway.edge.hints import MODELS_PATTERN, QUALITY_PATTERN
from gateway.edge.prompts import MAX_DIMENSIONS, MAX_INPUTS
from gateway.edge.wire import FOREIGN_FIELDS, MAX_CHOICES, MAX_MESSAGES, MAX_STOPS, MAX_TOKENS, SEEDS
from routers.policy import PRIORITIES
from routers.types import Effort

Schema = dict[str, Any]


class DataPath(NamedTuple):
    operation_id: str
    summary: str
    request: str
    response: str
    answer: str
    streams: bool


DATA_PLANE: Mapping[str, DataPath] = {
    "/v1/chat/completions": DataPath(
        "chat_completions",
        "Answer a conversation.",
        "ChatRequest",
        "ChatCompletion",
        "The answer, whole or as server-sent events: `data: CHUNK` each, then `data: [DONE]`, or an error without it.",
        streams=True,
    ),
    "/v1/completions": DataPath(
        "completions",
        "Continue a text.",
        "CompletionRequest",
        "Completion",
        "The continuation, whole or as server-sent events, as of a chat.",
        streams=True,
    ),
    "/v1/embeddings": DataPath(
        "embeddings", "Texts as vectors.", "EmbeddingRequest", "Embeddings", "One vector for each text.", streams=False
    ),
}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _integer(minimum: int, maximum: int) -> Schema:
    return _nullable({"type": "integer", "minimum": minimum, "maximum": maximum})


_TOKEN_IDS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1},
}
_TEXTS: Schema = {
    "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
        _TOKEN_IDS,
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TOKEN_IDS},
    ],
}
_MODEL: Schema = {
    "description": "A model or an alias of the policy, printable characters; `auto` lets the gateway choose.",
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "examples": ["auto"],
}
_STREAM_OPTIONS = _nullable({"type": "object", "properties": {"include_usage": _nullable({"type": "boolean"})}})
_SAMPLING: Schema = {
    "stream": _nullable({"type": "boolean", "default": False}),
    "stream_options": _STREAM_OPTIONS,
    "n": _integer(1, MAX_CHOICES),
    "max_tokens": _integer(1, MAX_TOKENS),
    "temperature": _nullable({"type": "number", "minimum": 0, "maximum": 2}),
    "top_p": _nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "seed": _integer(SEEDS.start, SEEDS.stop - 1),
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}},
            {"type": "null"},
        ]
    },
    "service_tier": {
        "description": "Other tiers have prices of their own, which the ledger does not know.",
        "enum": ["auto", "default", None],
    },
}
_PRIORITY: Schema = {
    "priority": {
        **_integer(PRIORITIES.start, PRIORITIES.stop - 1),
        "description": "Larger goes first where targets have a line; at most what the policy's route allows.",
    }
}
_FOREIGN: Schema = dict.fromkeys(sorted(FOREIGN_FIELDS), False)
"""Where a call goes, and with which key, is the policy's to say."""

_TYPED: Schema = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "examples": ["user"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TYPED}, {"type": "null"}]},
    },
}

CHAT_REQUEST: Schema = {
    "type": "object",
    "description": "Fields that are not named here are passed on to the provider as they are.",
    "required": ["model", "messages"],
    "properties": {
        "model": _MODEL,
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": _MESSAGE,
            "examples": [[{"role": "user", "content": "How deep is the harbour?"}]],
        },
        **_SAMPLING,
        "max_completion_tokens": _integer(1, MAX_TOKENS),
        "logprobs": _nullable({"type": "boolean", "default": False}),
        "top_logprobs": {**_integer(0, 20), "description": "Needs `logprobs: true`."},
        "tools": _nullable({"type": "array", "items": {"type": "object"}}),
        "functions": _nullable({"type": "array", "items": {"type": "object"}}),
        "response_format": _nullable(_TYPED),
        "reasoning_effort": _nullable({"type": "string"}),
        "chat_template_kwargs": _nullable({"type": "object", "properties": {"enable_thinking": {"type": "boolean"}}}),
        **_PRIORITY,
        **_FOREIGN,
    },
    "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer"}}},
    "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
}
COMPLETION_REQUEST: Schema = {
    "type": "object",
    "description": CHAT_REQUEST["description"],
    "required": ["model", "prompt"],
    "properties": {
        "model": _MODEL,
        "prompt": _TEXTS,
        **_SAMPLING,
        "best_of": {**_integer(1, MAX_CHOICES), "description": "At least `n`."},
        "logprobs": _integer(0, 20),
        **_PRIORITY,
        **_FOREIGN,
    },
}
EMBEDDING_REQUEST: Schema = {
    "type": "object",
    "description": CHAT_REQUEST["description"],
    "required": ["model", "input"],
    "properties": {
        "model": _MODEL,
        "input": _TEXTS,
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": _integer(1, MAX_DIMENSIONS),
        "stream": {"description": "Embeddings come whole.", "enum": [False, None]},
        **_PRIORITY,
        **_FOREIGN,
    },
}

_USAGE: Schema = _nullable(
    {
        "type": "object",
        "properties": {
            name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
    }
)


def _answer(kind: str, entries: str, entry: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["object", "model", entries],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            entries: {"type": "array", "items": entry},
            "usage": _USAGE,
        },
    }


_CHOICE: Schema = {"index": {"type": "integer"}, "finish_reason": _nullable({"type": "string"})}

COMPONENTS: Mapping[str, Schema] = {
    "ChatRequest": CHAT_REQUEST,
    "ChatCompletion": _answer(
        "chat.completion",
        "choices",
        {
            "type": "object",
            "required": ["index", "message", "finish_reason"],
            "properties": {
                **_CHOICE,
                "message": {
                    "type": "object",
                    "required": ["role"],
                    "properties": {
                        "role": {"const": "assistant"},
                        "content": _nullable({"type": "string"}),
                        "tool_calls": _nullable({"type": "array", "items": {"type": "object"}}),
                    },
                },
            },
        },
    ),
    "CompletionRequest": COMPLETION_REQUEST,
    "Completion": _answer(
        "text_completion",
        "choices",
        {"type": "object", "required": ["text"], "properties": {**_CHOICE, "text": {"type": "string"}}},
    ),
    "EmbeddingRequest": EMBEDDING_REQUEST,
    "Embeddings": _answer(
        "list",
        "data",
        {
            "type": "object",
            "required": ["index", "embedding"],
            "properties": {
                "index": {"type": "integer"},
                "embedding": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]},
            },
        },
    ),
}

HEADERS: list[Schema] = [
    {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string", **schema},
    }
    for name, description, schema in (
        (
            "Idempotency-Key",
            "A repetition under the same key gets the first one's answer.",
            {"minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
        ),
        (
            "x-leadline-scope",
            "The agent run that this call belongs to: names with `/` between a run and its sub-runs.",
            {"maxLength": MAX_PATH, "pattern": RUN_PATTERN},
        ),
        ("x-leadline-tags", "Tags that the policy's routes may ask for, with `,` between them.", {}),
        (
            "x-leadline-timeout",
            "How many seconds the answer may take.",
            {"pattern": SECONDS_PATTERN, "examples": ["30"]},
        ),
        (
            "x-leadline-priority",
            "Larger goes first where targets have a line; at most what the policy's route allows.",
            {"pattern": PRIORITY_PATTERN, "examples": ["-5"]},
        ),
        (
            "x-leadline-max-cost",
            "At most this expected cost, in dollars.",
            {"pattern": r"^\$?[0-9]{1,9}(\.[0-9]{1,9})?$"},
        ),
        ("x-leadline-min-quality", "At least this chance of a good answer.", {"pattern": QUALITY_PATTERN}),
        ("x-leadline-effort", "At most this effort.", {"enum": list(get_args(Effort))}),
        ("x-leadline-models", "Only these models of the policy.", {"pattern": MODELS_PATTERN, "maxLength": 4096}),
    )
]
