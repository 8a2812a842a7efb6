"""What an engine process is told by whoever starts it."""

from collections.abc import Mapping, Sequence
from typing import TypedDict


class EngineNeeds(TypedDict):
    """The first argument of `python -m gateway.engine_main`, as JSON; the second is the socket that it answers at."""

    models: Mapping[str, str]
    """The engine's name of a model → a path or a hub id."""
    speculation: Mapping[str, str]
    """The engine's name of a model → how it drafts."""
    probe: str | None
    encoder: str
    readers: Mapping[str, Sequence[str]]
    """The engine's name of a model → the artifacts of the probes that hear it read a prompt."""
    embeds: bool
    """Vectors are asked of the encoder, with or without a probe."""
    exit_with_parent: bool
