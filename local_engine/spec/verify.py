"""What to keep of a draft, so that nobody can tell that there was one.

Two ways, both exact. *Agreement*: the token of every row is chosen as if the draft before it were right, and the draft
is kept as far as it says the same. Choices depend on seed and position alone, so the text is, token for token, what it
is without drafts; and as a draft that was certain of its token could not be kept more often than the model itself
chooses that token, nothing is lost. *Rejection sampling* (Leviathan et al. 2023; Chen et al. 2023), for drafts that
were drawn from a distribution q: token x is kept with probability min(1, p(x) / q(x)), or else drawn anew from what p
has more than q, max(0, p - q). Text has the distribution p; which one of the texts it is depends on the drafts.

An *offer* (a window with a floor) is another matter: text that somebody else wrote, kept where it is probable enough.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from local_engine.sampler import Choice, Sampler, as_choices, distributions, draw, pick_all

DRAFT_STREAM = 1
_ACCEPT_STREAM = 2
_RESIDUAL_STREAM = 3


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence in a verifying step: a row of logits after its history and one after each drafted token."""

    sampler: Sampler
    history: "array[int]"
    """Prompt and answer so far."""
    drafted: Sequence[int] = ()
    distributions: torch.Tensor | None = None
    """[drafted, vocabulary]: what the drafted tokens were drawn from, by DRAFT_STREAM; None: compare for agreement."""

    floor: float | None = None
    """An offer: keep the tokens before the first that is less probable, a natural logarithm."""

    @property
    def rows(self) -> int:
        return 1 + len(self.drafted)

    def before(self, at: int) -> "array[int]":
        """The history of row `at`."""
        return self.history + array("i", self.drafted[:at]) if at else self.history


def verify(logits: torch.Tensor, windows: Sequence[Window]) -> list[list[Choice]]:
    """The tokens that each window adds to its text: those of the draft that are kept, then one more.

    `logits`: float32, [rows of all windows in order, vocabulary].
    """
    if sum(window.rows for window in windows) != len(logits):
        raise ValueError(f"the windows have {sum(window.rows for window in windows)} rows, the logits {len(logits)}")
    starts, row = [], 0
    for window in windows:
        starts.append(row)
        row += window.rows
    together = [at for at, window in enumerate(windows) if _compared_at_once(window)]
    found = dict(zip(together, _agreements(logits, windows, starts, together), strict=True))
    for at, window in enumerate(windows):
        if window.floor is not None:
            found[at] = _taken(logits[starts[at] : starts[at] + window.rows], window, window.floor)
        elif at not in found:
            found[at] = _one_by_one(logits[starts[at] : starts[at] + window.rows], window)
    return [found[at] for at in range(len(windows))]


def _compared_at_once(window: Window) -> bool:
    """Constrained rows are not: what may follow a draft that was not allowed is not defined."""
    return window.distributions is None and window.sampler.constraint is None and window.floor is None


def _taken(logits: torch.Tensor, window: Window, floor: float) -> list[Choice]:
    """What is probable enough of an offer, and the window's own token after it; all measured."""
    count = len(window.drafted)
    logprobs = torch.log_softmax(logits, -1)
    offered = torch.tensor(window.drafted, dtype=torch.int64, device=logits.device).unsqueeze(1)
    thought = logprobs[:count].gather(1, offered).squeeze(1).tolist()
    kept = next((at for at, logprob in enumerate(thought) if logprob < floor), count)
    entropies = torch.special.entr(logprobs[:kept].exp()).sum(-1).tolist()
    choices = [Choice(window.drafted[at], thought[at], [], entropies[at]) for at in range(kept)]
    return [*choices, window.sampler.pick(logits[kept], window.before(kept))]


def _agreements(
    logits: torch.Tensor, windows: Sequence[Window], starts: Sequence[int], which: Sequence[int]
) -> list[list[Choice]]:
    if not which:
        return []
    rows = [starts[at] + row for at in which for row in range(windows[at].rows)]
    samplers = [windows[at].sampler for at in which for _ in range(windows[at].rows)]
    histories = [windows[at].before(row) for at in which for row in range(windows[at].rows)]
    picked = iter(pick_all(logits if len(rows) == len(logits) else logits[rows], samplers, histories))
    runs = []
    for at in which:
        choices = [next(picked) for _ in range(windows[at].rows)]
        runs.append(_kept(windows[at], choices.__getitem__))
    return runs


def _kept(window: Window, choose: Callable[[int], Choice]) -> list[Choice]:
    """Choices row by row, up to the first that is not the drafted token."""
    choices: list[Choice] = []
    for row in range(window.rows):
        choices.append(choose(row))
        if row < len(window.drafted) and choices[-1].token != window.drafted[row]:
            break
    return choices


def _one_by_one(logits: torch.Tensor, window: Window) -> list[Choice]:
    sampler, proposed = window.sampler, window.distributions
    if proposed is None:
        return _kept(window, lambda row: sampler.pick(logits[row], window.before(row)))
    count = len(window.drafted)
    wanted: torch.Tensor | None = None
    if sampler.constraint is None and count:
        wanted = distributions(logits[:count], [sampler] * count, [window.before(row) for row in range(count)])

    def choose(row: int) -> Choice:
        history = window.before(row)
        if row == count:
            return sampler.pick(logits[row], history)
        p = sampler.distribution(logits[row], history) if wanted is None else wanted[row]
        token = _accepted_or_redrawn(sampler, len(history), window.drafted[row], p, proposed[row])
        return as_choices(logits[row : row + 1], [sampler], [token])[0]

    return _kept(window, choose)


def _accepted_or_redrawn(sampler: Sampler, position: int, token: int, p: torch.Tensor, q: torch.Tensor) -> int:
    if sampler.uniform(position, _ACCEPT_STREAM) * float(q[token]) < float(p[token]):
        return token
    residual = (p - q).clamp_(min=0)
    if not float(residual.sum()) > 0:  # p equals q but for rounding
        return token
    return int(draw(residual.unsqueeze(0), [sampler.uniform(position, _RESIDUAL_STREAM)]))
