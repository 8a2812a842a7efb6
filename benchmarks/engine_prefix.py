"""What the prefix store of the local engine gives and costs, in this process: `python -m benchmarks.engine_prefix`.

- time to first token of a prompt of which 1,000 tokens were computed before, beside the same prompt cold;
- what looking up, hashing and copying out cost when nothing ever hits, as a share of all CPU time: the same requests on
  engines with a store and on one without, in turns, the median of the turns' ratios;
- the two again for one prompt of 1,000 tokens on the host alone.

CPU time of this process, not wall time, for what is compared: a busy machine does not change it much.
"""

import argparse
import json
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import truediv
from typing import Any

import msgspec
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from local_engine.prefix import PrefixStore
from local_engine.prefix_identity import KVIdentity, KVLayout
from local_engine.prefix_types import PrefixStats
from local_engine.types import Delta, Event, Finished, Generate, SamplingParams

SHARED = 1000
SIZES = {"2.4M": None, "29M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9}}
"""The bundled base, and a random Qwen3 with 8 query and 4 KV heads of 64."""
TURNS = {"2.4M": 45, "29M": 11}
"""Of a comparison of CPU times, so that each takes some twenty seconds."""


def model_of(size: str) -> LocalModel:
    bundled = load_model("m", "bundled/base", "float32", "cpu")
    config = bundled.network.config
    if (sizes := SIZES[size]) is not None:
        torch.manual_seed(7)
        config = Qwen3Config(
            vocab_size=config.vocab_size, num_attention_heads=8, num_key_value_heads=4, head_dim=64, **sizes
        )
        bundled = replace(bundled, network=Qwen3ForCausalLM(config).eval())
    bundled.network.config.max_position_embeddings = 4096
    card = msgspec.structs.replace(bundled.card, context_window=4096)
    return replace(bundled, card=card, end_tokens=frozenset())


class Talk:
    """One link to an engine."""

    def __init__(self, engine: Engine) -> None:
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._link = engine.connect(self._events.put)
        self._ids = iter(range(1, 1_000_000))

    def run(self, prompts: list[str], tokens: int) -> tuple[float, Finished]:
        """Seconds to the first token of all, and the last end."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        began = time.perf_counter()
        for prompt in prompts:
            messages = json.dumps([{"role": "user", "content": prompt}]).encode()
            self._link.submit(Generate(next(self._ids), "m", messages, sampling, salt="bench"))
        first, left = 0.0, len(prompts)
        while True:
            for event in self._events.get():
                if isinstance(event, Delta | Finished) and not first:
                    first = time.perf_counter() - began
                if isinstance(event, Finished):
                    left -= 1
                    if not left:
                        return first, event


def words(seed: int, count: int) -> str:
    """Text of about `count` tokens that no other seed begins like: digits are tokens."""
    rng = random.Random(seed)
    return "".join(rng.choice("0123456789") for _ in range(count))


def first_token(model: LocalModel, repeats: int) -> dict[str, float]:
    engine = Engine({"m": model}, prefill_chunk=2048, step_s=10.0)
    engine.start()
    talk = Talk(engine)
    cold, warm = [], []
    for turn in range(repeats):
        shared = words(turn, SHARED + 16)
        cold.append(talk.run([shared + " one"], 1)[0])
        seconds, end = talk.run([shared + " two"], 1)
        assert end.cached_tokens >= SHARED, end
        warm.append(seconds)
    engine.stop()
    return {
        "cold_ms": round(1e3 * min(cold), 2),
        "warm_ms": round(1e3 * min(warm), 2),
        "cold_median_ms": round(1e3 * statistics.median(cold), 2),
        "warm_median_ms": round(1e3 * statistics.median(warm), 2),
        "times_faster": round(min(cold) / min(warm), 1),
    }


def cost_without_hits(model: LocalModel, repeats: int) -> dict[str, float]:
    """CPU seconds of 8 requests of 256 new prompt tokens and 32 generated ones, by stores that are full.

    `storing` takes everything in, `resting` has found that nothing of it is used (`prefix_admission.py`).
    """
    config = model.network.config
    layout = KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, torch.float32)
    turn_bytes = 8 * (256 + 32) * layout.kv_bytes(1)  # a little less than a turn stores
    sizes = {"without": 0, "storing": (repeats + 2) * turn_bytes, "resting": turn_bytes}
    engines = {name: Engine({"m": model}, prefix_bytes=size) for name, size in sizes.items()}
    talks = {}
    for name, engine in engines.items():
        engine.start()
        talks[name] = Talk(engine)
    turns = iter(range(1_000_000))

    def run(name: str) -> float:
        turn = next(turns)
        prompts = [words(1000 * turn + at, 256) for at in range(8)]
        began = time.process_time()
        talks[name].run(prompts, 32)
        return time.process_time() - began

    def stats(name: str) -> PrefixStats:
        return engines[name].prefix_stats()["m"]

    for _ in range(3):
        run("without")
    for name in ("storing", "resting"):
        while not stats(name).evicted_tokens:
            run(name)
    while not stats("resting").resting:
        run("resting")
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats):
        for name in list(engines)[:: 1 if turn % 2 else -1]:
            spent[name].append(run(name))
    assert not stats("storing").resting, "it stored to the end"
    assert stats("resting").resting, "and it not at all"
    assert all(stats(name).hit_tokens <= 16 * 8 * next(turns) for name in sizes if name != "without"), "the template's"
    for engine in engines.values():
        engine.stop()
    costs = {
        f"{name}_percent": round(100 * (statistics.median(map(truediv, spent[name], spent["without"])) - 1), 2)
        for name in ("storing", "resting")
    }
    return {f"cpu_{name}_s": round(statistics.median(seconds), 4) for name, seconds in spent.items()} | costs


def host_cost(model: LocalModel, repeats: int) -> dict[str, float]:
    """Microseconds on the host for one prompt of 1,000 tokens, KV copied by this process."""
    config = model.network.config
    layout = KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, torch.float32)
    tokens = list(range(SHARED))
    kv = torch.zeros(layout.shape(SHARED))

    def export(start: int, blocks: Sequence[torch.Tensor]) -> None:
        for block in blocks:
            block.copy_(kv[:, :, :, start : start + block.shape[3]])

    def store() -> PrefixStore:
        return PrefixStore(KVIdentity("m", "w", layout), bytes_limit=1 << 28)

    full = store()
    full.commit(b"", tokens, export)
    fresh: Iterator[PrefixStore] = iter([store() for _ in range(repeats)])
    return {
        "lookup_miss_us": _least(lambda: store().lookup(b"", tokens).close(), repeats),
        "lookup_hit_us": _least(lambda: full.lookup(b"", tokens).close(), repeats),
        "commit_known_us": _least(lambda: full.commit(b"", tokens, export), repeats),
        "commit_new_us": _least(lambda: next(fresh).commit(b"", tokens, export), repeats),
    }


def _least(work: Callable[[], object], repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return round(1e6 * min(spent), 1)


def measure(size: str, repeats: int) -> dict[str, Any]:
    model = model_of(size)
    return {
        "model": size,
        "kv_bytes_per_token": KVLayout(
            model.network.config.num_hidden_layers,
            model.network.config.num_key_value_heads,
            model.network.config.head_dim,
            torch.float32,
        ).kv_bytes(1),
        "host": host_cost(model, 10 * repeats),
        "first_token": first_token(model, repeats),
        "no_hits": cost_without_hits(model, TURNS[size]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.models:
        print(json.dumps(measure(size, options.repeats), indent=2))


if __name__ == "__main__":
    main()
