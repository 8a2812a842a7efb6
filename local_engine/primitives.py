"""What may be done with running sequences between two steps: open, fork, append, offer, truncate, score, write, hold,
rest, close.

All of it changes what is *to be computed*; the computing is done by the steps that follow, together with everybody
else's. A `Controller` owns the sequences of one request and is told what each step meant for them, so a way of
reasoning (speculation on steps, early exits, votes) is a small state machine over these calls:

    prompt = engine.open("base", tokens)             # reads, then rests
    branch = engine.fork(prompt, sampler)            # writes on from there
    engine.append(branch, forced)                    # reads what it is given, then writes on
    engine.score(prompt, candidate)                  # its turn brings the scores; the prompt is as it was

Engine thread only.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from typing import Protocol

from torch import Tensor

from local_engine.lane import Lane
from local_engine.means import Means
from local_engine.sampler import Choice, Sampler
from local_engine.sequence import Scores, Sequence, place, token_ids
from local_engine.turns import Turn
from local_engine.types import Event, FinishReason, TapSpec


class Controller(Protocol):
    """Owns the sequences of one request."""

    @property
    def done(self) -> bool:
        """Whether its last event is out; the engine then closes what it left open."""
        ...

    def begin(self, engine: "Primitives") -> None:
        """Open the first sequences. `engine` may be kept."""
        ...

    def stepped(self, turn: Turn) -> list[Event]:
        """A step of one of its sequences: what is to be told of it. Turns of one step come in no special order."""
        ...

    def ended(self, reason: FinishReason) -> list[Event]:
        """The request is over before it was done (cancelled, deadline): its closing events."""
        ...


class Primitives:
    """The sequences of one request, on any of the engine's models."""

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        owner: object,
        *,
        serials: Iterator[int],
        arrived: float,
        priority: int = 0,
        salt: bytes = b"",
    ) -> None:
        self._lanes = lanes
        self._owner = owner
        self._serials = serials
        self._arrived = arrived
        self._priority = priority
        self._salt = salt
        self._lane_of: dict[Sequence, Lane] = {}

    @property
    def sequences(self) -> list[Sequence]:
        """Those that are open."""
        return list(self._lane_of)

    def open(
        self,
        model: str,
        tokens: Tokens[int],
        sampler: Sampler | None = None,
        *,
        limit: int | None = None,
        taps: TapSpec | None = None,
        means: Means | None = None,
        writes_on: Callable[[Choice], bool] | None = None,
        expendable: bool = False,
    ) -> Sequence:
        """A sequence that reads `tokens`, then writes if it has a sampler and rests if not.

        It stops at `limit` tokens, prompt included; at the most that the model and its KV budget allow if that is
        less. A step may bring several tokens of it where `writes_on`, asked after each, says so: for text that nobody
        waits for token by token. When a step of it fails the request fails, unless it is `expendable`: then its turn
        brings the error.
        """
        lane = self._lanes[model]
        most = min(limit or lane.most_tokens, lane.most_tokens)
        if not 0 < len(tokens) <= most - (sampler is not None):
            raise ValueError(
                f"a sequence of {model} has 1 to {most} tokens, what it writes included; not {len(tokens)}"
            )
        sequence = self._new(lane, tokens, most)
        sequence.sampler, sequence.taps, sequence.expendable = sampler, taps, expendable
        sequence.means = means
        sequence.writes_on = writes_on
        lane.add(sequence)
        return sequence

    def fork(self, sequence: Sequence, sampler: Sampler | None = None, *, length: int | None = None) -> Sequence:
        """A new sequence that begins with the first `length` tokens of another, all by default, and has their KV."""
        length = self._length(sequence, length)
        child = self._child(sequence, length)
        child.sampler = sampler
        child.prompt_len = min(sequence.prompt_len, length)
        child.computed = length - (sampler is not None)
        self._lane_of[sequence].branch(sequence, child)
        child.at_rest = child.computed == length or (sampler is not None and length >= child.limit)
        return child

    def append(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """Forced text: it is read next. Raises ValueError beyond the sequence's limit."""
        if len(sequence.ids) + len(tokens) > sequence.limit:
            raise ValueError(f"{len(tokens)} tokens after {len(sequence.ids)} are over the limit of {sequence.limit}")
        sequence.undraft()
        sequence.ids.extend(tokens)
        sequence.given += len(tokens)
        sequence.at_rest = sequence.at_rest and not tokens

    def offer(self, sequence: Sequence, tokens: Tokens[int], floor: float) -> None:
        """Let a sequence that writes read what somebody else wrote for it, and keep what it finds probable enough.

        Its next turn brings, all measured, those `tokens` that came before the first whose log-probability is below
        `floor`, and one token of its own after them. Where room is short the offer is cut, down to nothing.
        """
        if sequence.sampler is None or len(sequence.ids) + len(tokens) >= sequence.limit:
            raise ValueError(f"an offer of {len(tokens)} tokens after {len(sequence.ids)} needs a sampler and room")
        if sequence.computed == len(sequence.ids):
            self._lane_of[sequence].cut(sequence, len(sequence.ids) - 1)
        sequence.draft[:] = tokens
        sequence.floor = floor
        sequence.at_rest = False

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Keep the first `length` tokens, at least one. With a sampler it writes on from there."""
        length = self._length(sequence, length)
        rested = sequence.at_rest and sequence.sampler is None
        del sequence.ids[length:]
        sequence.prompt_len = min(sequence.prompt_len, length)
        self._lane_of[sequence].cut(sequence, length - (sequence.sampler is not None))
        sequence.at_rest = rested or (sequence.sampler is None and sequence.computed == length)

    def write(self, sequence: Sequence, sampler: Sampler) -> None:
        """Let it write from its end on, by this sampler."""
        sequence.sampler = sampler
        self._lane_of[sequence].cut(sequence, len(sequence.ids) - 1)
        sequence.at_rest = len(sequence.ids) >= sequence.limit

    def hold(self, sequence: Sequence) -> None:
        """Let it write no more: it reads what it has, and rests."""
        sequence.sampler = None
        sequence.undraft()
        sequence.at_rest = sequence.computed == len(sequence.ids)

    def rest(self, sequence: Sequence) -> None:
        """Let it wait as it is. What it has not read is read when it goes on: by `append`, `offer` or `resume`."""
        sequence.undraft()
        sequence.at_rest = True

    def resume(self, sequence: Sequence) -> None:
        """Let who rests go on."""
        done = sequence.limit if sequence.sampler is not None else sequence.computed
        sequence.at_rest = len(sequence.ids) >= done

    def score(self, sequence: Sequence, tokens: Tokens[int]) -> Sequence:
        """Ask what its model thinks of `tokens` after it. It stays as it is.

        The sequence given back stands for the question: its turn brings the scores, and it is closed then.
        """
        start = len(sequence.ids)
        if not 0 < len(tokens) <= sequence.limit - start:
            raise ValueError(f"1 to {sequence.limit - start} tokens can be scored after {start}, not {len(tokens)}")
        last = self._lane_of[sequence].model.network.config.vocab_size - 1
        if max(tokens) > last:  # the last one is in no step, which would refuse it
            raise ValueError(f"token {max(tokens)} cannot be scored: the model has tokens 0 to {last}")
        child = self._child(sequence, start)
        child.ids.extend(tokens)
        child.scored_from = start
        child.scores = Scores()
        child.computed = start - 1
        self._lane_of[sequence].branch(sequence, child)
        return child

    def keep(self, sequence: Sequence, logits: Tensor, until: float) -> None:
        """Close it, but let its KV and the logits [vocabulary] after it wait for who writes on from its text.

        It must be at rest. `until` is a time of the engine's clock.
        """
        self._lane_of.pop(sequence).keep(sequence, logits, until)

    def close(self, sequence: Sequence) -> None:
        """Free it. Harmless when it is closed."""
        lane = self._lane_of.pop(sequence, None)
        if lane is not None:
            lane.drop(sequence)

    def owns(self, sequence: Sequence) -> bool:
        """Whether it is open."""
        return sequence in self._lane_of

    def close_all(self) -> None:
        for sequence in self.sequences:
            self.close(sequence)

    def _child(self, parent: Sequence, length: int) -> Sequence:
        return self._new(self._lane_of[parent], parent.ids[:length], parent.limit)

    def _new(self, lane: Lane, tokens: Tokens[int], limit: int) -> Sequence:
        rank = place(self._priority, self._arrived, next(self._serials))
        sequence = Sequence(token_ids(tokens), rank, limit, owner=self._owner, salt=self._salt)
        self._lane_of[sequence] = lane
        return sequence

    def _length(self, sequence: Sequence, length: int | None) -> int:
        length = len(sequence.ids) if length is None else length
        if not 0 < length <= len(sequence.ids):
            raise ValueError(f"length must be from 1 to the sequence's {len(sequence.ids)} tokens, not {length}")
        return length
