"""By which names the models of an engine that listens are asked for."""

from collections.abc import Callable, Mapping

from gateway.errors import UnknownModel
from local_engine.client import EngineClient
from local_engine.types import ModelCard


class ModelNames:
    """The names of the policy that the engine was started by, several of which may be one model, and the engine's own.

    Its own are what a policy writes as `model`, and so what gateways elsewhere send; they stand before the policy's.
    """

    def __init__(self, client: Callable[[], EngineClient], by_policy: Mapping[str, str]) -> None:
        """`client` raises what is to be answered while there is no engine; `by_policy`: name → the engine's name."""
        self._client = client
        self._by_policy = by_policy

    def known(self) -> dict[str, ModelCard]:
        """Name → the model that it means; its card has the engine's name."""
        cards = {card.name: card for card in self._client().hello.models}
        return {**{name: cards[own] for name, own in self._by_policy.items()}, **cards}

    def find(self, name: str) -> ModelCard:
        """Raises UnknownModel."""
        known = self.known()
        if name not in known:
            there = ", ".join(known) or "none"
            raise UnknownModel(f"model: {name[:100]!r} is not loaded; there is {there}.", param="model")
        return known[name]
