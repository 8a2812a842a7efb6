"""What a model that follows its instructions would answer, as far as a schema says what that is.

Texts in it are the question's own, numbers are 3, and an optional field has its first kind.
"""

import json
import re
from typing import Any, NamedTuple


class Script(NamedTuple):
    tool: str | None
    """The tool that is called with `text`; None: `text` is the answer itself."""
    text: str


def script(body: dict[str, Any]) -> Script | None:
    """The answer that the body asks for: a call of a tool with named arguments, or JSON. None: any answer will do."""
    choice = body.get("tool_choice")
    functions = [function_of(tool) for tool in body.get("tools") or ()]
    if functions and choice != "none":
        wanted = choice["function"]["name"] if isinstance(choice, dict) else functions[0].get("name")
        function = next(function for function in functions if function.get("name") == wanted)
        parameters = function.get("parameters") or {}
        return Script(wanted, _json(parameters, body)) if "properties" in parameters else None
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return Script(None, _json(form["json_schema"]["schema"], body))
    if form.get("type") == "json_object":  # the names that the question quotes
        names = re.findall(r"'(\w+)'", _question(body))
        return Script(None, _json({"type": "object", "properties": {name: {"type": "string"} for name in names}}, body))
    return None


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """What a tool says of its function; nothing where it is of another kind."""
    function = tool.get("function")
    return function if isinstance(function, dict) else {}


def _json(schema: dict[str, Any], body: dict[str, Any]) -> str:
    return json.dumps(_conform(schema, schema.get("$defs", {}), _question(body)), ensure_ascii=False)


def _conform(schema: dict[str, Any], definitions: dict[str, Any], text: str) -> Any:
    if "$ref" in schema:
        return _conform(definitions[schema["$ref"].rpartition("/")[2]], definitions, text)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _conform(schema["anyOf"][0], definitions, text)
    match schema.get("type"):
        case "object":
            return {name: _conform(field, definitions, text) for name, field in schema.get("properties", {}).items()}
        case "array":
            return [_conform(schema.get("items", {}), definitions, text)]
        case "integer" | "number":
            return 3
        case "boolean":
            return True
        case "null":
            return None
    return text


def _question(body: dict[str, Any]) -> str:
    asked = [message.get("content") for message in body["messages"] if message["role"] == "user"]
    return asked[-1] if asked and isinstance(asked[-1], str) else "nothing"
