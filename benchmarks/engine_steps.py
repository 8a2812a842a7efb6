"""Seconds of one engine step, and how far that is from what the machine could do.

    python -m benchmarks.engine_steps 29m --dtype bfloat16 --threads 1

Random weights in Qwen3's shape; decode at several batch sizes over a context that is already held.
"""

import argparse
import dataclasses
import time
from typing import Final

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from local_engine.bench import decode_steps
from local_engine.calibrate import calibrate
from local_engine.model import LocalModel, load_model
from local_engine.runner import Runner, new_kv
from local_engine.types import ModelCard

SHAPES: Final = {
    "0.2m": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3},
    "2.4m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6},
    "29m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8},
}
KV_BYTES: Final = 1 << 30


def random_model(size: str, dtype: torch.dtype, published: torch.dtype = torch.float32) -> LocalModel:
    """Random weights of `SHAPES[size]`, with the bundled model's tokenizer; in `dtype`, as a checkpoint of the
    `published` type gives them."""
    heads = SHAPES[size]["num_attention_heads"]
    config = Qwen3Config(
        **SHAPES[size],
        num_key_value_heads=max(1, heads // 2 if heads % 2 == 0 else 1),
        head_dim=64 if size == "29m" else 32,
        vocab_size=4096 if size == "29m" else 512,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(config).to(published).to(dtype).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    card = ModelCard(size, config.max_position_embeddings, parameters, reasoning=False)
    return dataclasses.replace(load_model("m", "bundled/base", "float32", "cpu"), card=card, network=network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--published", choices=["float32", "bfloat16"], default="float32", help="of the checkpoint")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a shared machine; one thread")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    model = random_model(options.size, getattr(torch, options.dtype), getattr(torch, options.published))
    runner = Runner(model, new_kv(model, KV_BYTES))
    calibration = calibrate(model, runner, clock=clock)
    print(
        f"{model.card.parameters / 1e6:.1f}M {options.dtype}, {options.threads} thread(s):"
        f" {calibration.bytes_per_s / 1e9:.1f} GB/s, {calibration.flops_per_s / 1e9:.0f} GFLOP/s"
    )
    for step in decode_steps(runner, calibration, (1, 8, 32), options.context, 3.0, clock):
        print(
            f"batch {step.rows:2}: {step.seconds * 1e3:7.2f} ms, {step.rows / step.seconds:8.0f} tokens/s,"
            f" {step.bound_s / step.seconds:4.0%} of the bound, taps {step.tapped_s / step.seconds - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
