"""One running text, as the planner sees it. No torch here."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from local_engine.types import TapSpec

if TYPE_CHECKING:
    from torch import Tensor

    from local_engine.means import Means
    from local_engine.sampler import Choice, Sampler

AGING_S = 10.0
"""Waiting this long is worth one step of priority."""


class Arriving(Protocol):
    @property
    def ready(self) -> bool: ...

    def wait(self, timeout_s: float) -> None:
        """Until it is ready, or for `timeout_s`."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and how many of them are in the KV cache. Everything a step does follows from `pending`.

    There are no phases: a prompt, forced text, a sampled token and a draft to be verified are all tokens that are not
    computed yet. With a sampler the sequence writes on whenever all are; without one it reads what it has, and rests.
    """

    ids: "array[int]"
    """The text: 32-bit token ids, so that samplers and prefix stores read them where they lie."""
    rank: tuple[float, int]
    """Its place in every line, smaller first: see `place`."""
    limit: int
    """Most tokens it may have."""
    owner: object = None
    """Whose it is; comes back with its turns."""
    sampler: "Sampler | None" = None
    scored_from: int | None = None
    """Not None: it exists to score `ids` from here on, and ends when that is done."""
    scores: "Scores | None" = None
    salt: bytes = b""
    taps: TapSpec | None = None
    means: "Means | None" = None
    """Where the hidden states of its prompt are summed."""
    prompt_len: int = 0
    """Where generated tokens begin."""
    computed: int = 0
    """Of `ids` and `draft` together, those whose KV is in the cache."""
    cached: int | None = None
    """Tokens of the prompt that the prefix store had when it was first let in; None before."""
    draft: list[int] = field(default_factory=list)
    """Guesses of what comes after `ids`, to be verified in the next step."""
    drawn_from: "Tensor | None" = None
    """[draft, vocabulary]: the distributions that the draft was drawn from; None: it was certain."""
    draftable: bool = True
    """False: drafting failed, for it or for what was written beside it."""
    floor: float | None = None
    """Not None: its draft is an offer, kept as far as no token is less probable than this (a natural logarithm)."""
    drafted: int = 0
    """Tokens of drafts that were verified, so far."""
    accepted: int = 0
    """Of them, those that were kept."""
    given: int = 0
    """Tokens that it was given to read after its prompt: forced, or offered and verified."""
    rows: int = 0
    """Tokens that were computed for it in all: also what was rejected, or computed again."""
    writes_on: "Callable[[Choice], bool] | None" = None
    """Asked after each token that it writes: may the same step bring another one? Where it has the lane to itself."""
    pinned: bool = False
    """It is read to be pinned: even a prefix store that rests is to have it."""
    expendable: bool = False
    """When a step of it fails, its owner is told; otherwise the request fails."""
    slot: int | None = None
    """Its place in the KV cache; None while it has none: then nothing is computed."""
    tapped: int = 0
    """Positions below this have had their hidden states told; computing them again tells nobody."""
    arriving: "Arriving | None" = None
    """What a slower store is fetching for it: it is let in once that is ready."""
    awaited: "tuple[Sequence, int] | None" = None
    """Who is computing a prefix of it, and how long that is: it is let in when that is done."""
    kept_logits: "Tensor | None" = None
    """[vocabulary] after its last token, which it was given with its KV: it writes from them, and computes nothing."""
    at_rest: bool = False
    """It has read all that it was given and has no sampler, or waits. It stays at rest when its KV is taken away."""

    def __post_init__(self) -> None:
        self.prompt_len = self.prompt_len or len(self.ids)

    @property
    def pending(self) -> int:
        """Tokens to compute before it can write, score or rest; drafts are not counted."""
        return 0 if self.at_rest else len(self.ids) - (self.scored_from is not None) - self.computed

    @property
    def read(self) -> int:
        """Tokens that it computed and did not write, each as often as it was given them; its own drafts are none."""
        return 0 if self.cached is None else min(self.prompt_len - self.cached + self.given, self.rows)

    @property
    def room(self) -> int:
        """The longest draft that it can verify."""
        return max(0, self.limit - len(self.ids) - 1)

    def forget(self) -> None:
        """Its KV is gone: what it has said stays, and is computed again."""
        self.slot, self.computed, self.kept_logits = None, 0, None
        self.undraft()

    def undraft(self) -> None:
        """Nothing is to be verified."""
        self.draft.clear()
        self.drawn_from = self.floor = None


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """How many tokens both begin with. O(n) with a small constant: slices are compared, not tokens."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True)
class Scores:
    """What a model thinks of given tokens, each after those before it; raw, at temperature 1."""

    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms."""
    entropies: list[float] = field(default_factory=list)
    """Of the distribution in whose place each token stands, in nats."""


def token_ids(tokens: Iterable[int]) -> "array[int]":
    """Token ids as sequences hold them."""
    return array("i", tokens)


def place(priority: int, arrived: float, serial: int) -> tuple[float, int]:
    """The rank of a sequence: priority with aging, as one number that never changes.

    Every `AGING_S` of waiting counts as one step of priority, for all alike; so the order between two of them is fixed
    when they arrive, and at most those that come within `AGING_S` times their lead in priority go first.
    """
    return arrived - priority * AGING_S, serial
