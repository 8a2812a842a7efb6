"""A model's plans as a policy states them: how compute is spent on its answers, and by whom that can be done.

A plan of the local engine runs within it, token by token, with a draft of the same engine. Any other one is run by the
gateway over calls that go on from the thought so far (`gateway.stepping`): both models take the start of an answer, and
only rules that need no hidden states and no scores of given tokens are for them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from routers.plan_fields import unread
from routers.plans import EFFORTS
from routers.policy import FREE, EnginePlan, Model, PlanOption, Provider
from routers.schema import CascadePlanFile, ExitFile, ModelFile, PlanFile, SpeculateFile, VoteFile
from routers.shape import did_you_mean
from routers.types import Effort
from routers.yaml import Document, Path, concealed

WAYS = ("exit", "speculate", "cascade", "vote")
_NEEDS_LOGPROBS = {"specreason": "model", "glimprouter": "draft", "entropy": "both"}
"""Which side has to return log probabilities, by method."""
_THRESHOLDS = {
    "score": (-math.inf, 0.0, "the log probability of a token"),
    "specreason": (0.0, 9.0, "a rating"),
    "glimprouter": (0.0, 3.0, "the entropy of a first token's 20 likeliest, in nats"),
    "entropy": (0.0, 15.0, "the mean entropy of the last tokens, in nats"),
    "speculative_thinking": (-math.inf, math.inf, ""),
}
"""Method → (the least, the most that a threshold can mean, what is held against it)."""
_REMOTE_METHODS = "specreason, glimprouter, speculative_thinking or entropy"


def read_plans(
    document: Document, part: ModelFile, path: Path, local: bool, prefix: bool
) -> tuple[tuple[Effort, EnginePlan], ...]:
    """By effort; what is wrong with one by itself is reported. `local`: on the local engine; `prefix`: it goes on from
    the start of an answer."""
    given: dict[Path, PlanFile] = {} if part.plan is None else {("plan",): part.plan}
    for effort in EFFORTS:
        if part.plans is not None and (plan := getattr(part.plans, effort)) is not None:
            given["plans", effort] = plan
    read: dict[Path, EnginePlan] = {}
    for field, file in given.items():
        plan = to_plan(file)
        if plan is None:
            document.report((*path, *field), "not one way to spend compute", f"write one of {', '.join(WAYS)}")
            continue
        for where, message, fix in (*unread(file), *_unfinished(file)):
            document.report((*path, *field, *where), message, fix)
        if not local and (problem := _remote_problem(file, part, prefix)) is not None:
            document.report((*path, *field, *problem[0]), *problem[1:])
        read[field] = plan
    default = read.get(("plan",))
    by_effort = [(effort, read.get(("plans", effort), default)) for effort in EFFORTS]
    return tuple((effort, plan) for effort, plan in by_effort if plan is not None)


def check_drafts(
    document: Document, models: Mapping[str, Model], providers: Mapping[str, Provider], names: Sequence[str]
) -> None:
    """A draft is another model; of an engine's own plan, one of the same engine. It has no plan of its own."""
    drafted = [(model, field, plan) for model in models.values() for field, plan in _with_drafts(document, model)]
    for model, field, plan in dict.fromkeys(drafted):
        assert plan.draft is not None
        draft, path = models.get(plan.draft), ("models", model.name, *field, plan.kind)
        named = (*path, "draft")
        if draft is None:
            if plan.draft not in names:
                fix = did_you_mean(plan.draft, list(names))
                document.report(named, "no model of this name", fix, show=False)
            continue
        at_home = providers[model.provider].engine is not None
        if draft.upstream == model.upstream and draft.provider == model.provider:
            document.report(named, "the model itself", "name a smaller one", show=False)
        elif draft.embeds or (draft.provider != model.provider and at_home and plan.kind == "cascade"):
            fix = f"name a model that {model.provider} runs and that answers conversations"
            document.report(named, "not a model of the same engine", fix, show=False)
        elif draft.price is None and model.price is not None:
            fix = f"write a price for {concealed(plan.draft)}, or `price: free`; budgets hold for both"
            document.report(named, f"has no price, and {concealed(model.name)} has one", fix, show=False)
        elif draft.price != FREE and model.price == FREE:
            fix = f"write a price for {concealed(model.name)}; what is free stays open when a budget is spent"
            document.report(named, f"costs money, and {concealed(model.name)} is free", fix, show=False)
        elif plan.kind == "speculate" and not (at_home and draft.provider == model.provider):
            _check_apart(document, model, draft, plan, path)


def _check_apart(document: Document, model: Model, draft: Model, plan: EnginePlan, path: Path) -> None:
    """Two models that do not share an engine: what the method needs of each."""
    method = str(plan.stated["method"])
    if method == "score":
        fix = f"write `method: specreason`, or another of {_REMOTE_METHODS}"
        document.report((*path, "method"), "`score` reads both models' tokens within one engine", fix, show=False)
        return
    for side, one in (("model", model), ("draft", draft)):
        if one.prefix is None:
            fix = f"say `prefix: …` of {concealed(one.name)}, if its server does, or name another model"
            document.report(path, f"{concealed(one.name)} does not go on from the start of an answer", fix)
        if not one.logprobs and _NEEDS_LOGPROBS.get(method) in (side, "both"):
            fix = "write `method: speculative_thinking`, which reads words, or name another model"
            document.report(path, f"{concealed(one.name)} returns no log probabilities, which {method} reads", fix)


def _with_drafts(document: Document, model: Model) -> list[tuple[Path, EnginePlan]]:
    """(the field that says so, the plan) of those plans that have a draft."""
    stated = document.at(("models", model.name, "plans"))
    own = stated if isinstance(stated, dict) else {}
    return [
        (("plans", effort) if effort in own else ("plan",), plan)
        for effort, plan in model.plans
        if plan.draft is not None
    ]


def _remote_problem(file: PlanFile, part: ModelFile, prefix: bool) -> tuple[Path, str, str] | None:
    """(field, what is wrong, the fix) of a plan for a model that is reached by an API."""
    if file.vote is not None or file.cascade is not None:
        way = "vote" if file.vote is not None else "cascade"
        fix = "remove it, or let the model run on the local engine"
        if way == "cascade":
            fix += "; a route's candidates cascade over any models, such as `weak>strong`"
        return (way,), f"only the local engine runs {way}", fix
    if not prefix:
        way = "exit" if file.exit is not None else "speculate"
        fix = "say `prefix: …`, if its server does, or remove the plan"
        return (way,), "the model does not go on from the start of an answer", fix
    if (leave := file.exit) is None:
        return None
    if leave.rule == "probe":
        fix = "write convergence, redundancy, momentum or budget"
        return ("exit", "rule"), "a probe reads hidden states, which no API gives", fix
    if leave.rule == "budget" and leave.budget is None:
        return ("exit",), "no budget was fitted for a model that runs elsewhere", "add `budget: …`, in tokens"
    if leave.rule == "momentum" and not part.logprobs:
        return ("exit", "rule"), "momentum reads log probabilities, which it does not return", "write redundancy"
    return None


def _unfinished(file: PlanFile) -> list[tuple[Path, str, str]]:
    """(field, what is wrong, the fix) of what a plan says by half."""
    found: list[tuple[Path, str, str]] = []
    if file.speculate is not None and (threshold := file.speculate.threshold) is not None:
        least, most, what = _THRESHOLDS[file.speculate.method]
        if not least <= threshold <= most:
            bounds = f"at most {most:g}" if least == -math.inf else f"from {least:g} to {most:g}"
            message = f"`{file.speculate.method}` holds {what} against it, which is {bounds}"
            found.append((("speculate", "threshold"), message, f"write a number {bounds}, or leave it out"))
    if file.cascade is not None:
        rule, path = file.cascade.accept, ("cascade", "accept")
        if rule.go_on_above > 0 and rule.prospect_weights is None:
            fix = "add `prospect_weights: …`, or leave out go_on_above"
            found.append(((*path, "go_on_above"), "it is not said by what an answer's prospects are judged", fix))
        if rule.go_on_above == 0 and rule.prospect_weights is not None:
            fix = "add `go_on_above: …`, or remove them"
            found.append(((*path, "prospect_weights"), "nothing is abandoned by them", fix))
    if file.vote is not None and file.vote.exit is not None:
        nested = PlanFile(exit=file.vote.exit)
        found += [(("vote", *where), message, fix) for where, message, fix in unread(nested)]
    return found


def read_plan(stated: Mapping[str, object]) -> EnginePlan:
    """A plan as a policy states it. Raises ValueError."""
    plan = to_plan(PlanFile.model_validate(stated))
    if plan is None:
        raise ValueError(f"a plan is one of {', '.join(WAYS)}; not {', '.join(stated) or 'none'}")
    return plan


def to_plan(part: PlanFile) -> EnginePlan | None:
    """None: it states none, or several."""
    if sum(getattr(part, way) is not None for way in WAYS) != 1:
        return None
    if part.speculate is not None:
        return EnginePlan("speculate", _stated(part.speculate), part.speculate.draft)
    if part.cascade is not None:
        return EnginePlan("cascade", _stated(part.cascade), part.cascade.draft)
    if part.vote is not None:
        return EnginePlan("vote", _stated(part.vote))
    assert part.exit is not None
    return EnginePlan("exit", _stated(part.exit))


def _stated(part: ExitFile | SpeculateFile | CascadePlanFile | VoteFile) -> tuple[tuple[str, PlanOption], ...]:
    return _frozen(part.model_dump(exclude_none=True, exclude={"draft"}))


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, PlanOption], ...]:
    return tuple((name, _frozen(value) if isinstance(value, dict) else value) for name, value in options.items())
