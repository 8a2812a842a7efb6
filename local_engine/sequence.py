"""One running generation: its prompt, its KV cache, its sampler and the text on its way out."""

from array import array

import torch

from local_engine.detok import Piece, TextStream
from local_engine.model import LocalModel
from local_engine.sampler import Choice, Sampler
from local_engine.types import Delta, Finished, FinishReason, SamplingParams, TokenLogprob


class Sequence:
    """Advances by one prompt chunk or one token at a time; knows nothing of connections or queues."""

    def __init__(self, id: int, model: LocalModel, prompt: list[int], params: SamplingParams) -> None:
        room = model.card.context_window - len(prompt)
        self._id = id
        self._model = model
        self._prompt = prompt
        self._params = params
        self._max_tokens = min(params.max_tokens or room, room)
        self._ends = model.end_tokens.union(params.stop_token_ids)
        self._sampler = Sampler(params, model.device, prompt_tokens=len(prompt), end_tokens=model.end_tokens)
        self._text = TextStream(model, params.stop, thinking=model.think_token in prompt[-2:])
        self._cache = model.new_cache()
        self._read = 0  # prompt tokens in the cache
        self._history = array("i", prompt)
        self._output_tokens = 0
        self._reasoning_tokens = 0
        self._untold_tokens = 0
        self._untold_logprobs: list[TokenLogprob] = []

    @property
    def in_prefill(self) -> bool:
        return self._read < len(self._prompt)

    @property
    def kv_tokens(self) -> int:
        return int(self._cache.get_seq_length())

    def advance(self, prefill_chunk: int) -> list[Delta | Finished]:
        """One forward pass, and the events it causes; the last one is Finished when the sequence is over."""
        if self.in_prefill:
            chunk = self._prompt[self._read : self._read + prefill_chunk]
            logits = self._model.forward(chunk, self._cache)
            self._read += len(chunk)
            return [] if self.in_prefill else self._accept(logits)
        return self._accept(self._model.forward([self._history[-1]], self._cache))

    def end(self, reason: FinishReason) -> list[Delta | Finished]:
        """The closing events: what was held back, then the counts."""
        finished = Finished(self._id, reason, len(self._prompt), self._output_tokens, self._reasoning_tokens)
        return [*self._told(self._text.finish(), last=True), finished]

    def _accept(self, logits: torch.Tensor) -> list[Delta | Finished]:
        choice = self._sampler.pick(logits, self._history)
        self._history.append(choice.token)
        was_thinking = self._text.thinking
        ended = choice.token in self._ends
        piece = Piece() if ended else self._text.push(choice.token)
        self._output_tokens += 1
        self._untold_tokens += 1
        if was_thinking or self._text.thinking:  # both markers count as thinking
            self._reasoning_tokens += 1
        elif self._params.logprobs and not ended and choice.token not in self._model.special_tokens:
            self._untold_logprobs.append(self._logprob(choice))
        events: list[Delta | Finished] = [*self._told(piece)]
        if ended or self._text.stopped:
            return events + self.end("stop")
        if self._output_tokens >= self._max_tokens:
            return events + self.end("length")
        return events

    def _told(self, piece: Piece, *, last: bool = False) -> list[Delta]:
        if not (piece.content or piece.reasoning or (last and self._untold_logprobs)):
            return []
        delta = Delta(self._id, piece.content, piece.reasoning, self._untold_tokens, self._untold_logprobs)
        self._untold_tokens, self._untold_logprobs = 0, []
        return [delta]

    def _logprob(self, choice: Choice) -> TokenLogprob:
        decode = self._model.tokenizer.decode
        top = [(decode([token]), logprob) for token, logprob in choice.top]
        return TokenLogprob(decode([choice.token]), choice.logprob, top)
