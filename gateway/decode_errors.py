"""What msgspec says of JSON that it cannot read, with the field before it and, where there are some, its choices."""

import re
from typing import Any, Final

import msgspec
from msgspec import inspect

_PATH: Final = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")
_SEGMENT: Final = re.compile(r"\[[^\]]*\]|[^.\[]+")
_CHOICE: Final = ("Invalid enum value", "Invalid value")


def misread(error: msgspec.DecodeError, kind: Any, within: str = "") -> tuple[str | None, str]:
    """(the field, None for all of it; what is wrong with it), where `kind` is what was to be read, `within` a field."""
    message = str(error)
    found = _PATH.search(message)
    path = found["path"] if found else ""
    sentence = message[: found.start()] if found else message
    if missing := _MISSING.match(sentence):
        return _joined(within, path, missing["name"]), "is missing"
    if sentence.startswith(_CHOICE) and not (found and found["key"]):
        choices = _choices([inspect.type_info(kind)], _SEGMENT.findall(path))
        if choices:
            sentence += f"; send one of {', '.join(choices)}"
    return _joined(within, path) or None, sentence


def _joined(*parts: str) -> str:
    path = ""
    for part in filter(None, parts):
        path += part if not path or part.startswith("[") else f".{part}"
    return path


def _choices(kinds: list[inspect.Type], path: list[str]) -> list[str]:
    """What may be written at a path within any of some types."""
    kinds = [member for kind in kinds for member in (kind.types if isinstance(kind, inspect.UnionType) else (kind,))]
    if not path:
        return [
            "null" if value is None else str(value)
            for kind in kinds
            if isinstance(kind, inspect.LiteralType)
            for value in kind.values
        ]
    structs = [kind for kind in kinds if isinstance(kind, inspect.StructType)]
    if tags := [str(kind.tag) for kind in structs if kind.tag_field == path[0]]:
        return tags
    inner = [field.type for kind in structs for field in kind.fields if field.encode_name == path[0]]
    inner += [kind.item_type for kind in kinds if isinstance(kind, inspect.ListType | inspect.VarTupleType)]
    inner += [kind.value_type for kind in kinds if isinstance(kind, inspect.DictType)]
    return _choices(inner, path[1:]) if inner else []
