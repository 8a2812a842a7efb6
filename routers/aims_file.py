"""What a route aims at beside its objective, as a policy file has it: shapes, and what they mean together."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from routers.aims import (
    Affinity,
    Explore,
    ExploreMethod,
    Guarantee,
    GuaranteedLoss,
    Thinking,
    ThinkingField,
    Worth,
)
from routers.fields import Duration, Money, Share, Text
from routers.plans import MAX_STAGES, models_of, plan_name
from routers.policy import Model
from routers.shape import Strict
from routers.types import Accept, AnswerFeature, Single
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


_Probability = Annotated[float, Field(ge=0, le=1)]


class AffinityFile(Strict):
    """Conversations stay with the model that answered them last, unless leaving it is worth its price."""

    ttl: Duration = 300_000
    """How long a provider keeps a prefix after it was last used. Default: 5min."""
    comes_back: _Probability = 0.5
    """How likely a conversation is to come back after its prefix has been dropped, and pay for it again: the price of
    leaving is this share of what the prefix is worth. Default: 0.5."""
    release: _Probability = 0.3
    """How much of a rise in p_success is believed from one turn to the next; a fall is believed whole, so that a hard
    turn moves up at once and easy ones come back slowly. 1: all of it. Default: 0.3."""
    bound: Literal["strip", "keep"] = "strip"
    """What becomes of blocks that only their own provider reads again (thinking signatures, encrypted reasoning):
    `strip`, left out for another provider; `keep`, the conversation stays with its provider. Default: strip."""


class ThinkingFile(Strict):
    """How a model is told how much to think. Effort is off, low or high, with a budget of tokens each."""

    field: ThinkingField
    """What its provider takes: `reasoning_effort` (OpenAI, and the local engine), `enable_thinking` (chat templates at
    vLLM and SGLang), or `thinking_budget` (Qwen's: on or off, and tokens)."""
    off: Literal["none", "minimal"] = "none"
    """The provider's word for no thinking. Default: none."""
    low_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    high_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 8192


class AcceptFile(Strict):
    """When the answer of a cascade's earlier stage is sent: as several stages agree, or by its P(correct), a logistic
    regression over the answer, as `leadline probe accept` fits it."""

    rule: Text | None = None
    """A file that `leadline probe accept` wrote, beside this policy or by its path; all numbers below are in it."""

    agree: Annotated[int, Field(ge=2, le=MAX_STAGES - 1)] | None = None
    """So many stages must give the same final answer: `accept: agree` is `accept: {agree: 2}`. What cannot be compared
    counts as another answer. Default: by P(correct)."""

    mean_logprob: float = 0.0
    """Weight of the mean log probability of its tokens."""
    min_logprob: float = 0.0
    """Weight of the least of them."""
    log_tokens: float = 0.0
    """Weight of the natural logarithm of their number."""
    bias: float = 0.0
    at_least: _Probability | None = None
    """Accepted from this P(correct) on."""
    keeps_right: _Probability | None = None
    """The share of the first stage's right answers that this accepts, as measured on held-out ones. Default, of
    `agree`: as if each stage erred by itself."""
    keeps_wrong: _Probability | None = None
    """The share of its wrong answers that this accepts. Default, of `agree`: as if wrong ones were always the same."""
    unaccepted: Literal["send", "fail"] = "send"
    """Where no later stage answers, as time, money or its provider is gone: `send` the best answer so far, marked
    `not_accepted`, or `fail`. Default: send."""


_MEANING = {
    "at_least": "the P(correct) from which an answer is accepted",
    "keeps_right": "the share of right answers that it accepts; `leadline probe accept` measures it",
    "keeps_wrong": "the share of wrong answers that it accepts; `leadline probe accept` measures it",
}
_NUMBERS = ("mean_logprob", "min_logprob", "log_tokens", "bias", "at_least", "keeps_right", "keeps_wrong")
RuleLookup = Callable[[str], Mapping[str, float]]
"""The file of an accept rule → its numbers, by the names of `AcceptFile`. Raises ValueError, which says why and the
fix."""


def with_rule(document: Document, part: AcceptFile, path: Path, lookup: RuleLookup) -> AcceptFile:
    """With the numbers of the file that it names, if it does."""
    if part.rule is None:
        return part
    for key in ("agree", *_NUMBERS):
        if key in part.model_fields_set:
            fix = f"remove it, or remove `rule`, which says {'when' if key == 'agree' else 'it'}"
            document.report((*path, key), "the rule's file says when an answer is accepted", fix)
    try:
        numbers = lookup(part.rule)
    except ValueError as error:
        document.report((*path, "rule"), *str(error).rsplit("; ", 1))
        return part
    return part.model_copy(update={**numbers, "agree": None})


def accept_of(part: AcceptFile | None) -> Accept:
    """A broken rule, or none, which has been reported, stands as if it accepted nothing."""
    if part is None or (part.agree is None and None in (part.at_least, part.keeps_right, part.keeps_wrong)):
        return Accept(keeps_right=0.0)
    if part.agree is not None:
        kept = part.keeps_right, part.keeps_wrong
        return Accept(agree=part.agree, keeps_right=kept[0], keeps_wrong=kept[1], unaccepted=part.unaccepted)
    features: tuple[AnswerFeature, ...] = ("mean_logprob", "min_logprob", "log_tokens")
    weights = tuple((name, weight) for name in features if (weight := getattr(part, name)))
    at_least = 1.0 if part.at_least is None else part.at_least
    return Accept(weights, part.bias, at_least, part.keeps_right, part.keeps_wrong, unaccepted=part.unaccepted)


def thinking_of(part: ThinkingFile | None) -> Thinking | None:
    return None if part is None else Thinking(part.field, part.low_tokens, part.high_tokens, part.off)


class GuaranteeFile(Strict):
    """How often a decision may lose, proven by a certificate of the probe (`leadline probe certify`)."""

    loss: GuaranteedLoss
    """`weak_wrong_strong_right`: a candidate answers wrong where the last would have been right. `accepted_wrong`: the
    first candidate's answer, taken by the probe's word, is wrong."""
    at_most: Annotated[float, Field(gt=0, lt=1)]
    """Of the queries, as a number such as 0.05."""
    confidence: Share | None = None
    """With which that holds, such as 95%. Default: on average is enough."""


def guarantee_of(part: GuaranteeFile | None) -> Guarantee | None:
    return None if part is None else Guarantee(part.loss, part.at_most, part.confidence)


def affinity_of(part: AffinityFile | None) -> Affinity | None:
    return None if part is None else Affinity(part.ttl, part.comes_back, part.release, part.bound)


def worth_of(part: WorthFile | None) -> Worth | None:
    return None if part is None else Worth(part.point, part.second)


def explore_of(part: ExploreFile | None) -> Explore | None:
    return None if part is None else Explore(part.share, part.method, part.temperature)


def check_aims(
    document: Document,
    part: "RouteFile",
    path: Path,
    plans: Mapping[str, tuple[Single, ...]],
    models: Mapping[str, Model],
    heads: Mapping[str, str] | None,
) -> None:
    """Report what does not fit together. `plans`: the candidates that can be read, by name; `heads`: plan to probe
    head; None: that section is broken itself."""

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
    if part.affinity is not None and len(candidates) < 2:
        report("affinity", "nothing to stay with: one candidate", "remove it, or name more candidates")
    if part.explore is not None and len(candidates) < 2:
        report("explore", "nothing to explore: one candidate", "remove it, or name more candidates")
    _check_plans(document, part, path, plans, models)
    if part.guarantee is not None:
        _check_guarantee(document, part.guarantee, list(plans), (*path, "guarantee"), heads)
    if heads is None or part.explore is not None:  # a bandit learns p_success by itself
        return
    if part.objective in ("utility", "threshold") and (
        missing := dict.fromkeys(s.name for stages in plans.values() for s in stages if s.name not in heads)
    ):
        names = ", ".join(concealed(name) for name in missing)
        report("objective", f"no probe head for {names}", "name heads for all candidates in `signals.difficulty.heads`")


def _check_plans(
    document: Document,
    part: "RouteFile",
    path: Path,
    plans: Mapping[str, tuple[Single, ...]],
    models: Mapping[str, Model],
) -> None:
    cascades = [stages for stages in plans.values() if len(stages) > 1]
    if cascades and part.accept is None:
        fix = (
            "add `accept: {rule: FILE}`, with a file that `leadline probe accept` wrote, `accept: agree`, or `accept: "
            "{mean_logprob: …, bias: …, at_least: …, keeps_right: …, keeps_wrong: …}`"
        )
        document.report((*path, "candidates"), "a cascade, and it is not said which answers are good enough", fix)
    if cascades and part.hedge is not None:
        message = "a cascade is not hedged: its second attempt would be judged by what its first is worth"
        document.report((*path, "hedge"), message, "remove it, or leave the cascade out")
    if part.accept is not None and not cascades:
        document.report((*path, "accept"), "no candidate is a cascade", "remove it, or add one such as `weak>strong`")
    if part.accept is not None:
        _check_accept(document, part.accept, (*path, "accept"), cascades)
    agrees = part.accept is not None and part.accept.agree is not None
    for stages in cascades:
        if agrees:
            continue
        if any(stage.beside for stage in stages):
            message = (
                f"`{concealed(plan_name(stages))}` asks models at the same time, and `accept` judges each by itself"
            )
            fix = "write `accept: agree`, or `>` between them, to ask one after the other"
            document.report((*path, "candidates"), message, fix)
        for stage in stages[:-1]:
            if stage.model in models and not models[stage.model].logprobs:
                message = f"`{concealed(stage.model)}` returns no log probabilities, so its answers cannot be judged"
                document.report((*path, "candidates"), message, "put it last, or leave the cascade out")
    for stages in plans.values():
        for stage in stages:
            if stage.effort is not None and stage.model in models and models[stage.model].thinking is None:
                message = f"`{concealed(stage.model)}` cannot be told how much to think"
                fix = f"say how in `models.{concealed(stage.model)}.thinking`, or write the model alone"
                document.report((*path, "candidates"), message, fix)
    named = models_of(part.use or ()) + models_of(plans)
    known = [models[name] for name in named if name in models]
    if part.effort is not None and len(known) == len(named) and not any(model.thinking for model in known):
        message = "no model of this route can be told how much to think"
        document.report((*path, "effort"), message, "say how in `thinking` of a model, or remove it")


def _check_accept(document: Document, part: AcceptFile, path: Path, cascades: Sequence[tuple[Single, ...]]) -> None:
    features = ("mean_logprob", "min_logprob", "log_tokens")
    if part.rule is not None and part.at_least is None:
        return  # its file could not be read, which has been said
    if part.agree is None:
        for key in _MEANING:
            if getattr(part, key) is None:
                document.report((*path, key), "missing", f"add `{key}:`, {_MEANING[key]}")
        if not any(getattr(part, key) for key in features):
            document.report(path, "it looks at nothing of the answer", f"give {' or '.join(features)} a weight")
        return
    for key in (*features, "bias", "at_least"):
        if key in part.model_fields_set:
            message = "what stages agree on is not judged by P(correct), too"
            document.report((*path, key), message, "remove it, or remove `agree`")
    if (part.keeps_right is None) != (part.keeps_wrong is None):
        document.report(path, "half of what was measured", "give both keeps_right and keeps_wrong, or neither")
    for stages in cascades:
        if len(stages) <= part.agree:
            message = f"of `{concealed(plan_name(stages))}` no {part.agree} can agree before the last answers"
            fix = "name more models before the last `>`, such as `one&other>strong`"
            document.report(path, message, fix)


def _check_guarantee(
    document: Document, part: GuaranteeFile, candidates: Sequence[str], path: Path, heads: Mapping[str, str] | None
) -> None:
    if part.confidence == 1:
        document.report((*path, "confidence"), "nothing is sure", "write less than 100%, such as 95%")
    if len(candidates) < 2:
        document.report(path, "nothing to guarantee: one candidate", "remove it, or name more candidates")
    led = candidates[:1] if part.loss == "accepted_wrong" else candidates
    if cascades := [concealed(text) for text in led if ">" in text]:
        fix = "remove the one or the other"
        document.report(path, f"no certificate speaks for a cascade, `{cascades[0]}`", fix)
    elif heads is not None and (missing := [concealed(name) for name in led if name not in heads]):
        fix = "name heads for all candidates in `signals.difficulty.heads`"
        document.report(path, f"no probe head for {', '.join(missing)}", fix)
