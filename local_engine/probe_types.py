"""What the engine needs of probes, which it does not know: the gateway passes them in. No torch here."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from local_engine.types import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Sounding(Protocol):
    """What a probe says of one conversation; what it abstains from is absent."""

    @property
    def p_success(self) -> Mapping[str, float]:
        """Calibrated P(correct) per head."""
        ...

    @property
    def undecided(self) -> Collection[str]:
        """Heads of which it knows hardly more than the base rate."""
        ...

    @property
    def out_tokens(self) -> Mapping[str, tuple[float, float, float]]: ...

    @property
    def domain(self) -> Mapping[str, float]: ...

    @property
    def needs_reasoning(self) -> float | None: ...


class Prober(Protocol):
    """What the engine needs of a probe; the gateway passes one in, so that engine and probes stay strangers."""

    @property
    def version(self) -> str: ...

    @property
    def heads(self) -> Sequence[str]: ...

    def sound(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Sounding]:
        """One for each conversation; called on a thread of its own, one call at a time."""
        ...

    def embed(self, texts: Sequence[str]) -> tuple[bytes, int, int]:
        """(float32 little-endian [n, dims] bytes, dims, tokens read)."""
        ...


class Rating(msgspec.Struct, frozen=True):
    """What a model says of itself when it has read a prompt: see `local_engine.sounding`."""

    entropy: float
    """Of the first token of its answer, in nats."""
    p_true: float | None = None
    """P(yes), of yes and no, after a question about the prompt; None where nothing was asked."""
    internal_confidence: float | None = None


class PromptReader(Protocol):
    """What the engine needs of a probe that hears a model's own reading of a prompt."""

    @property
    def version(self) -> str: ...

    @property
    def heads(self) -> Sequence[str]: ...

    @property
    def layers(self) -> Sequence[int]:
        """Whose hidden states it is given, numbered as in TapSpec."""
        ...

    @property
    def over(self) -> Literal["last", "prompt"]:
        """Those of the prompt's last token, or their mean over all of its tokens."""
        ...

    @property
    def question(self) -> str:
        """What is asked about the prompt; empty: nothing, and the rating has its entropy alone."""
        ...

    @property
    def answers(self) -> tuple[str, str]:
        """Yes and no, as the question's answer begins."""
        ...

    def read(self, states: "npt.NDArray[np.float32]", rating: Rating) -> Sounding:
        """`states`: [layers, width], as `over` says. Called between two steps: be quick."""
        ...
