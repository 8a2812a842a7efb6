"""One plan under consideration: what it may cost, how good it may be, and what stands in its way."""

from routers.cost import costs_nanousd, least_input_tokens
from routers.errors import NoCandidateKind
from routers.policy import FREE, Model
from routers.types import Candidate, Query, Signals, State
from routers.units import format_money


class Option:
    """One model under consideration."""

    __slots__ = ("doubt", "expected", "index", "model", "obstacle", "p", "reason", "violation", "worst")

    def __init__(self, model: Model, index: int, query: Query, signals: Signals, state: State) -> None:
        name = model.name
        estimate = signals.p_success.get(name)
        exact = signals.input_tokens.get(name)
        tokens = query.input_tokens_estimate if exact is None else exact
        self.model = model
        self.index = index
        self.p = None if estimate is None else estimate.value
        self.expected, self.worst = costs_nanousd(model, query, tokens)
        self.obstacle: NoCandidateKind | None = None
        self.reason = ""
        self.doubt = ""
        """Why it will probably not fit; empty: it will, or it cannot."""
        self.violation = ""
        """The first bound of its route that it does not meet, in words."""
        self._look_for_obstacle(query, exact, state)

    def _look_for_obstacle(self, query: Query, exact: int | None, state: State) -> None:
        """The lasting obstacles first: what is only unavailable would run if it came back."""
        model, asked = self.model, query.max_output_tokens
        if model.embeds != (query.endpoint == "embeddings"):
            self.obstacle, self.reason = "capability", "only embeds" if model.embeds else "cannot embed"
        elif query.endpoint == "completions" and not model.completes:
            self.obstacle, self.reason = "capability", "takes conversations only, no raw prompt"
        elif query.needs_tools and not model.tools:
            self.obstacle, self.reason = "capability", "cannot call tools"
        elif query.needs_format and not model.structured:
            self.obstacle, self.reason = "capability", "cannot hold to a JSON format"
        elif query.needs_logprobs and not model.logprobs:
            self.obstacle, self.reason = "capability", "cannot return log probabilities"
        elif asked is not None and model.max_output is not None and asked > model.max_output:
            self.obstacle = "context_length"
            self.reason = f"answers at most {model.max_output} tokens, {asked} asked"
        elif does_not_fit := self._does_not_fit(query, exact):
            self.obstacle, self.reason = "context_length", does_not_fit
        elif over_budget := self._over_budget(query, state):
            self.obstacle, self.reason = "budget", over_budget
        elif model.name in state.unavailable:
            self.obstacle, self.reason = "unavailable", f"unavailable: {state.unavailable[model.name]}"

    def _does_not_fit(self, query: Query, exact: int | None) -> str:
        context, out = self.model.context, query.max_output_tokens or 1
        if context is None:
            return ""
        tokens = (query.input_tokens_estimate if exact is None else exact) // query.inputs
        if tokens + out <= context:
            return ""
        if exact is not None:
            return f"does not fit: {tokens} tokens in and {out} out, context {context}"
        least = least_input_tokens(query)
        if least + out > context:
            return f"does not fit: at least {least} tokens in and {out} out, context {context}"
        self.doubt = f"likely does not fit: about {tokens} tokens in and {out} out, context {context}"
        return ""

    def _over_budget(self, query: Query, state: State) -> str:
        remaining = state.budget_remaining_nanousd
        if state.degrade == "local" and self.model.price != FREE:
            what = "its price is not known" if self.model.price is None else "costs money"
            return f"{what}, and {state.degrade_reason}"
        if remaining is None:
            return ""
        if self.worst is None:
            return "its price is not known, and a budget cannot hold for it"
        if self.worst <= max(remaining, 0):
            return ""
        words = f"may cost {format_money(self.worst)}, budget left {format_money(remaining)}"
        return words if query.max_output_tokens is not None else f"{words}; send max_tokens to reserve less"

    def candidate(self, signals: Signals, running: bool) -> Candidate:
        """As a decision keeps it; `running`: chosen or in reserve, so not rejected."""
        name = self.model.name
        estimate = signals.p_success.get(name)
        low, high = (None, None) if estimate is None else (estimate.low, estimate.high)
        return Candidate(name, self.p, low, high, self.expected, self.worst, "" if running else self.reason)
