"""Loading causal language models from a path, a hub id or this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from local_engine.config import Device, Dtype, locate
from local_engine.constrain import Grammars
from local_engine.errors import ConfigError, ModelLoadError
from local_engine.pieces import Pieces
from local_engine.reason.artifact import ExitArtifact, read_for
from local_engine.tool_calls import MARKERS, ToolFormat, tool_format
from local_engine.types import ModelCard

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, eq=False)
class LocalModel:
    """A loaded model and what the engine has to know about its tokens."""

    card: ModelCard
    network: Any
    tokenizer: Any
    device: torch.device
    end_tokens: frozenset[int]
    """Tokens that end the assistant's turn."""
    pieces: Pieces
    grammars: Grammars
    tools: ToolFormat | None
    """How it writes tool calls; None when its chat template knows of none."""
    tool_tokens: frozenset[int]
    """Control tokens that are part of a tool call's text."""
    special_tokens: frozenset[int]
    """Tokens that are never text."""
    think_token: int | None
    end_think_token: int | None
    exits: ExitArtifact | None = None
    """When its thoughts may be left, where that was fitted: it lies beside the weights."""

    def thinks_after(self, token: int, before: bool) -> bool:
        """Whether what comes after this token is of a thought; `before`: whether what comes before it is."""
        return token == self.think_token or (before and token != self.end_think_token)


def load_model(name: str, source: str, dtype: Dtype = "auto", device: Device = "auto") -> LocalModel:
    """Load the model `name` from `source`: `bundled/<name>`, a local folder, else a hub id.

    Only safetensors weights are read, never pickles, and no code of the checkpoint runs. A folder never touches the
    network; a hub id honours `HF_HUB_OFFLINE`. Raises ModelLoadError naming what is wrong,
    and ConfigError for a device that is not there.
    """
    transformers_logging.disable_progress_bar()
    place, local = locate(source)
    where = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "torch sees no CUDA device here; install its CUDA build, or say cpu or auto")
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        if config.model_type not in FAMILIES:
            raise ModelLoadError(
                f"model {name!r} ({source}) is of family {config.model_type!r}; this engine runs {', '.join(FAMILIES)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        network = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=_torch_dtype(dtype, where), use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"model {name!r} cannot be loaded from {source}: {error}") from error
    if not tokenizer.chat_template:
        raise ModelLoadError(f"model {name!r} ({source}) has no chat template; use an instruction-tuned checkpoint")
    network = network.to(where).eval()
    vocabulary = tokenizer.get_vocab()
    think, end_think = vocabulary.get("<think>"), vocabulary.get("</think>")
    end_tokens = _end_tokens(network, tokenizer)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tools = tool_format(tokenizer.chat_template)
    try:
        pieces = Pieces(tokenizer)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {name!r} ({source}) cannot be served: {error}") from error
    card = ModelCard(
        name=name,
        context_window=config.max_position_embeddings,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        reasoning=end_think is not None and "</think>" in tokenizer.chat_template,
        dtype=str(network.dtype).removeprefix("torch."),
        device=where.type,
    )
    return LocalModel(
        card=card,
        network=network,
        tokenizer=tokenizer,
        device=where,
        end_tokens=end_tokens,
        special_tokens=end_tokens.union(
            tokenizer.all_special_ids, (id for id, token in added.items() if token.special)
        ),
        think_token=think,
        end_think_token=end_think,
        pieces=pieces,
        grammars=Grammars(
            tokenizer,
            vocabulary=config.vocab_size,
            end_tokens=end_tokens,
            think_tokens=(think, end_think) if think is not None and end_think is not None else None,
            tools=tools,
        ),
        tools=tools,
        tool_tokens=frozenset(vocabulary[marker] for marker in MARKERS if marker in vocabulary),
        exits=read_for(Path(place)) if local else None,
    )


def _torch_dtype(dtype: Dtype, device: torch.device) -> Any:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    stated = network.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
