"""Train the bundled arithmetic models from nothing: `python scripts/train_bundled.py nano`, `... draft`, `... base`.

Each writes weights, tokenizer, configuration and the training part of its card; `scripts/evaluate_bundled.py` measures
them afterwards. The recipe: Muon for matrices, AdamW for the rest, bf16 autocast, packed rows, loss on the completion
only, and a small loss on two middle layers so that a reader may leave there. Nothing here is needed to serve a model.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bundled_data import ROW_TOKENS, VOCABULARY, WINDOW, Rows, attention_mask, make_tokenizer
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BUNDLED = Path(__file__).parents[1] / "local_engine" / "bundled"
ROWS_PER_STEP = {"short": 8, "long": 2}
EXIT_WEIGHT = 0.15
SEED = 20260101


@dataclass(frozen=True, slots=True)
class Size:
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    steps: int
    rate: float  # of Muon; AdamW gets a quarter
    exits: tuple[int, ...] = ()  # layers after which the next token should be readable
    verdict_share: float = 0.0


SIZES = {
    "nano": Size(96, 2, 3, 1, 256, steps=1500, rate=1.6e-2),
    "draft": Size(128, 3, 4, 2, 352, steps=1000, rate=1.6e-2),
    "base": Size(192, 6, 6, 3, 512, steps=5000, rate=1.2e-2, exits=(2, 4), verdict_share=0.75),
}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed_bias: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention in bf16, [rows, heads, tokens, head_dim]; `packed_bias` [rows, 1, tokens, tokens] is added to the
    scores. On a CPU it takes a third of the time of torch's flash attention with a mask, forward and backward."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2)) + packed_bias
    return torch.matmul(torch.softmax(scores, -1, dtype=scores.dtype), value).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def make_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "packed"
    return Qwen3ForCausalLM(config)


def losses(model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], exits: tuple[int, ...]) -> torch.Tensor:
    """[1 + exits]: the summed loss of the last layer, then of each exit, read through the same norm and head."""
    labels = batch["labels"][:, 1:].flatten()
    at = (labels != -100).nonzero()[:, 0]  # only these positions need logits
    # oneDNN keeps memory for every shape it meets, so there are few: some unlearnt positions fill up to a multiple.
    at = torch.cat([at, (labels == -100).nonzero()[: -len(at) % 128, 0]])
    bias = torch.zeros((), dtype=torch.bfloat16).masked_fill(~attention_mask(batch), -1e4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model(
            input_ids=batch["tokens"],
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=bool(exits),
            packed_bias=bias,
        )
        last, *middle = (
            hidden[:, :-1].flatten(0, 1)[at]
            for hidden in (out.last_hidden_state, *(out.hidden_states[layer] for layer in exits))
        )
        logits = [model.lm_head(hidden) for hidden in (last, *map(model.model.norm, middle))]
    return torch.stack([functional.cross_entropy(each.float(), labels[at], reduction="sum") for each in logits])


def train(args: argparse.Namespace) -> None:
    size = SIZES[args.model]
    steps = args.steps or size.steps
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, size)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimisers = [
        torch.optim.Muon(matrices, lr=size.rate, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=size.rate / 4, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    rows = Rows(tokenizer, args.seed, size.verdict_share)
    weights = torch.tensor([1.0] + [EXIT_WEIGHT] * len(size.exits))
    started, cpu, smoothed = time.monotonic(), time.process_time(), 0.0
    for step in range(steps):
        scale = min(1.0, (step + 1) / 30, 2 * (steps - step) / steps)  # warm-up, flat, linear decay
        batches = [rows.batch(kind, count) for kind, count in ROWS_PER_STEP.items()]
        learnt = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        each = torch.zeros_like(weights)
        for batch in batches:
            part = losses(model, batch, size.exits) / learnt
            (part @ weights).backward()  # type: ignore[no-untyped-call]  # torch does not type it
            each += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * scale
            optimiser.step()
            optimiser.zero_grad()
        smoothed = each[0].item() if step == 0 else 0.98 * smoothed + 0.02 * each[0].item()
        if step % 100 == 0 or step == steps - 1:
            exits = " ".join(f"{one.item():.3f}" for one in each[1:])
            spent = f"{time.monotonic() - started:.0f}s, cpu {time.process_time() - cpu:.0f}s"
            print(f"step {step}/{steps} loss {smoothed:.4f} exits {exits} {spent}", flush=True)
    save(model, tokenizer, args.out)
    card = {
        "name": f"bundled/{args.model}",
        "task": "synthetic arithmetic: sums, differences, products and remainders in 1 to 10 operations, as a chat",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        "training_steps": steps,
        "training_tokens": steps * sum(rows * ROW_TOKENS[kind] for kind, rows in ROWS_PER_STEP.items()),
        "training_minutes": round((time.monotonic() - started) / 60, 1),
        "training_core_minutes": round((time.process_time() - cpu) / 60, 1),
        "training_threads": args.threads,
        "final_loss": round(smoothed, 4),
        "date": time.strftime("%Y-%m-%d"),
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A copy in bfloat16; the model itself goes on training in float32."""
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=tuple(SIZES))
    parser.add_argument("--out", type=Path, help="folder to write; default: the model's place in the package")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, help="default: the size's own")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out = args.out or BUNDLED / args.model
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
