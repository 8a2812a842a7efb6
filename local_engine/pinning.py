"""One `Prefix` command that pins: what is not stored of a prompt is read first, so that all of it can be kept."""

from local_engine.chat import InvalidRequest
from local_engine.prefix import PrefixStore
from local_engine.primitives import Primitives
from local_engine.room import out_of_room
from local_engine.turns import Turn
from local_engine.types import Event, Failed, Finished, FinishReason, Prefix, PrefixResult


class Pinning:
    """Controller of one sequence, which rests when the prompt is read; by then it has been given to the store.

    Raises InvalidRequest for less than one block, of which the store keeps nothing.
    """

    def __init__(self, command: Prefix, prompt: list[int], store: PrefixStore) -> None:
        if len(prompt) < store.block_tokens:
            raise InvalidRequest(
                f"messages: nothing was pinned: they are {len(prompt)} tokens of a prompt, which is kept in whole "
                f"blocks of {store.block_tokens} tokens; pin more of the conversation, or its tools with it"
            )
        self._command = command
        self._prompt = prompt
        self._store = store
        self.done = False

    def begin(self, engine: Primitives) -> None:
        engine.open(self._command.model, self._prompt).pinned = True

    def stepped(self, turn: Turn) -> list[Event]:
        command, tokens = self._command, len(self._prompt)
        self.done = turn.out_of_room or turn.rested
        if turn.out_of_room:
            return [out_of_room(command.id, command.model, tokens)]
        if not turn.rested:
            return []
        return [PrefixResult(command.id, self._store.pin(command.salt.encode(), self._prompt), tokens)]

    def ended(self, reason: FinishReason) -> list[Event]:
        if reason == "deadline":
            return [Failed(self._command.id, "deadline", "the time for the prompt to be read ran out")]
        return [Finished(self._command.id, reason, len(self._prompt), 0, 0)]
