"""What a caller is told where a KV budget is too small, in the operator's words."""

from typing import Final

from local_engine.types import Failed

MORE_ROOM: Final = "raise it (the operator's LEADLINE_KV_MIB)"


def out_of_room(id: int, model: str, tokens: int) -> Failed:
    """The end of a command with a sequence of so many tokens, which this model's budget can never hold."""
    reason = f"the KV budget of {model} cannot hold a sequence of {tokens} tokens; {MORE_ROOM}"
    return Failed(id, "context_length_exceeded", reason)
