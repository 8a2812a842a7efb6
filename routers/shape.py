"""One entry of a policy file against its shape, with pydantic's findings put into words a person can act on."""

import re
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from routers.units import UnitError
from routers.yaml import Document, Path

_Part = TypeVar("_Part", bound=BaseModel)

NAME_FIX = "use letters, digits and . _ : / @ -, starting with a letter or a digit"

_HIDDEN = {"api_key", "base_url"}


class Strict(BaseModel):
    """A part of a policy file: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def validated(document: Document, kind: type[_Part], value: object, path: Path) -> _Part | None:
    """The entry, or None with its problems noted in the document."""
    if value is None:  # an empty value, reported by the reader
        return None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _report(document, kind, path, detail)
        return None


def _report(document: Document, kind: type[BaseModel], base: Path, detail: ErrorDetails) -> None:
    path = _as_written(document, base, detail["loc"])
    if path in document.lines and document.at(path) is None:  # an empty value, reported by the reader
        return
    show = not (_HIDDEN & {str(step) for step in path})
    context: dict[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, detail["loc"])
            fix = _OTHER_WORDS.get((kind.__name__, str(path[-1])), did_you_mean(str(path[-1]), known))
            document.report(path, "unknown key", fix, show=False)
        case "missing":
            document.report(path, "missing", f"add `{path[-1]}:`")
        case "literal_error":
            given = document.at(path)
            options = re.findall(r"'([^']*)'", str(context["expected"]))
            document.report(path, "not one of the choices", did_you_mean(str(given), options), show=show)
        case "value_error" if isinstance(context.get("error"), UnitError):
            unit_error: UnitError = context["error"]
            document.report(path, str(unit_error), unit_error.fix, show=show)
        case type_name:
            message, fix = _PROBLEMS.get(type_name, ("not valid", "see the schema of a policy"))
            document.report(path, message.format(**context), fix.format(**context), show=show)


def _as_written(document: Document, base: Path, location: Path) -> Path:
    """Where the file has what pydantic found: without its mark for a key, and without the name that a list gets where
    it stands in place of a mapping."""
    path = base
    for step in location:
        if step == "[key]" or (isinstance(step, str) and isinstance(document.at(path), list)):
            continue
        path = (*path, step)
    return path


_OTHER_WORDS = {("ModelFile", "draft"): "write `speculation: draft:MODEL`, with the model that drafts"}
"""Fixes for keys that a reader of the design may expect."""
_PROBLEMS = {
    "string_type": ("not text", "write it as text, in quotes if it looks like a number"),
    "string_too_short": ("empty", "write at least one character"),
    "string_too_long": ("too long", "write at most {max_length} characters"),
    "int_type": ("not a whole number", "write a whole number, without quotes"),
    "float_type": ("not a number", "write a number, without quotes"),
    "bool_type": ("neither true nor false", "write true or false, without quotes"),
    "list_type": ("not a list", "write a list, such as [a, b]"),
    "dict_type": ("not a mapping", "write `name: value` pairs"),
    "model_type": ("not a mapping", "write `key: value` pairs"),
    "string_pattern_mismatch": ("this name cannot be used", NAME_FIX),
    "too_short": ("empty", "name at least one"),
    "greater_than_equal": ("too small", "write {ge} or more"),
    "greater_than": ("too small", "write more than {gt}"),
    "less_than": ("too large", "write less than {lt}"),
    "less_than_equal": ("too large", "write {le} or less"),
}


def did_you_mean(given: str, known: list[str]) -> str:
    """A fix for a name that does not exist: the nearest one that does, or all of them."""
    close = get_close_matches(given, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"write one of: {', '.join(known)}" if known else "there is none yet; add it first"


def _known_keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys that exist beside an unknown one."""
    for step in location[:-1]:
        annotation = _by_key(kind)[str(step)].annotation
        parts = [annotation, *(inner for outer in get_args(annotation) for inner in (outer, *get_args(outer)))]
        kind = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return list(_by_key(kind))


def _by_key(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in kind.model_fields.items()}
