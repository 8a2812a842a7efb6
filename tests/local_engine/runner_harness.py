"""What tests of the runner share: small random networks, and transformers' word for what they must give."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from local_engine import kernels
from local_engine.kv import KVCache
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment
from tests.local_engine.engine_harness import ARCHITECTURES

FAMILIES = sorted(ARCHITECTURES)
LAYERS = 3
WIDTH = 48
CONTEXT = 256
BUDGET = 64 << 20
TOLERANCE = 1e-5
"""Between logits of up to 3, as these are; transformers itself differs by 2e-6 between one pass and token by token.
Larger ones: test_bundled_logits.py."""


@contextmanager
def by_torch() -> Iterator[None]:
    """As on a CPU that our own kernels are not for: what is made meanwhile runs by torch's and oneDNN's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda dtype, device: False)
        yield


def tiny_network(family: str, width: int = WIDTH) -> Any:
    """The same random weights at every call; Mistral sees 24 tokens back, and one of Qwen3's layers too."""
    config_class, network_class = ARCHITECTURES[family]
    windows = {
        "mistral": {"sliding_window": 24},
        "qwen3": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2, "head_dim": 32},
    }
    config = config_class(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1 * (WIDTH / width) ** 0.5,
        bos_token_id=None,
        eos_token_id=None,
        **windows.get(family, {}),
    )
    torch.manual_seed(5)
    return network_class(config).eval()


def tiny_model(family: str, like: LocalModel, width: int = WIDTH) -> LocalModel:
    """On the device and in the type of the other."""
    network = tiny_network(family, width).to(device=like.device, dtype=like.network.dtype)
    return dataclasses.replace(like, network=network)


def text(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def tolerance(of: Tensor) -> float:
    """Of what transformers gives: on CUDA its attention adds up in another order; bfloat16 has 8 bits."""
    if of.dtype == torch.bfloat16:
        return 0.1
    return 1e-4 if of.is_cuda else TOLERANCE


def close(left: Tensor, right: Tensor) -> bool:
    """`right` is what transformers gives."""
    return left.shape == right.shape and float((left - right).abs().max()) <= tolerance(right)


@dataclasses.dataclass
class Pair:
    """A runner, and transformers' own network with the same weights."""

    runner: Runner
    kv: KVCache
    reference: Any

    def read(self, tokens: list[int]) -> int:
        """A new slot that holds `tokens`."""
        slot = self.kv.open(len(tokens))
        self.runner.run([Segment(slot, 0, tokens)])
        return slot

    def next_logits(self, slot: int, tokens: list[int]) -> Tensor:
        """Append the last of `tokens` to a slot that holds the others."""
        return self.runner.run([Segment(slot, len(tokens) - 1, tokens[-1:], logits=1)]).logits[0]

    def ids(self, tokens: list[int]) -> Tensor:
        """As transformers takes them."""
        return torch.tensor([tokens], device=self.kv.shape.device)

    @torch.no_grad()
    def expected(self, tokens: list[int], last: int = 1) -> Tensor:
        logits: Tensor = self.reference(self.ids(tokens)).logits[0, -last:]
        return logits
