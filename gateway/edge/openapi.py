"""/openapi.json: what FastAPI says of its own paths, the data plane beside them, and what is really answered."""

import inspect
from collections.abc import Mapping
from typing import Any

from gateway.edge import answers, monitoring
from gateway.edge.schemas import COMPONENTS, DATA_PLANE, HEADERS

Document = dict[str, Any]

STATUSES: Mapping[int, str] = {
    400: "The request is wrong; the message names the field, the value and the fix.",
    401: "No key, or not one of this gateway's.",
    403: "A good key without the right.",
    404: "No such model, key or request.",
    409: "It does not go with how things are: the name is taken, the Idempotency-Key is under way, its answer is lost.",
    413: "The body is larger than the gateway takes.",
    415: "The body is compressed; send it plain.",
    429: "Too fast, or the budget is spent, or the provider limits the gateway.",
    500: "The gateway's own fault; its log has the cause under the request id.",
    502: "The provider failed, and so did what stood behind it.",
    503: "Nothing can serve this now.",
    504: "The provider did not answer in time.",
}
_HEADERS: Mapping[int, Document] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}},
}
_RECEIPT = {"operationId": "receipt", "parameters": {"request_id": "$response.header.x-request-id"}}
_WATCHED: Mapping[str, tuple[str, Document]] = {
    "/health/liveness": ("application/json", {"$ref": "#/components/schemas/Liveness"}),
    "/health/readiness": ("application/json", {"$ref": "#/components/schemas/Readiness"}),
    "/metrics": ("text/plain", {"type": "string"}),
}
_EVENT = {
    "description": "One event; its data is a chunk in JSON, at the end `[DONE]`, or an error.",
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
_ERROR_REF = {"$ref": "#/components/schemas/ErrorAnswer"}
_ERROR = {"content": {"application/json": {"schema": _ERROR_REF}}}


def refusals(*statuses: int) -> dict[int | str, Document]:
    """What a path that asks for a key may answer beside its success; every one of them may be asked wrongly."""
    return {
        status: {
            "model": answers.ErrorAnswer,
            "description": STATUSES[status],
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
        for status in (400, 401, *statuses)
    }


def completed(document: Document) -> Document:
    """FastAPI's document with the data plane's paths, and without the 422 that it adds: this gateway answers 400."""
    schemas = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= COMPONENTS
    schemas |= {answer.__name__: answer.model_json_schema() for answer in (answers.Liveness, answers.Readiness)}
    chat, explain = COMPONENTS["ChatRequest"], schemas["ExplainRequest"]
    schemas["ExplainRequest"] = {  # it is read as a chat, which may leave out its model
        **chat,
        "description": explain["description"],
        "required": ["messages"],
        "properties": {**chat["properties"], "tags": explain["properties"]["tags"]},
    }
    data_plane = {path: {"post": _operation(path)} for path in DATA_PLANE}
    watched = {path: {"get": _watched(path)} for path in monitoring.PATHS}
    document["paths"] = {**data_plane, **watched, **document["paths"]}
    return document


def _watched(path: str) -> Document:
    """What the docstring of its answerer says."""
    answerer = monitoring.PATHS[path]
    summary, _, rest = (inspect.getdoc(answerer) or "").partition("\n\n")
    media, schema = _WATCHED[path]
    content = {"content": {media: {"schema": schema}}}
    responses = {"200": {"description": "As it is now.", **content}}
    if path == "/health/readiness":
        responses["503"] = {"description": "No model can serve, or nothing can be recorded.", **content}
    return {
        "tags": ["health"],
        "summary": answerer.__name__.capitalize(),
        "description": " ".join(f"{summary}\n{rest}".split()),
        "operationId": answerer.__name__,
        "responses": responses,
    }


def _operation(path: str) -> Document:
    endpoint = DATA_PLANE[path]
    failures = (400, 401, 403, 404, 409, 413, 415, 429, 500, 502, 503, 504)
    refused = {
        str(status): {
            "description": STATUSES[status],
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
            **_ERROR,
        }
        for status in failures
    }
    content: Document = {"application/json": {"schema": {"$ref": f"#/components/schemas/{endpoint.response}"}}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return {
        "tags": ["openai"],
        "summary": endpoint.summary,
        "operationId": endpoint.operation_id,
        "security": [{"HTTPBearer": []}],
        "parameters": HEADERS,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{endpoint.request}"}}},
        },
        "responses": {
            "200": {
                "description": endpoint.answer,
                "headers": {"x-request-id": {"required": True, "schema": {"type": "string"}}},
                "content": content,
                "links": {"receipt": _RECEIPT},
            },
            **refused,
            "4XX": {
                "description": "The provider refused the request; its status and its words are passed on.",
                **_ERROR,
            },
        },
    }
