"""Leaving a thought inside the decode loop: what is held back, tried, taken back and thrown away.

The cue is found a token after its word. What may be part of one is held back until that is certain, so that a thought
is cut before its cue and nobody has seen it. Cutting is a truncation of the sequence and forced text: nothing of
the prompt or the thought is read again. An answer is tried in place, not on a fork with KV of its own: closed, written,
looked at, and cut off again if it is not to be, after which the cue is given back.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from local_engine.chat import InvalidRequest
from local_engine.detok import Detokenizer
from local_engine.model import LocalModel
from local_engine.plan_types import CueSeen, Exit, ModelUse, PlanUse
from local_engine.primitives import Primitives
from local_engine.reason.cues import CUES
from local_engine.reason.exits import ProbeExit, make_rule
from local_engine.reason.thought import Moment, Verdict, features
from local_engine.reason.watch import Watch
from local_engine.sampler import Choice
from local_engine.sequence import Sequence
from local_engine.turns import Hidden
from local_engine.types import SamplingParams, TapSpec

TRIED_TOKENS: Final = 64
"""An answer that is tried out is looked at after so many, ended or not."""
_MOST_RESERVED: Final = 512


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """A checked `Exit` for one model and prompt."""

    asked: Exit
    model: LocalModel
    end_think: int
    layers: tuple[int, ...]
    measures: bool
    """Whether log-probabilities are read."""

    @classmethod
    def of(cls, asked: Exit, model: LocalModel, *, prefix: str, taps: TapSpec | None) -> "ExitPlan":
        """Raises InvalidRequest naming the field, the value and the fix."""
        if model.end_think_token is None or model.think_token is None:
            raise InvalidRequest(
                f"plan: {model.card.name} has no thinking tags, so there is no thought to leave", "plan"
            )
        if prefix:
            raise InvalidRequest("plan: the answer has begun, there is no thought to leave; leave out one", "plan")
        limit = asked.max_thinking_tokens
        if limit is not None and limit < 1:
            raise InvalidRequest(f"plan.max_thinking_tokens must be at least 1, not {limit}", "plan")
        try:
            measures = make_rule(asked, model.exits, 1).measures
        except ValueError as error:
            raise InvalidRequest(str(error), "plan") from None
        layers = asked.layers if asked.rule == "trace" else ()
        if asked.rule == "probe" and model.exits is not None:
            layers = model.exits.manifest.layers
        if most := [layer for layer in layers if not 0 <= layer <= model.network.config.num_hidden_layers]:
            raise InvalidRequest(f"plan.layers names layer {most[0]}, which {model.card.name} does not have", "plan")
        if layers and taps is not None:
            raise InvalidRequest(
                "taps: cannot be combined with an exit that reads hidden states; leave out one", "taps"
            )
        return cls(asked, model, model.end_think_token, layers, measures)

    @property
    def cues(self) -> tuple[str, ...]:
        return self.model.exits.manifest.cues if self.model.exits is not None else CUES

    def taps(self) -> TapSpec | None:
        """Where hidden states are read: at every token with which a cue can end."""
        if not self.layers:
            return None
        return TapSpec(self.layers, "tokens", tuple(_cue_ends(self.model, self.cues)))


def _cue_ends(model: LocalModel, cues: tuple[str, ...]) -> list[int]:
    """Tokens that hold the last letter of a cue, at least; others of them cost a copy."""
    found = []
    for token in range(model.network.config.vocab_size):
        word = model.pieces[token].decode(errors="ignore").strip(" \n,.!?…").lower()
        if word and any(cue.endswith(word) or word.endswith(cue) for cue in cues):
            found.append(token)
    return found


@dataclass(slots=True)
class _Trial:
    """An answer that is tried where the thought has been cut."""

    moment: Moment
    saved: list[int]
    """What comes after the cut, to be given back."""
    why: str
    closing: list[int]
    choices: list[Choice] = field(default_factory=list)


class Leaving:
    """The thought of one choice of a generation."""

    def __init__(self, plan: ExitPlan, prompt: list[int], max_tokens: int, sampling: SamplingParams) -> None:
        self.discarded_tokens = 0
        """Written, and told to nobody."""
        self.written_tokens = 0
        """By the model, told or not; of a step without those that a cut before them made void."""
        self.exited = ""
        """What closed the thought; empty while nothing did."""
        self.cues: list[CueSeen] = []
        self._forced_tokens = 0
        self._plan = plan
        self._model = plan.model
        self._rule = make_rule(plan.asked, plan.model.exits, len(prompt))
        self._watch = Watch(
            self._rule, plan.asked.rule, len(prompt),
            cues=plan.cues, max_tokens=plan.asked.max_thinking_tokens, hidden=self._hidden_at,
        )  # fmt: skip
        self._text = Detokenizer(plan.model.pieces)
        self._rows = self._read = 0
        self._begin: int | None = len(prompt) if plan.model.think_token in prompt[-2:] else None
        """Where in the sequence the thought begins; None before it has."""
        self._over = plan.end_think in prompt[-4:]
        self._trial: _Trial | None = None
        self._held: list[Choice] = []
        self._states: dict[int, Tensor] = {}
        self._ends = plan.model.end_tokens.union(sampling.stop_token_ids)
        self._held_to_format = sampling.response_format is not None
        """Then no line breaks are forced after the thought: the format begins there."""
        self._left = max_tokens
        """Tokens that may still be written."""
        self._reserve = min(_MOST_RESERVED, max_tokens // 8) + len(self._closing(len(self._watch.thought)))

    @property
    def reads_hidden(self) -> bool:
        return bool(self._plan.layers)

    @property
    def trying(self) -> bool:
        """Whether what is written now is an answer that may be taken back."""
        return self._trial is not None

    def use(self, answer: tuple[int, int], prompt_tokens: int, cached_tokens: int) -> PlanUse:
        """What it took; of `answer`, told: its tokens, and how many of them are of the thought."""
        output, reasoning = (told + self.discarded_tokens - self._forced_tokens for told in answer)
        model = ModelUse(self._model.card.name, prompt_tokens, cached_tokens, output, reasoning, self._read, self._rows)
        return PlanUse(
            [model],
            discarded_tokens=self.discarded_tokens,
            forced_tokens=self._forced_tokens,
            closed_by=self.exited,
            exit_p=self._rule.p if isinstance(self._rule, ProbeExit) else None,
            cues=self.cues,
        )

    def reveal(self, hidden: Hidden) -> None:
        """Hidden states of tokens just computed."""
        self._states |= dict(zip(hidden.positions, hidden.states, strict=True))

    def take(self, engine: Primitives, sequence: Sequence, at: int, choice: Choice) -> tuple[list[Choice], bool]:
        """The token at `at` of the sequence. (what is now certain to be told, whether later tokens are void)"""
        self._left -= 1
        self.written_tokens += 1
        self._rows, self._read = sequence.rows, sequence.read
        if self._over:
            return [choice], False
        if self._trial is not None:
            return self._tried(engine, sequence, self._trial, at, choice)
        if self._begin is None:
            if choice.token == self._model.think_token:
                self._begin = at + 1
            else:
                self._over = True
            return [choice], False
        if choice.token == self._plan.end_think or choice.token in self._ends:
            self._over = True
            return [*self.flush(), choice], False
        self._held.append(choice)
        notice = self._watch.push(self._text.push(choice.token), choice.logprob, choice.entropy)
        if notice is None or (notice.verdict is Verdict.ASK and self._left <= self._reserve + TRIED_TOKENS):
            if self._left > self._reserve:
                return self._certain(), False
            moment = Moment(self._watch.thought, "step", len(self._watch.thought))
            return self._leave(engine, sequence, moment, "limit")
        if notice.verdict is Verdict.EXIT:
            return self._leave(engine, sequence, notice.moment, notice.why)
        cut = self._begin + notice.moment.cut
        closing = self._closing(notice.moment.cut)
        self._trial = _Trial(notice.moment, list(sequence.ids[cut : at + 1]), notice.why, closing)
        engine.truncate(sequence, cut)
        engine.append(sequence, closing)
        return [], True

    def flush(self) -> list[Choice]:
        """What is held back, when nothing more will be cut off. What was being tried is thrown away."""
        if self._trial is not None:
            self.discarded_tokens += len(self._trial.choices)
            self._trial = None
        held, self._held = self._held, []
        return held

    def _leave(self, engine: Primitives, sequence: Sequence, moment: Moment, why: str) -> tuple[list[Choice], bool]:
        assert self._begin is not None, "a thought has begun"
        closing = self._closing(moment.cut)
        if self._left <= len(closing):  # of so few tokens none would be left for an answer
            self._over = True
            return self.flush(), False
        engine.truncate(sequence, self._begin + moment.cut)
        engine.append(sequence, closing)
        return [*self._kept(moment, why), *self._forced(closing)], True

    def _tried(
        self, engine: Primitives, sequence: Sequence, trial: _Trial, at: int, choice: Choice
    ) -> tuple[list[Choice], bool]:
        trial.choices.append(choice)
        held_to = sequence.sampler is not None and sequence.sampler.done(sequence.ids[: at + 1])
        ended = choice.token in self._ends or held_to
        if not ended and len(trial.choices) < TRIED_TOKENS:
            return [], False
        tokens = [one.token for one in trial.choices]
        answer = self._said(tokens) if ended else ""
        if self._plan.asked.rule == "trace":
            values = [*features(trial.moment), *trial.moment.hidden]
            self.cues.append(CueSeen(trial.moment.cut, values, answer, len(tokens)))
        self._trial = None
        if self._rule.heard(trial.moment, answer) is Verdict.EXIT:
            return [*self._kept(trial.moment, trial.why), *self._forced(trial.closing), *trial.choices], False
        self.discarded_tokens += len(tokens)
        assert self._begin is not None, "a thought has begun"
        engine.truncate(sequence, self._begin + trial.moment.cut)
        engine.append(sequence, trial.saved)
        return self._certain(), True

    def _kept(self, moment: Moment, why: str) -> list[Choice]:
        """What is held back of the thought before the cut; the rest is thrown away, and the thought is over."""
        cut_off = len(self._watch.thought) - moment.cut
        kept = self._held[: len(self._held) - cut_off]
        self.discarded_tokens += cut_off
        self._held = []
        self._over, self.exited = True, why
        return kept

    def _forced(self, closing: list[int]) -> list[Choice]:
        self._left -= len(closing)
        self._forced_tokens += len(closing)
        return [Choice(token, math.nan, []) for token in closing]

    def _certain(self) -> list[Choice]:
        ready = len(self._held) - (len(self._watch.thought) - self._watch.certain)
        told, self._held = self._held[:ready], self._held[ready:]
        return told

    def _closing(self, cut: int) -> list[int]:
        """The tokens that end the thought, on a line of their own, as chat templates of the Qwen family have it."""
        tokenizer = self._model.tokenizer
        before: list[int] = []
        if cut and not self._watch.thought.said(cut - 1, cut).endswith("\n"):
            before = tokenizer.encode("\n", add_special_tokens=False)
        after = [] if self._held_to_format else tokenizer.encode("\n\n", add_special_tokens=False)
        return [*before, self._plan.end_think, *after]

    def _said(self, tokens: list[int]) -> str:
        text = Detokenizer(self._model.pieces)
        return "".join(text.push(token) for token in tokens if token not in self._model.special_tokens).strip()

    def _hidden_at(self, token: int) -> list[float]:
        """Of the thought's token: all layers asked for, one after the other."""
        if not self._plan.layers:
            return []
        assert self._begin is not None, "a thought has begun"
        states = self._states.get(self._begin + token)
        if states is None:
            raise RuntimeError(f"no hidden states were kept of token {token} of the thought")
        found: list[float] = states.float().flatten().tolist()
        self._states.clear()
        return found
