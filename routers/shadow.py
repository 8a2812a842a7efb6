"""Which models are called beside a request, to learn what they would have answered: a share of a route's requests."""

from collections.abc import Container

from routers.aims import Shadow
from routers.options import Option
from routers.policy import Policy
from routers.seeds import SHADOW, draw
from routers.types import Query, Signals, State


def cast(
    shadow: Shadow, answering: Container[str], query: Query, signals: Signals, policy: Policy, state: State, seed: int
) -> tuple[str, ...]:
    """The models to call beside those that are `answering`: of a drawn request, each that could answer it now.

    Conversations with one answer and without tools alone: only their answers can be compared.
    """
    if query.endpoint != "chat.completions" or query.choices > 1 or query.needs_tools:
        return ()
    if draw(seed, SHADOW) >= shadow.share:
        return ()
    models = [policy.models[name] for name in shadow.models if name not in answering]
    options = [Option(model, index, query, signals, state) for index, model in enumerate(models)]
    return tuple(option.name for option in options if option.obstacle is None and not option.doubt)
