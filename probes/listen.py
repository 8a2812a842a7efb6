"""A local causal model heard as it reads prompts: the features of the tiers `prefill` and `self`, for fitting.

The same numbers as the engine's (`local_engine.sounding`), which serves them: the prompt by the model's own chat
template, hidden states at its last token (the last layer's before the final norm), and what the model says of itself.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from probes.errors import EncoderError, TableError
from probes.prefill import ANSWERS, QUESTION, RATINGS, rating_features, weights_sha256
from probes.types import Rating

FloatArray = npt.NDArray[np.float32]

END_TOKENS = 4
"""The last tokens of the question at which layers are read, as by the engine."""


def locate_model(source: str) -> Path:
    """The folder of `bundled/NAME`, or of a path. Raises EncoderError."""
    folder = Path(source).expanduser()
    if source.startswith("bundled/"):
        spec = importlib.util.find_spec("local_engine")
        places = spec.submodule_search_locations if spec is not None else None
        folder = Path(next(iter(places or ["."]))) / source
    if not (folder / "config.json").is_file():
        raise EncoderError(f"no model in {folder}: give bundled/base, or the folder of a model that the engine serves")
    return folder


def rated_layers(layers: int) -> tuple[int, ...]:
    """Those read for Internal Confidence: every second of the upper half, the last among them."""
    return tuple(sorted(range(layers, layers // 2 - 1, -2)))


@dataclass(frozen=True, slots=True)
class Ratings:
    """What an artifact of tier `self` was read with: a model's word on itself, in so many numbers."""

    name: str
    sha256: str
    dims: int = len(RATINGS)
    layers: int = 1


class ListenedModel:
    """A frozen causal model on the CPU, with its identity."""

    def __init__(self, folder: Path, name: str) -> None:
        transformers_logging.disable_progress_bar()
        self.name = name
        self.sha256 = weights_sha256(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
        ).eval()
        config = self._model.config
        self.dims = int(config.hidden_size)
        self.layers = int(config.num_hidden_layers) + 1
        """The embeddings count as layer 0."""
        self.context = int(config.max_position_embeddings)

    @classmethod
    def load(cls, source: str) -> "ListenedModel":
        """`bundled/NAME`, or a folder, whose name is then the model's."""
        folder = locate_model(source)
        return cls(folder, source if source.startswith("bundled/") else folder.resolve().name)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """About a quarter, half and three quarters of the way, and the last."""
        last = self.layers - 1
        return tuple(sorted({max(1, round(last * part / 4)) for part in (1, 2, 3, 4)}))

    def states(
        self,
        prompts: Sequence[str],
        layers: Sequence[int],
        progress: bool = False,
        *,
        over: Literal["last", "prompt"] = "last",
    ) -> FloatArray:
        """[n, layers * dims] at each prompt's last token, or the mean over its tokens; layers side by side."""
        out = np.empty((len(prompts), len(layers) * self.dims), np.float32)
        for row, ids in enumerate(self._progress(self._tokens(prompts), progress)):
            hidden = self._hidden(ids)[list(layers)]
            out[row] = (hidden[:, -1] if over == "last" else hidden.mean(1)).reshape(-1).numpy()
        return out

    def ratings(
        self,
        prompts: Sequence[str],
        question: str = QUESTION,
        answers: tuple[str, str] = ANSWERS,
        progress: bool = False,
    ) -> FloatArray:
        """[n, 3]: what the model says of itself, as `rating_features`."""
        asked = self._tokenizer.encode(question, add_special_tokens=False, split_special_tokens=True)
        yes_no = [self._tokenizer.encode(word, add_special_tokens=False)[0] for word in answers]
        return np.array(
            [
                rating_features(self._rating(ids, asked, yes_no))
                for ids in self._progress(self._tokens(prompts, len(asked)), progress)
            ],
            np.float32,
        ).reshape(-1, 3)

    def _rating(self, ids: list[int], asked: list[int], yes_no: list[int]) -> Rating:
        hidden = self._hidden([*ids, *asked])
        first = torch.softmax(self._logits(hidden[-1, len(ids) - 1]), -1)
        entropy = float(torch.special.entr(first).sum())
        layers = rated_layers(self.layers - 1)
        ends = hidden[list(layers)][:, len(ids) :][:, -END_TOKENS:]
        p_yes = torch.softmax(self._logits(ends)[..., yes_no], -1)[..., 0]
        tokens = torch.pow(0.5, torch.arange(ends.shape[1] - 1, -1, -1, dtype=torch.float32))
        weights = torch.arange(1, len(layers) + 1, dtype=torch.float32)[:, None] * tokens[None, :]
        return Rating(entropy, float(p_yes[-1, -1]), float((p_yes * weights).sum() / weights.sum()))

    @torch.inference_mode()
    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.lm_head(self._model.model.norm(states))
        return logits

    @torch.inference_mode()
    def _hidden(self, ids: list[int]) -> torch.Tensor:
        """[layers + 1, tokens, dims], the last before the final norm."""
        last: list[torch.Tensor] = []
        hook = self._model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
        try:
            found = self._model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        finally:
            hook.remove()
        return torch.stack([*found[:-1], last[0]])[:, 0]

    def _tokens(self, prompts: Sequence[str], room: int = 0) -> list[list[int]]:
        found = []
        for row, prompt in enumerate(prompts):
            encoded = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                effort="low",
                enable_thinking=True,
            )
            ids: list[int] = encoded["input_ids"]
            if len(ids) + room > self.context:
                raise TableError(f"prompt {row} has {len(ids)} tokens; {self.name} reads {self.context}: leave it out")
            found.append(ids)
        return found

    def _progress(self, tokens: list[list[int]], shown: bool) -> Any:
        if not shown:
            return tokens
        from tqdm import tqdm

        return tqdm(tokens, desc=self.name, unit="prompt")
