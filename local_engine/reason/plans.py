"""From what a command says of its plan to who runs it. Raises InvalidRequest for what cannot be run."""

import math
from functools import lru_cache

from local_engine.chat import InvalidRequest
from local_engine.model import LocalModel
from local_engine.plan_types import AcceptRule, Cascade, SpeculateSteps
from local_engine.primitives import Controller
from local_engine.reason import entropy, glimprouter, score, specreason
from local_engine.reason.cascade import CascadeAnswer
from local_engine.reason.entropy import EntropySwitch
from local_engine.reason.glimprouter import GlimpRouter
from local_engine.reason.method import Method
from local_engine.reason.score import Scored
from local_engine.reason.specreason import SpecReason
from local_engine.reason.speculate import StepSpeculation
from local_engine.reason.speculative_thinking import SpeculativeThinking
from local_engine.types import Generate


def shared(
    command: Generate,
    plan: SpeculateSteps | Cascade,
    models: tuple[LocalModel, LocalModel],
    prompts: tuple[list[int], list[int]],
    most_tokens: tuple[int, int],
) -> Controller:
    """`models`, `prompts` and `most_tokens` (of a sequence): those of the command's model, those of the draft."""
    problem = _problem(command, plan, models)
    reads_tokens = isinstance(plan, SpeculateSteps) or plan.hint == "offer"
    if problem is None and reads_tokens and not _same_tokens(*models):
        problem = (
            f"plan.draft {plan.draft!r} has other tokens than {command.model!r}: a local draft needs the"
            " same tokenizer; name another one, or leave out the plan"
        )
    if problem is None and len(prompts[1]) + 1 >= most_tokens[1]:
        problem = (
            f"plan.draft {plan.draft!r} has room for {most_tokens[1]} tokens, and the prompt has {len(prompts[1])}"
        )
    if problem is not None:
        raise InvalidRequest(problem, "plan")
    if isinstance(plan, Cascade):
        return CascadeAnswer(command, plan, models, prompts, most_tokens)
    return StepSpeculation(command, plan, _method(plan), models, prompts, most_tokens)


def _method(plan: SpeculateSteps) -> Method:
    def threshold(default: float) -> float:
        return default if plan.threshold is None else plan.threshold

    match plan.method:
        case "score":
            return Scored(threshold(score.THRESHOLD), plan.unsure, plan.lookahead, plan.repair)
        case "specreason":
            return SpecReason(threshold(specreason.THRESHOLD))
        case "glimprouter":
            return GlimpRouter(threshold(glimprouter.THRESHOLD))
        case "speculative_thinking":
            return SpeculativeThinking()
        case "entropy":
            return EntropySwitch(threshold(entropy.THRESHOLD), plan.window)


def _problem(command: Generate, plan: SpeculateSteps | Cascade, models: tuple[LocalModel, LocalModel]) -> str | None:
    sampling = command.sampling
    if plan.draft == command.model:
        return f"plan.draft is {plan.draft!r} itself: name a smaller model"
    if command.n != 1:
        return f"plan: one choice at a time, not n = {command.n}"
    if sampling.response_format is not None or command.tools_json is not None:
        return "plan: neither tools nor a response_format can be held while two models write; leave out one of them"
    alone = isinstance(plan, Cascade) and plan.hint == "none"  # one model writes all that is told
    if (sampling.logprobs and not alone) or command.taps is not None:
        return "plan: log-probabilities and taps are one model's; leave out the plan, or those"
    if isinstance(plan, Cascade):
        return _accept_problem(plan.accept, models[1])
    for name in ("lookahead", "window", "max_step_tokens"):
        if getattr(plan, name) < 1:
            return f"plan.{name} must be at least 1, not {getattr(plan, name)}"
    if plan.base_steps < 0:
        return f"plan.base_steps must not be negative, and is {plan.base_steps}"
    if plan.method == "specreason" and not plan.cue:
        return "plan.cue is empty: name the words after which the base model rates a step by a digit"
    thought, answer = plan.max_thinking_tokens, sampling.max_tokens
    if thought is not None and not 1 <= thought < (answer or thought + 1):
        return f"plan.max_thinking_tokens must be at least 1 and leave room under max_tokens ({answer}), not {thought}"
    return None


def _accept_problem(rule: AcceptRule, draft: LocalModel) -> str | None:
    if rule.go_on_above > 0 and not rule.prospect_weights:
        return "plan.accept.go_on_above says when to abandon, and prospect_weights, by which, are missing; give both"
    for name in ("at_least", "go_on_above"):
        if not 0 <= getattr(rule, name) <= 1:
            return f"plan.accept.{name} is a probability, from 0 to 1, not {getattr(rule, name)}"
    layers, width = draft.network.config.num_hidden_layers, draft.network.config.hidden_size
    if not all(0 <= layer <= layers for layer in rule.hidden_layers):
        return f"plan.accept.hidden_layers are from 0 to {layers}, not {rule.hidden_layers}"
    if len(rule.hidden_weights) != width * len(rule.hidden_layers):
        return (
            f"plan.accept.hidden_weights must be {width} for each of {len(rule.hidden_layers)} hidden_layers,"
            f" not {len(rule.hidden_weights)} in all"
        )
    weights = (*rule.weights.values(), *rule.prospect_weights.values(), *rule.hidden_weights)
    numbers = (rule.bias, rule.prospect_bias, *weights)
    if not all(map(math.isfinite, numbers)):
        return "plan.accept holds a weight or a bias that is not a finite number"
    return None


@lru_cache(maxsize=64)
def _same_tokens(one: LocalModel, other: LocalModel) -> bool:
    return bool(one.tokenizer.get_vocab() == other.tokenizer.get_vocab())
