"""Who comes first at a target that has a line: what a caller may ask for, and what nobody waits for.

Larger is more urgent, as in the local engine, where ten seconds of waiting are worth one, and in SGLang; vLLM counts
the other way round and is told so. A route's `priority` is the most that its requests have: callers may only lower it.
"""

from gateway.errors import InvalidRequest
from gateway.upstream.types import ChatCall
from routers.policy import PRIORITIES, Route

BESIDE = 10
"""How far shadows and their judges stand below the request that they came from, and below any interactive one."""


def check_priority(name: str, asked: int) -> int:
    """Raises InvalidRequest for what is out of range."""
    if asked not in PRIORITIES:
        raise InvalidRequest(
            f"{name}: {str(asked)[:20]} is not between {PRIORITIES.start} and {PRIORITIES.stop - 1}.", param=name
        )
    return asked


def priority_of(asked: int | None, route: Route | None) -> int:
    """The priority of a request: its route's, or less where its caller asks for less."""
    most = route.priority if route is not None else 0
    return most if asked is None else min(asked, most)


def beside(call: ChatCall) -> int:
    """Of what is asked beside a request, while nobody waits."""
    return max(PRIORITIES.start, min(call.priority or 0, 0) - BESIDE)
