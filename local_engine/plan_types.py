"""Plans: how compute may be spent on one answer, and what one did. Imported by gateway workers, so: no torch here."""

from typing import Literal

import msgspec

ExitRule = Literal["probe", "convergence", "redundancy", "momentum", "budget", "cue", "trace", "none"]
ExitForm = Literal["expected", "high_probability", "per_event"]
ExitLoss = Literal["wrong", "harm"]
VoteStop = Literal["posterior", "entropy", "agreement", "never"]
VoteWeight = Literal["count", "perplexity", "probability"]


class Exit(msgspec.Struct, frozen=True, tag="exit", omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """When to leave a thought before its end: it is closed, and the model answers from there.

    Whatever the rule, a thought is closed as well when it goes round in circles, and before it takes the room that an
    answer needs.
    """

    rule: ExitRule = "probe"
    """At a cue word: `probe` (fitted, calibrated), `convergence` (forced answers agree), `redundancy` (two thoughts
    come to the same), `momentum` (no step stood out), `cue` (always). `budget`: at a step end past so many tokens.
    `trace`: answers are forced and told, and the thought goes on. `none`: only the limits."""
    delta: float = 0.05
    """`probe`: the share of requests that may be left early and go wrong by it."""
    form: ExitForm = "expected"
    """Of the promise: in expectation over calibrations; for 95 % of calibrations; or, as published, per event."""
    loss: ExitLoss = "wrong"
    """What goes wrong: the answer is; or it is, and would not have been at the thought's own end."""
    agree: int = 2
    """`convergence`, `redundancy`: so many in a row."""
    gamma: float = 0.9
    """`momentum`: smaller leaves more thoughts."""
    budget: int | None = None
    """`budget`: thinking tokens; None: as fitted, by the length of the prompt."""
    max_thinking_tokens: int | None = None
    """The thought is closed here in any case; sooner where `max_tokens` would leave too little for an answer."""
    layers: tuple[int, ...] = ()
    """`trace`: hidden states at the cue to tell beside the features, numbered as in `TapSpec`."""


StepMethod = Literal["score", "specreason", "glimprouter", "speculative_thinking", "entropy"]


class SpeculateSteps(
    msgspec.Struct, frozen=True, tag="speculate", omit_defaults=True, forbid_unknown_fields=True, kw_only=True
):
    """A plan: a smaller model writes the thought, and the command's model steps in where it has to.

    The methods are the modules of `local_engine.reason` of those names. What a caller is shown was accepted.
    """

    draft: str
    """The smaller model, another one of this engine with the same tokens."""
    method: StepMethod = "score"
    threshold: float | None = None
    """Of the method; None: its own default."""
    unsure: float | None = -0.25
    """`score`: a token that the draft itself finds less probable is left to the base model, a natural logarithm; None:
    no token is."""
    lookahead: int = 4
    """`score`: steps that the draft may write before they are judged, all at once."""
    repair: Literal["token", "step"] = "token"
    """`score`: of a rejected step the base model writes, from the first bad token on, that one or the rest."""
    cue: str = "Rate this step 0-9:"
    """`specreason`: what is put after a step to have it rated by a digit."""
    window: int = 8
    """`entropy`: tokens of its rolling mean."""
    base_steps: int = 0
    """So many first steps are the base model's own."""
    max_step_tokens: int = 512
    """A step longer than this is judged as it is."""
    max_thinking_tokens: int | None = None
    """A thought that is longer is closed, and answered."""


AnswerFeature = Literal["mean_logprob", "min_logprob", "mean_entropy", "max_entropy", "log_tokens"]
"""Over the tokens of an answer, thought included: log-probabilities and entropies in nats, the natural log of their
number."""


class AcceptRule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """When an answer is good enough to be sent: P(correct) = 1 / (1 + exp(-(bias + sum of weight x feature)))."""

    weights: dict[AnswerFeature, float]
    bias: float
    at_least: float
    """Accepted from this P(correct) on."""
    prospect_weights: dict[AnswerFeature, float] = {}
    prospect_bias: float = 0.0
    """The same of P(it will be accepted), over the features of what is written so far."""
    hidden_layers: tuple[int, ...] = ()
    """P(correct) reads hidden states of the small model as well, after these layers, at its least probable token."""
    hidden_weights: tuple[float, ...] = ()
    """Of those states, layer by layer."""
    go_on_above: float = 0.0
    """An answer is abandoned once P(it will be accepted) is below this; 0: never."""


class Cascade(msgspec.Struct, frozen=True, tag="cascade", omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """A plan: a smaller model answers first; the command's model where that answer is not accepted.

    The caller sees nothing of an answer that is not.
    """

    draft: str
    """The smaller model, another one of this engine."""
    accept: AcceptRule
    hint: Literal["none", "offer"] = "none"
    """What the command's model is given of an answer that was not accepted. `offer`: it keeps it up to the first token
    that it finds too improbable, and both go on as in SpeculateSteps; both models have the same tokens then."""
    floor: float = -0.69
    """`offer`: a natural logarithm."""


class Vote(msgspec.Struct, frozen=True, tag="vote", omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """Several samples of one prompt, which is read once, and the answer that they agree on; drawn until they do.

    The request's `max_tokens` holds for each sample; all of them are in the usage. Nothing is shown before the end.
    """

    most: int = 16
    """Samples at most."""
    stop: VoteStop = "posterior"
    """Draw until: `posterior`, the leading answer stays ahead with probability `bound`; `entropy`, the answers' entropy
    is at most 1 - `bound` nats; `agreement`, the first three say the same; or nobody can catch up any more. `never`:
    draw all."""
    bound: float = 0.9
    weigh: VoteWeight = "probability"
    """Of a sample: one; the inverse of its perplexity; its probability (the latter two: of different samples only)."""
    prune: float | None = None
    """Give up a sample at a token less probable than this (a natural logarithm) once a finished one had none such."""
    exit: Exit | None = None
    """How each sample's thought may be left."""


Plan = Exit | SpeculateSteps | Cascade | Vote
"""How to spend compute on one answer: when to stop thinking, who thinks, or how often."""


class CueSeen(msgspec.Struct, frozen=True):
    """A place where a thought could have been left, and the answer that was forced there."""

    tokens: int
    """Of the thought before it."""
    features: list[float]
    """See `local_engine.reason.thought.FEATURES`; hidden states follow, where layers were asked for."""
    answer: str
    answer_tokens: int


class Sampled(msgspec.Struct, frozen=True):
    """One sample of a vote."""

    answer: str
    """What it came to; empty where it came to nothing, or was given up."""
    tokens: int
    logprob: float
    """Natural, of its tokens together, at temperature 1."""
    lowest: float
    """The least of them."""
    over: bool
    """Whether it came to its end."""


class ModelUse(msgspec.Struct, frozen=True):
    """What a plan took of one model."""

    model: str
    input_tokens: int
    """Of its prompt."""
    cached_tokens: int
    """Of them, those that the prefix store had."""
    output_tokens: int
    """Written by it, whether they were kept or not."""
    reasoning_tokens: int
    """Of the output tokens, those that were written for a thought."""
    read_tokens: int
    """Of what others wrote: the prompt but for its cached tokens, text and offers, also what was taken back; each as
    often as it was given to read, whatever its own drafts, and preemption, had computed besides."""
    computed_tokens: int
    """All that went through it: what it read and wrote, wrong drafts, and what was computed again."""


class PlanUse(msgspec.Struct, frozen=True):
    """What a plan did, and what to pay for."""

    models: list[ModelUse]
    """The command's model first."""
    drafted_steps: int = 0
    """Judged or not; the first of them that was rejected ends a judgement."""
    accepted_steps: int = 0
    drafted_tokens: int = 0
    """Written by the smaller model."""
    accepted_tokens: int = 0
    """Of them, those in the text."""
    discarded_tokens: int = 0
    """Written by any model, and not in the text."""
    forced_tokens: int = 0
    """In the text, and written by no model: what closed a thought."""
    closed_by: str = ""
    """Why a thought was closed for the model: `budget`, `repeats`, `reflections`; of an exit the rule's name, `limit`
    or `loop`."""
    degraded: str = ""
    """Why the command's model went on alone; empty where it did not."""
    escalated: bool = False
    """Of a cascade: the command's model was asked."""
    abandoned: bool = False
    """Of a cascade: the smaller model's answer was left in the middle."""
    p_correct: float | None = None
    """Of a cascade: of the smaller model's answer; None where it did not get to its end."""
    exit_p: float | None = None
    """The exit probe's P(right) at the last cue."""
    cues: list[CueSeen] = []
    """Of an exit with the rule `trace`."""
    samples: list[Sampled] = []
    """Of a vote: all that were begun, in order."""
    shown: int | None = None
    """Of a vote: which of them is shown."""
