"""What a model said when it was asked to go on with a thought."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.ledger.settle import ESTIMATED_BYTES_PER_TOKEN, Usage
from gateway.upstream.begun import CLOSE, OPEN
from gateway.upstream.types import Answer, UpstreamError
from local_engine.reason.glimprouter import entropy_of

STEP_END = "\n\n"
_STOP = ("stop_reason", "matched_stop")
"""How vLLM, the local engine and SGLang name the stop string that ended an answer."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token, with the likeliest ones in its place; an `Opinion` of the step methods."""

    text: str
    logprob: float
    top: list[tuple[int, float]]
    """(rank, log-probability, natural)"""
    words: tuple[str, ...] = ()
    """The texts of `top`."""
    whole_entropy: float | None = None
    """Of all that could have stood here, in nats, where the server says so (the local engine does)."""
    token: int = 0

    @property
    def entropy(self) -> float:
        """Else of the likeliest ones alone."""
        return entropy_of(self.top) if self.whole_entropy is None else self.whole_entropy


@dataclass(frozen=True, slots=True)
class Said:
    text: str
    """Of the thought, with the blank line that ended its step."""
    closed: bool
    """The thought is over."""
    ended: bool
    """The step is."""
    tokens: tuple[Token, ...]
    usage: Usage | None
    separated: bool = False
    """It came as a thought, apart from any answer."""

    @property
    def written(self) -> int:
        """Tokens; where the server does not say, by the length of the text."""
        if self.usage is not None:
            return self.usage.output + self.usage.reasoning
        return -(-len(self.text.encode()) // ESTIMATED_BYTES_PER_TOKEN)

    def upto(self, count: int) -> str:
        """The text of the first tokens."""
        text = "".join(token.text for token in self.tokens[:count])
        return text if self.text.startswith(text) else ""


def read_said(answer: Answer, *, separates: bool = False) -> Said:
    """Of a whole answer to `gateway.stepping.ask.step`. Raises UpstreamError for what is none.

    Whoever separates thoughts (`separates`: it has been heard to) tells the end of one by words of the answer; others
    write the closing tag. An answer that stops by itself in a thought has ended it, where the server tells that no
    stop string did.
    """
    try:
        choice: dict[str, Any] = msgspec.json.decode(answer.body)["choices"][0]
        message = choice["message"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        content = message.get("content") or ""
        if not (isinstance(thought, str) and isinstance(content, str)):
            raise TypeError("its content is no text")
        tokens = _tokens(choice)
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UpstreamError("bad_answer", f"an answer that is no chat completion: {error}", status=200) from error
    if thought or (separates and content.strip()):
        text, closed = thought, bool(content.strip())
    else:
        text, tag, _ = content.removeprefix(OPEN).partition(CLOSE)
        closed = bool(tag)
    stopped = choice.get("finish_reason") == "stop"
    told = [choice[name] for name in _STOP if name in choice]
    if stopped and not closed:
        closed = told[0] != STEP_END if told else not text.strip()
    ended = stopped and not closed
    return Said(text + STEP_END if ended else text, closed, ended, tokens, answer.usage, bool(thought))


def rating_of(said: Said) -> float:
    """The expected digit among the likeliest first tokens, from 0 to 9; none: 0."""
    shares: dict[int, float] = {}
    for token in said.tokens[:1]:
        for (_, logprob), word in zip(token.top, token.words, strict=True):
            if len(digit := word.strip()) == 1 and digit in "0123456789":
                shares[int(digit)] = shares.get(int(digit), 0.0) + math.exp(logprob)
    total = sum(shares.values())
    return sum(digit * share for digit, share in shares.items()) / total if total else 0.0


def _tokens(choice: dict[str, Any]) -> tuple[Token, ...]:
    listed: Sequence[dict[str, Any]] = (choice.get("logprobs") or {}).get("content") or ()
    found = []
    for one in listed:
        top = one.get("top_logprobs") or ()
        ranked = [(rank, float(other["logprob"])) for rank, other in enumerate(top)]
        words = tuple(str(other["token"]) for other in top)
        whole = None if (entropy := one.get("entropy")) is None else float(entropy)
        found.append(Token(str(one["token"]), float(one["logprob"]), ranked, words, whole))
    return tuple(found)
