"""From logits to the next token, for all rows of a step at once.

What a sampler does to a row of logits, in this order (vLLM's): logit bias, repetition penalty, presence and frequency
penalties, no end before `min_tokens`, the constraint; then temperature, min-p, top-k, top-p. Tokens that tie with the
last one kept are kept too, so that what is kept does not depend on the order of a sort.

A sampler is a function of its parameters and the tokens so far (the *history*: prompt and output). Its randomness is a
hash of seed and position, not a state: the same seed and prompt give the same text whatever runs beside it, through
preemption, rollback and resumption. Two sequences of one history need two seeds to differ.
"""

import hashlib
import math
import secrets
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from local_engine.types import SamplingParams

MAX_TOP_LOGPROBS: Final = 20
LEAST_REPETITION_PENALTY: Final = 0.1
MAX_REPETITION_PENALTY: Final = 10.0
MAX_TEMPERATURE: Final = 1e6
"""Float32 has room for what is divided by it."""
_GREEDY_BELOW: Final = 1e-5
_LAST_RESORT: Final = -1e30
"""Logit of an end that comes too soon: finite, so that a constraint which allows nothing else has its way."""
_CANDIDATES: Final = 256
"""How many of the best tokens are looked at for top-k and top-p first; rows that need more are sorted whole."""

_CACHED: Final = 1 << 16
"""Logits that a CPU keeps in its caches: ten times faster than more rows at once (32 rows of 150,000)."""


def sampling_problem(params: SamplingParams, vocabulary: int | None = None) -> str | None:
    """Why these parameters cannot be used, in words for the caller that begin with the field; None when they can.

    Token ids are checked where the size of the vocabulary is given.
    """
    if params.max_tokens is not None and params.max_tokens < 1:
        return f"max_tokens must be at least 1, not {params.max_tokens}"
    if not 0 <= params.min_tokens <= (params.max_tokens or params.min_tokens):
        most = "" if params.max_tokens is None else f" ({params.max_tokens})"
        return f"min_tokens must be from 0 to max_tokens{most}, not {params.min_tokens}"
    if not 0 <= params.temperature <= MAX_TEMPERATURE:
        return f"temperature must be from 0 to {MAX_TEMPERATURE:.0f}, not {params.temperature}"
    if not 0 < params.top_p <= 1:
        return f"top_p must be over 0 and at most 1, not {params.top_p}"
    if params.top_k < -1:
        return f"top_k must be at least 1, or 0 or -1 for all tokens, not {params.top_k}"
    if not 0 <= params.min_p <= 1:
        return f"min_p must be from 0 to 1, not {params.min_p}"
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            return f"{name} must be from -2 to 2, not {getattr(params, name)}"
    if not LEAST_REPETITION_PENALTY <= params.repetition_penalty <= MAX_REPETITION_PENALTY:
        allowed = f"from {LEAST_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY:.0f}"
        return f"repetition_penalty must be {allowed}, not {params.repetition_penalty}"
    if not 0 <= params.top_logprobs <= MAX_TOP_LOGPROBS:
        return f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, not {params.top_logprobs}"
    if "" in params.stop:
        return "stop holds an empty string"
    for token, bias in params.logit_bias.items():
        if not -100 <= bias <= 100:
            return f"logit_bias must be from -100 to 100, not {bias} (of token {token})"
    if vocabulary is not None:
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    return f"{name} names token {token}, and the model has tokens 0 to {vocabulary - 1}"
    return None


class Constraint(Protocol):
    """What a text may be, token by token. Follows the output it is shown, also back."""

    def mask(self, logits: torch.Tensor, output: Sequence[int]) -> None:
        """Set to -inf, in place, what may not come after `output` in one row of logits, [vocabulary]."""
        ...

    def done(self, output: Sequence[int]) -> bool:
        """Whether nothing but the end may come after `output`."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and what the model thought of it: raw, before temperature, penalties, bias and constraint."""

    token: int
    logprob: float
    """Natural log of the token's probability; nan when not measured."""
    top: list[tuple[int, float]]
    """The most probable tokens with their logprobs, best first; as many as were asked for."""
    entropy: float = math.nan
    """Of the whole distribution, in nats; nan when not measured."""


class Sampler:
    """Chooses the tokens of one sequence.

    `prompt_tokens` says how much of a history is prompt: presence and frequency penalties and `min_tokens` count
    output only. `end_tokens` are what may not come before `min_tokens`. `measure` asks for logprob and entropy even
    where the parameters do not.
    """

    def __init__(
        self,
        params: SamplingParams,
        device: torch.device,
        constraint: Constraint | None = None,
        *,
        prompt_tokens: int = 0,
        end_tokens: Collection[int] = (),
        measure: bool = False,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self.greedy = params.temperature < _GREEDY_BELOW
        self.measured = measure or params.logprobs
        self.filters = not self.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self._prompt_tokens = prompt_tokens
        self._seed = (secrets.randbits(64) if params.seed is None else params.seed % 2**64).to_bytes(8, "little")
        self._penalises = bool(params.presence_penalty or params.frequency_penalty)
        self._bias = (
            (_ids(list(params.logit_bias), device), torch.tensor(list(params.logit_bias.values()), device=device))
            if params.logit_bias
            else None
        )
        self._ends = _ids([*end_tokens, *params.stop_token_ids], device) if params.min_tokens else None
        self.plain = not (
            self._bias or self._penalises or constraint or params.repetition_penalty != 1 or self._ends is not None
        )
        """Whether `shape` has nothing to do."""

    def shape(self, logits: torch.Tensor, history: Sequence[int]) -> None:
        """Bias, penalise and constrain one row of logits, [vocabulary], in place."""
        params, output_tokens = self.params, len(history) - self._prompt_tokens
        if self._bias:
            tokens, bias = self._bias
            logits[tokens] += bias
        if params.repetition_penalty != 1:  # Keskar et al. 2019, CTRL, section 4.1
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[_tensor(history, logits.device)] = True
            factor = torch.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            logits *= torch.where(seen, factor, 1.0)
        if self._penalises and output_tokens > 0:
            written = _tensor(history[self._prompt_tokens :], logits.device)
            counts = torch.bincount(written, minlength=logits.numel())
            logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        if self._ends is not None and output_tokens < params.min_tokens:
            logits[self._ends] = _LAST_RESORT
        if self.constraint is not None:
            self.constraint.mask(logits, history[self._prompt_tokens :])

    def uniform(self, position: int, stream: int = 0) -> float:
        """The number in [0, 1) that decides the token at `position` of the history.

        Other streams are independent of it: acceptance tests of speculation draw from theirs.
        """
        drawn = hashlib.blake2b(
            position.to_bytes(8, "little") + stream.to_bytes(8, "little"), key=self._seed, digest_size=8
        )
        return (int.from_bytes(drawn.digest(), "little") >> 11) * 2.0**-53

    def distribution(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """The probabilities, [vocabulary], from which `pick` draws the token after `history`."""
        return distributions(logits.unsqueeze(0), [self], [history])[0]

    def pick(self, logits: torch.Tensor, history: Sequence[int]) -> Choice:
        """Choose the token after `history` from one row of logits, [vocabulary]."""
        return pick_all(logits.unsqueeze(0), [self], [history])[0]

    def done(self, history: Sequence[int]) -> bool:
        """Whether the constraint lets nothing but the end come after `history`."""
        return self.constraint is not None and self.constraint.done(history[self._prompt_tokens :])


def pick_all(logits: torch.Tensor, samplers: Sequence[Sampler], histories: Sequence[Sequence[int]]) -> list[Choice]:
    """Choose a token for each row of float32 logits, [rows, vocabulary], which stay as they are.

    A sampler may stand for several rows (of a verify window), each with the history before it.
    """
    together = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(samplers)
    if together < len(samplers):
        blocks = [slice(start, start + together) for start in range(0, len(samplers), together)]
        return [choice for at in blocks for choice in pick_all(logits[at], samplers[at], histories[at])]
    return as_choices(logits, samplers, _tokens(_shaped(logits, samplers, histories), samplers, histories).tolist())


def as_choices(logits: torch.Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> list[Choice]:
    """Tokens, one for each row of logits, as choices: measured where their samplers measure."""
    choices = [Choice(token, math.nan, []) for token in tokens]
    measured = [row for row, sampler in enumerate(samplers) if sampler.measured]
    if measured:
        for row, choice in zip(measured, _measure(logits, samplers, measured, tokens), strict=True):
            choices[row] = choice
    return choices


def distributions(
    logits: torch.Tensor, samplers: Sequence[Sampler], histories: Sequence[Sequence[int]]
) -> torch.Tensor:
    """What `pick_all` draws from: float32 probabilities, [rows, vocabulary]; all on one token for greedy rows."""
    shaped = _shaped(logits, samplers, histories)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if len(drawn) == len(samplers):
        return _probabilities(shaped, samplers)
    result = torch.zeros_like(shaped).scatter_(-1, shaped.argmax(-1, keepdim=True), 1.0)
    if drawn:
        result[drawn] = _probabilities(_rows(shaped, drawn), [samplers[row] for row in drawn])
    return result


def draw(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """A token per row of [rows, vocabulary], by inversion; rows need not sum to one. Impossible tokens never come.

    Of a row that is not all numbers, some token.
    """
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    # A number of 53 bits below one times the total is below the total, so that there is a first token above it.
    target = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=probabilities.shape[1] - 1)


def _tokens(shaped: torch.Tensor, samplers: Sequence[Sampler], histories: Sequence[Sequence[int]]) -> torch.Tensor:
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if not drawn:
        return shaped.argmax(-1)
    uniforms = [samplers[row].uniform(len(histories[row])) for row in drawn]
    found = draw(_probabilities(_rows(shaped, drawn), [samplers[row] for row in drawn]), uniforms)
    if len(drawn) == len(samplers):
        return found
    tokens = shaped.argmax(-1)
    tokens[drawn] = found
    return tokens


def _shaped(logits: torch.Tensor, samplers: Sequence[Sampler], histories: Sequence[Sequence[int]]) -> torch.Tensor:
    rows = [row for row, sampler in enumerate(samplers) if not sampler.plain]
    if not rows:
        return logits
    shaped = logits.clone()
    for row in rows:
        samplers[row].shape(shaped[row], histories[row])
    return shaped


def _probabilities(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    temperatures = [sampler.params.temperature for sampler in samplers]
    scaled = logits / torch.tensor(temperatures, device=logits.device).unsqueeze(1)
    filtered = [row for row, sampler in enumerate(samplers) if sampler.filters]
    if filtered:
        rows = _rows(scaled, filtered)
        cutoff = _cutoff(rows, [samplers[row].params for row in filtered])
        scaled[filtered] = rows.masked_fill(rows < cutoff, -math.inf)
    return torch.softmax(scaled, -1)


def _cutoff(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The least logit that min-p, top-k and top-p leave in each row, [rows, 1]."""
    rows, vocabulary = scaled.shape
    width = min(vocabulary, _CANDIDATES)
    best = scaled.topk(width).values
    cutoff, enough = _cutoff_within(scaled, best, params)
    if width < vocabulary and not all(reached := enough.tolist()):
        short = [row for row in range(rows) if not reached[row]]
        rest = scaled[short]
        cutoff[short], _ = _cutoff_within(rest, rest.sort(descending=True).values, [params[row] for row in short])
    return cutoff


def _cutoff_within(
    scaled: torch.Tensor, best: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs read from the best logits of each row, descending, and for which rows they were enough to know."""
    width, device = best.shape[1], best.device
    floor = torch.tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], device=device)
    cutoff = best[:, :1] + floor.unsqueeze(1)
    counts = [p.top_k if p.top_k > 0 else 0 for p in params]
    if any(counts):
        last = torch.tensor([min(k or width, width) - 1 for k in counts], device=device).unsqueeze(1)
        limited = torch.tensor([0 < k < scaled.shape[1] for k in counts], device=device).unsqueeze(1)
        cutoff = torch.where(limited, torch.maximum(cutoff, best.gather(1, last)), cutoff)
    enough = torch.tensor([k <= width or k >= scaled.shape[1] for k in counts], device=device)
    if any(p.top_p < 1 for p in params):
        mass = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
        total = scaled.masked_fill(scaled < cutoff, -math.inf).logsumexp(-1, keepdim=True)
        share = (best - total).exp().masked_fill(best < cutoff, 0.0)
        before = share.cumsum(-1) - share
        kept = (share > 0) & ((before < mass) | (mass >= 1))
        kept[:, 0] = True
        least = best.gather(1, kept.sum(-1, keepdim=True) - 1)
        limited = mass < 1
        cutoff = torch.where(limited, torch.maximum(cutoff, least), cutoff)
        enough &= (~kept[:, -1:] | ~limited).squeeze(1)
    return cutoff, enough


def _measure(
    logits: torch.Tensor, samplers: Sequence[Sampler], rows: Sequence[int], chosen: Sequence[int]
) -> list[Choice]:
    logprobs = torch.log_softmax(_rows(logits, rows), -1)
    picked = torch.tensor([chosen[row] for row in rows], device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, picked).squeeze(1).tolist()
    entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist()
    counts = [min(samplers[row].params.top_logprobs, logits.shape[1]) for row in rows]
    values, tokens = (found.tolist() for found in logprobs.topk(max(counts)))
    return [
        Choice(chosen[row], own[at], list(zip(tokens[at][:count], values[at][:count], strict=True)), entropies[at])
        for at, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]


def _rows(matrix: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows, ascending; without a copy when they are all."""
    return matrix if len(rows) == matrix.shape[0] else matrix[rows]


def _ids(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _tensor(history: Sequence[int], device: torch.device) -> torch.Tensor:
    """Token ids as a tensor; an array of 32-bit integers is read where it lies."""
    if isinstance(history, array) and history.itemsize == 4 and history:
        return torch.frombuffer(history, dtype=torch.int32).to(device, torch.int64)
    return _ids(history, device)
