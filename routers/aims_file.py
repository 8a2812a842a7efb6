"""What a route aims at beside its objective, as a policy file has it: shapes, and what they mean together."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from routers.aims import Explore, ExploreMethod, Worth
from routers.fields import Money, Share
from routers.shape import Strict
from routers.yaml import Document, Path, concealed

if TYPE_CHECKING:
    from routers.schema import RouteFile


class WorthFile(Strict):
    """What the objective `utility` trades: it chooses the most of p_success, money and time together."""

    point: Money
    """What one point of quality is worth: a chance of a good answer higher by 0.01."""
    second: Money = 0
    """What one second until the end of the answer is worth. Default: nothing."""


class ExploreFile(Strict):
    """Answer some requests by another candidate than the best, among those that satisfy `subject_to`."""

    share: Share
    """Of the requests; no more than this, whatever is learned."""
    method: ExploreMethod = "thompson"
    """How the other candidate is drawn: `thompson`, by its chance of being the best; `softmax`, by its mean reward;
    `uniform`, each alike. Default: thompson."""
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of `softmax`: mean rewards this far apart are drawn e times as often. Default: 0.1."""


def worth_of(part: WorthFile | None) -> Worth | None:
    return None if part is None else Worth(part.point, part.second)


def explore_of(part: ExploreFile | None) -> Explore | None:
    return None if part is None else Explore(part.share, part.method, part.temperature)


def check_aims(document: Document, part: "RouteFile", path: Path, heads: Mapping[str, str] | None) -> None:
    """Report what does not fit together. `heads`: candidate to probe head; None: that section is broken itself."""

    def report(key: str, message: str, fix: str) -> None:
        document.report((*path, key), message, fix)

    candidates = part.candidates or []
    if part.objective == "utility" and part.worth is None:
        report("objective", "it is not said what quality is worth", "add `worth: {point: $0.001}`")
    if part.worth is not None and part.objective != "utility":
        report("worth", "only the objective `utility` weighs worth", "remove it, or write `objective: utility`")
    if part.objective == "threshold":
        if part.threshold is None:
            report("objective", "it is not said which threshold", "add `threshold: 0.1`, or another gap of p_success")
        if len(candidates) != 2:
            report("objective", "a threshold tells two candidates apart", "name the weak one, then the strong one")
    elif part.threshold is not None:
        report("threshold", "only the objective `threshold` has one", "remove it, or write `objective: threshold`")
    if part.explore is not None and len(candidates) < 2:
        report("explore", "nothing to explore: one candidate", "remove it, or name more candidates")
    if heads is None or part.explore is not None:  # a bandit learns p_success by itself
        return
    if part.objective in ("utility", "threshold") and (missing := [name for name in candidates if name not in heads]):
        names = ", ".join(concealed(name) for name in missing)
        report("objective", f"no probe head for {names}", "name heads for all candidates in `signals.difficulty.heads`")
