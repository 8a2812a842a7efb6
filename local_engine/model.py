"""Loading causal language models from a path, a hub id or this package."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from local_engine.chat import check_template
from local_engine.config import Device, Dtype, locate
from local_engine.constrain import Grammars
from local_engine.errors import ConfigError, ModelLoadError
from local_engine.pieces import Pieces
from local_engine.reason.artifact import ExitArtifact, read_for
from local_engine.tool_calls import MARKERS, ToolFormat, tool_format
from local_engine.types import ModelCard

logger = logging.getLogger(__name__)

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
_UNBOUNDED: Final = 1 << 62
"""Tokens of a text: prompts that are too long are refused here, and transformers would warn of them beside that."""
_NAMED: Final = 3
"""Of many tensors, how many a sentence names."""


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
    network; a hub id honours `HF_HUB_OFFLINE`. Raises ModelLoadError naming what is wrong with a checkpoint that cannot
    be served, and ConfigError for a device that is not there.
    """
    place, local = locate(source)
    where = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "torch sees no CUDA device here; install its CUDA build, or say cpu or auto")
    try:
        tokenizer, network, unused = _read(place, local, _torch_dtype(dtype, where), where)
        if unused:
            logger.warning(
                "model %r (%s): its config.json has no place for %s of its weights, and they are left out: %s; "
                "if they belong to it, its answers are wrong",
                name, source, _counted(unused), _listed(unused),
            )  # fmt: skip
        return _made(name, network, tokenizer, where, read_for(Path(place)) if local else None)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {name!r} cannot be loaded from {source}: {error}") from error
    except Exception as error:
        logger.exception("loading model %r failed", name)
        raise ModelLoadError(
            f"model {name!r} cannot be loaded from {source}: {_in_words(error)}; the log says more"
        ) from error


def _read(place: str, local: bool, dtype: Any, where: torch.device) -> tuple[Any, Any, list[str]]:
    """Tokenizer, network, and the tensors that the network has no place for, of what transformers can read there."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_no_report)
    options = {"local_files_only": local, "trust_remote_code": False}
    with _reading("config.json", local):
        config = AutoConfig.from_pretrained(place, **options)
    _check_config(config)
    with _reading("tokenizer", local):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    tokenizer.model_max_length = _UNBOUNDED
    _check_tokenizer(tokenizer, config.vocab_size)
    with _reading("network", local, config.to_dict()):
        network, told = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told, to be refused here
            output_loading_info=True,
            **options,
        )
    _check_complete(told)
    network = network.to(where).eval()
    _check_finite(network)
    return tokenizer, network, sorted(told["unexpected_keys"])


@contextmanager
def _reading(part: str, local: bool, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Whatever transformers raises in here is said of this part of the checkpoint."""
    try:
        yield
    except Exception as error:
        fix = "; download its files again, or use another checkpoint" if local else ""
        raise ModelLoadError(f"its {part}: {_in_words(error, settings)}{fix}") from error


def _made(name: str, network: Any, tokenizer: Any, where: torch.device, exits: ExitArtifact | None) -> LocalModel:
    config = network.config
    vocabulary = tokenizer.get_vocab()
    think, end_think = vocabulary.get("<think>"), vocabulary.get("</think>")
    end_tokens = _end_tokens(network, tokenizer)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tools = tool_format(tokenizer.chat_template)
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
        pieces=Pieces(tokenizer),
        grammars=Grammars(
            tokenizer,
            vocabulary=config.vocab_size,
            end_tokens=end_tokens,
            think_tokens=(think, end_think) if think is not None and end_think is not None else None,
            tools=tools,
        ),
        tools=tools,
        tool_tokens=frozenset(vocabulary[marker] for marker in MARKERS if marker in vocabulary),
        exits=exits,
    )


def _torch_dtype(dtype: Dtype, device: torch.device) -> Any:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Raises ModelLoadError where there are none, and where tokenizer or network do not know one."""
    stated = network.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    named = [token for token in (*ends, tokenizer.eos_token_id) if token is not None]
    if not named:
        raise ModelLoadError("it names no token that ends an answer; set eos_token_id in its generation_config.json")
    known = set(tokenizer.get_vocab().values()).intersection(range(network.config.vocab_size))
    for token in named:
        if token not in known:
            raise ModelLoadError(
                f"its end token {token!r} is not among the {len(known)} tokens that its tokenizer and its network know;"
                " correct eos_token_id in its generation_config.json, or bring the tokenizer.json and"
                " tokenizer_config.json that belong to its weights"
            )
    return frozenset(named)


def _check_config(config: Any) -> None:
    """Raises ModelLoadError for what this engine does not run, and for what no network can be made of."""
    if config.model_type not in FAMILIES:
        raise ModelLoadError(f"it is of family {config.model_type!r}; this engine runs {', '.join(FAMILIES)}")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise ModelLoadError(
            f"its weights are quantized ({quantized.get('quant_method', 'in a way that it does not name')}), and this"
            " engine runs float32, float16 and bfloat16; use the checkpoint that they were made from"
        )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ModelLoadError(
            f"its config.json says pad_token_id {config.pad_token_id}, which is beyond its vocab_size"
            f" {config.vocab_size}; correct whichever is wrong"
        )


def _check_tokenizer(tokenizer: Any, width: int) -> None:
    """Raises ModelLoadError where it writes no prompts for a network that knows `width` tokens."""
    if not tokenizer.chat_template:
        raise ModelLoadError("it has no chat template; use an instruction-tuned checkpoint")
    if tokenizer.vocab_size > width:
        raise ModelLoadError(
            f"its tokenizer has {tokenizer.vocab_size} tokens, and its network {width};"
            " bring the tokenizer.json and tokenizer_config.json that belong to its weights"
        )
    check_template(tokenizer)


def _check_complete(told: Mapping[str, Any]) -> None:
    """Raises ModelLoadError where a tensor of the network was not read; `told`: transformers' loading info."""
    if missing := sorted(told["missing_keys"]):
        raise ModelLoadError(
            f"its weights lack {_counted(missing)} that its config.json asks for: {_listed(missing)};"
            " download them again, or correct its config.json"
        )
    if mismatched := sorted(told["mismatched_keys"]):
        shapes = [f"{name} is {list(found)}, not {list(asked)}" for name, found, asked in mismatched]
        raise ModelLoadError(
            f"its weights hold {_counted(shapes)} of another shape than its config.json asks for: {_listed(shapes)};"
            " bring the config.json that belongs to its weights"
        )


def _check_finite(network: Any) -> None:
    """Raises ModelLoadError for a tensor that holds what is no number: all that is computed of it would be none."""
    tensors: Iterable[tuple[str, torch.Tensor]] = chain(network.named_parameters(), network.named_buffers())
    for name, tensor in tensors:
        if not all(map(math.isfinite, tensor.detach().aminmax())):  # one pass, exact: NaN is both least and most
            raise ModelLoadError(
                f"its tensor {name} holds values that are not finite (NaN or infinite), so that its answers would be"
                " noise; download its weights and its config.json again, or use another checkpoint"
            )


def _counted(tensors: list[str]) -> str:
    return f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"


def _listed(tensors: list[str]) -> str:
    more = len(tensors) - _NAMED
    return ", ".join(tensors[:_NAMED]) + (f", and {more} more" if more > 0 else "")


def _in_words(error: Exception, settings: Mapping[str, Any] | None = None) -> str:
    """What a library raised, on one line. Where it looked for a value in vain, the one of `settings` that says it."""
    for missed in error.args if isinstance(error, KeyError) else ():
        for name in _saying(settings or {}, missed):
            return f"config.json says {name} {missed!r}, which transformers does not know"
    words = " ".join(str(error).split()).rstrip(".")
    return words if " " in words else f"{type(error).__name__}: {words}"


def _saying(settings: Mapping[str, Any], value: object) -> Iterator[str]:
    """Names of the settings that have this value."""
    for name, stated in settings.items():
        if isinstance(stated, Mapping):
            yield from (f"{name}.{inner}" for inner in _saying(stated, value))
        elif stated == value:
            yield name


def _no_report(record: logging.LogRecord) -> bool:
    """Keeps transformers' table of missing and unexpected tensors out of the log: they are told in a line here."""
    return "LOAD REPORT" not in record.getMessage()
