"""One plan under consideration: what it may cost, how good it may be, how long it may take, what stands in its way."""

from collections.abc import Sequence
from itertools import pairwise

from probes.types import Estimate
from routers.cascade import kept, p_accept, p_success
from routers.cost import EXPECTED_OUTPUT_TOKENS, costs_nanousd, least_input_tokens
from routers.effort import rank
from routers.errors import NoCandidateKind
from routers.placement import latency_ms, ttft_ms_p95
from routers.policy import FREE, Model
from routers.types import Accept, Candidate, Cascade, Hints, Query, Signals, Single, State
from routers.units import format_money

_NO_RAW_PROMPT = "takes conversations only, no raw prompt; send it as `messages` to /v1/chat/completions"


class Option:
    """A model, or a model at one effort."""

    __slots__ = (
        "away", "cost_high", "cost_low", "doubt", "expected", "expected_ms", "high", "index", "low", "measured_by",
        "model", "name", "obstacle", "p", "plan", "reason", "switch", "ttft_p95_ms", "utility", "violation", "worst",
    )  # fmt: skip

    def __init__(
        self, model: Model, index: int, query: Query, signals: Signals, state: State, plan: Single | None = None
    ) -> None:
        name = model.name if plan is None else plan.name
        estimate = signals.p_success.get(name)
        exact = signals.input_tokens.get(model.name)
        tokens = query.input_tokens_estimate if exact is None else exact
        told = signals.out_tokens.get(name) if signals.out_tokens else None
        answer = EXPECTED_OUTPUT_TOKENS if told is None else round(told.value)
        cached = signals.cached_tokens.get(model.name, 0) if signals.cached_tokens else 0
        self.name = name
        self.model = model
        self.plan: Single | Cascade | None = plan
        """None: the model as it is."""
        self.index = index
        if estimate is None:
            self.p = self.low = self.high = None
            self.measured_by = ""
        else:
            self.p, self.low, self.high = estimate.value, estimate.low, estimate.high
            self.measured_by = estimate.source
        self.expected, self.worst = costs_nanousd(model, query, tokens, answer, cached)
        self.cost_low = self.cost_high = None
        if told is not None and told.low is not None and told.high is not None:
            self.cost_low = costs_nanousd(model, query, tokens, round(told.low), cached)[0]
            self.cost_high = costs_nanousd(model, query, tokens, round(told.high), cached)[0]
        self.switch = 0
        """What leaving the conversation's model for this one costs beside its bill."""
        self.utility: int | None = None
        self.expected_ms: float | None = None
        self.ttft_p95_ms: float | None = None
        if state.load and (load := state.load.get(model.name)) is not None:
            asked = query.max_output_tokens
            length = answer if asked is None else min(answer, asked)
            self.expected_ms = latency_ms(load, tokens - min(cached, tokens), length)
            self.ttft_p95_ms = ttft_ms_p95(load, tokens - min(cached, tokens), length)
        self.obstacle: NoCandidateKind | None = None
        self.reason = ""
        self.away = ""
        """The model that cannot serve now, where that is the obstacle."""
        self.doubt = ""
        """Why it will probably not fit; empty: it will, or it cannot."""
        self.violation = ""
        """The first bound of its route that it does not meet, in words."""
        self._look_for_obstacle(query, exact, tokens, state)
        if query.hints is not None and self.obstacle is None:
            self._look_at_hints(query)

    def _look_for_obstacle(self, query: Query, exact: int | None, tokens: int, state: State) -> None:
        """The lasting obstacles first: what is only unavailable would run if it came back."""
        model, asked = self.model, query.max_output_tokens
        if model.embeds or query.endpoint != "chat.completions":
            if model.embeds != (query.endpoint == "embeddings"):
                self.obstacle, self.reason = "capability", "only embeds" if model.embeds else "cannot embed"
                return
            if query.endpoint == "completions" and not model.completes:
                self.obstacle, self.reason = "capability", _NO_RAW_PROMPT
                return
        if query.needs_tools and not model.tools:
            self.obstacle, self.reason = "capability", "cannot call tools"
        elif query.needs_format and not model.structured:
            self.obstacle, self.reason = "capability", "cannot hold to a JSON format"
        elif query.needs_logprobs and not model.logprobs:
            self.obstacle, self.reason = "capability", "cannot return log probabilities"
        elif asked is not None and model.max_output is not None and asked > model.max_output:
            self.obstacle = "context_length"
            most = model.max_output
            self.reason = f"answers at most {most} tokens, {asked} asked; send max_tokens: {most}"
        elif (
            model.context is not None
            and tokens // query.inputs + (asked or 1) > model.context
            and (does_not_fit := self._does_not_fit(model.context, query, exact, tokens // query.inputs))
        ):
            self.obstacle, self.reason = "context_length", does_not_fit
        elif (state.budget_remaining_nanousd is not None or state.degrade is not None) and (
            over_budget := self._over_budget(query, state)
        ):
            self.obstacle, self.reason = "budget", over_budget
        elif model.name in state.unavailable:
            self.obstacle, self.reason = "unavailable", f"unavailable: {state.unavailable[model.name]}"
            self.away = model.name

    def _look_at_hints(self, query: Query) -> None:
        """What the caller rules out by its own hints runs for nobody, not even in reserve."""
        hints, plan = query.hints, self.plan
        assert hints is not None
        if hints.models is not None and self.model.name not in hints.models:
            self.obstacle, self.reason = "constraints", "not among the models that the caller allows"
        elif self._look_at_cost_hint(hints):
            return
        elif hints.effort is not None and plan is not None and plan.effort and rank(plan.effort) > rank(hints.effort):
            self.obstacle = "constraints"
            self.reason = f"effort {plan.effort}, at most {hints.effort} asked by the caller"

    def _look_at_cost_hint(self, hints: Hints) -> bool:
        most = hints.max_cost_nanousd
        if most is None or (self.expected is not None and self.expected <= most):
            return False
        words = "its price is not known" if self.expected is None else f"expected cost {format_money(self.expected)}"
        self.obstacle, self.reason = "constraints", f"{words}, at most {format_money(most)} asked by the caller"
        return True

    def _does_not_fit(self, context: int, query: Query, exact: int | None, tokens: int) -> str:
        """Of a prompt that by these tokens does not: in words, or empty where it may all the same."""
        out = query.max_output_tokens or 1
        if exact is not None:
            fix = f"; send max_tokens: {context - tokens}" if tokens < context else ""
            return f"does not fit: {tokens} tokens in and {out} out, context {context}{fix}"
        least = least_input_tokens(query)
        if least + out > context:
            fix = f"; send a max_tokens below {context - least}" if least + 1 < context else ""
            return f"does not fit: at least {least} tokens in and {out} out, context {context}{fix}"
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

    def candidate(self, running: bool) -> Candidate:
        """As a decision keeps it; `running`: chosen or in reserve, so not rejected."""
        ms = self.expected_ms
        return Candidate(
            self.name,
            self.p,
            self.low,
            self.high,
            self.expected,
            self.worst,
            "" if running else self.reason,
            None if ms is None else round(ms),
            self.switch,
            self.utility,
            self.measured_by,
            self.cost_low,
            self.cost_high,
        )


class CascadeOption(Option):
    """Several models in turn, each asked where the answer before it is not accepted."""

    __slots__ = ()

    def __init__(
        self, plan: Cascade, index: int, stages: Sequence[Option], query: Query, whole: Estimate | None = None
    ) -> None:
        """`whole`: P(success) of all of it, where its own answers were rated; used where the stages' are not known."""
        first = stages[0]
        self.name, self.model, self.plan, self.index = plan.name, first.model, plan, index
        accept = plan.accept
        self.p = _folded([stage.p for stage in stages], accept)
        self.low = _folded([stage.low for stage in stages], accept)
        self.high = _folded([stage.high for stage in stages], accept)
        self.measured_by = first.measured_by
        if self.p is None and whole is not None:
            self.p, self.low, self.high, self.measured_by = whole.value, whole.low, whole.high, whole.source
        asked = _asked(plan, [stage.p for stage in stages])
        self.switch, self.utility, self.violation = 0, None, ""
        expected = _expected([stage.expected for stage in stages], asked)
        self.expected = None if expected is None else round(expected)
        low, high = (_expected([getattr(one, end) for one in stages], asked) for end in ("cost_low", "cost_high"))
        self.cost_low = None if low is None else round(low)
        self.cost_high = None if high is None else round(high)
        times = [_longest([one.expected_ms for one in beside]) for beside in _rounds(stages, plan)]
        self.expected_ms = _expected(times, [asked[at] for at in _begins(plan)])
        worst = [stage.worst for stage in stages]
        self.worst = None if None in worst else sum(cost or 0 for cost in worst)
        waits = [*times[:-1], stages[-1].ttft_p95_ms]
        self.ttft_p95_ms = None if None in waits else sum(wait or 0 for wait in waits)
        self.obstacle, self.reason, self.away = None, "", ""
        self.doubt = next((stage.doubt for stage in stages if stage.doubt), "")
        if query.endpoint != "chat.completions" or query.choices > 1:
            self.obstacle, self.reason = "capability", "a cascade judges one answer to a conversation"
        for stage in stages:
            if stage.obstacle is not None and self.obstacle is None:
                self.obstacle, self.reason, self.away = stage.obstacle, f"{stage.name}: {stage.reason}", stage.away
        if query.hints is not None and self.obstacle is None:
            self._look_at_cost_hint(query.hints)


def _folded(p: Sequence[float | None], accept: Accept) -> float | None:
    """P(success) of the stages in turn; None: that of one of them is not known."""
    found = p[-1]
    if accept.agree:
        keeps = kept(accept, p[1:-1])
        return None if p[0] is None or found is None or keeps is None else p_success(p[0], found, keeps)
    for stage in reversed(p[:-1]):
        if stage is None or found is None or (keeps := kept(accept, ())) is None:
            return None
        found = p_success(stage, found, keeps)
    return found


def _asked(plan: Cascade, p: Sequence[float | None]) -> list[float]:
    """The chance that each stage is asked; certain where it is not known when one before it is accepted.

    Of agreement, it is foretold for the round in which enough have answered; nobody is counted on to agree later.
    """
    accept, found, before = plan.accept, [1.0], 1.0
    for at, stage in enumerate(plan.stages[1:], 1):
        if not stage.beside:
            first, keeps = (p[0], kept(accept, p[1:-1])) if accept.agree else (p[at - 1], kept(accept, ()))
            if at >= accept.agree and first is not None and keeps is not None:
                goes_on = 1 - p_accept(first, keeps)
                before = goes_on if accept.agree else before * goes_on
        found.append(before)
    return found


def _begins(plan: Cascade) -> list[int]:
    return [at for at, stage in enumerate(plan.stages) if not stage.beside]


def _rounds(stages: Sequence[Option], plan: Cascade) -> list[Sequence[Option]]:
    """The stages that are asked at the same time, in turn."""
    begins = [*_begins(plan), len(stages)]
    return [stages[begin:end] for begin, end in pairwise(begins)]


def _longest(times: Sequence[float | None]) -> float | None:
    """Until the last of them has answered; None: one of them is not known."""
    return None if None in times else max(time or 0.0 for time in times)


def _expected(of_stages: Sequence[float | None], asked: Sequence[float]) -> float | None:
    """The sum over the stages, each weighed by the chance that it is asked; None: one of them is not known."""
    if None in of_stages:
        return None
    return sum(chance * (value or 0.0) for value, chance in zip(of_stages, asked, strict=True))
