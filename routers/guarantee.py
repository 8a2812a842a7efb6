"""Which candidates may answer under a guarantee: those that its certificate speaks for, by the probe's own numbers.

It goes before every objective and bound of the route, and before exploration. It does not reach the answers of
`on_failure`: where one of them steps in, the decision says that it is degraded, or the row that there was a fallback.
"""

from collections.abc import Sequence

from routers.aims import Guarantee
from routers.options import Option
from routers.types import Signals


def hold(guarantee: Guarantee, candidates: Sequence[str], options: Sequence[Option], signals: Signals) -> list[Option]:
    """The options that may answer this query; into the others, the reason why not is written. `candidates`: all of the
    route. `signals`: as the probe gave them."""
    allowed = _allowed(guarantee, candidates, signals)
    for option in options:
        if option.name not in allowed and option.obstacle is None:
            option.reason = _why(guarantee, option, signals)
    return [option for option in options if option.name in allowed]


def _allowed(guarantee: Guarantee, names: Sequence[str], signals: Signals) -> frozenset[str]:
    bound = guarantee.bound
    if bound is None:
        return frozenset(names[-1:])
    p = {name: found.value for name in bound.candidates if (found := signals.p_success.get(name)) is not None}
    if guarantee.loss == "accepted_wrong":
        (first,) = bound.candidates
        taken = first in p and p[first] > bound.threshold
        return frozenset(names) - (frozenset() if taken else {first})
    *cheaper, last = bound.candidates
    if len(p) < len(bound.candidates):
        return frozenset({last})
    first = next((name for name in cheaper if p[name] - p[last] > bound.threshold), last)
    return frozenset({first, last})


def _why(guarantee: Guarantee, option: Option, signals: Signals) -> str:
    bound = guarantee.bound
    if bound is None:
        return "the guarantee has no certificate"
    p = signals.p_success.get(option.name)
    if p is None:
        return "p_success not known, and the guarantee asks for it"
    if guarantee.loss == "accepted_wrong":
        return f"p_success {p.value:.3g} not above {bound.threshold:.3g}, the threshold of the guarantee"
    last = signals.p_success.get(bound.candidates[-1])
    if last is None:
        return f"p_success of {bound.candidates[-1]} not known, and the guarantee asks for it"
    gap = p.value - last.value
    if gap > bound.threshold:
        return "listed after the one that the guarantee's certificate chooses"
    return f"p_success {gap:+.3g} from {bound.candidates[-1]}, the guarantee asks for more than {bound.threshold:+.3g}"
