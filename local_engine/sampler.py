"""From logits to the next token. Each sequence owns one sampler, so that a seed decides its text alone."""

from dataclasses import dataclass

import torch

from local_engine.types import SamplingParams

_GREEDY_BELOW = 1e-5
MAX_TOP_LOGPROBS = 20


def sampling_problem(params: SamplingParams) -> str | None:
    """Why these parameters cannot be used, in words for the caller; None when they can."""
    if params.max_tokens is not None and params.max_tokens < 1:
        return f"max_tokens must be at least 1, not {params.max_tokens}"
    if not 0 <= params.temperature < float("inf"):
        return f"temperature must not be negative, and is {params.temperature}"
    if not 0 < params.top_p <= 1:
        return f"top_p must be over 0 and at most 1, not {params.top_p}"
    if not 0 <= params.top_logprobs <= MAX_TOP_LOGPROBS:
        return f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, not {params.top_logprobs}"
    if "" in params.stop:
        return "stop holds an empty string"
    return None


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprob: float
    """Natural log of the token's probability before temperature and top-p; 0 when not asked for."""
    top: list[tuple[int, float]]
    """The most probable tokens with their logprobs, best first."""


class Sampler:
    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self._params = params
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def pick(self, logits: torch.Tensor) -> Choice:
        """Choose from one row of logits, [vocabulary]."""
        token = self._draw(logits)
        if not self._params.logprobs:
            return Choice(token, 0.0, [])
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = torch.topk(logprobs, min(self._params.top_logprobs, logprobs.numel()))
        return Choice(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _draw(self, logits: torch.Tensor) -> int:
        if self._params.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self._params.temperature, dim=-1)
        if self._params.top_p < 1:
            ordered, tokens = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            kept = ordered.masked_fill(before >= self._params.top_p, 0.0)
            return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
