"""Train the bundled arithmetic model from nothing: `python scripts/train_bundled.py train`, then `... evaluate`.

`train` writes weights, tokenizer and configuration; `evaluate` asks the real engine held-out problems and writes
`card.json` beside them. The recipe (Muon for matrices, AdamW for the rest, packed rows, loss on the completion only)
was chosen on one CPU core; nothing here is needed to serve the model.
"""

import argparse
import json
import math
import queue
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from local_engine.arithmetic import LEVELS, REFUSAL, Problem, other_prompt, problem_stream, problems
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.types import Delta, Effort, Event, Generate, SamplingParams

OUT = Path(__file__).parents[1] / "local_engine" / "bundled" / "base"
LEVEL_SHARES = (0.28, 0.28, 0.22, 0.22)
OTHER_SHARE = 0.09
EFFORT_SHARES = {"none": 0.12, "low": 0.68, "high": 0.20}
SLIP_SHARE = 0.15  # of high-effort samples: the first pass holds a slip, found by the check; slips carry no loss
ROW_TOKENS = 320
ROWS_PER_STEP = 8
VOCABULARY = 512
IM_START, IM_END, HIGH, THINK, END_THINK = "<|im_start|>", "<|im_end|>", "<|high|>", "<think>", "</think>"
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a careful calculator.", "Answer briefly.", "Be concise.")

# Qwen's layout. `effort` is none, low (the default) or high; Qwen3's `enable_thinking=False` means none.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role in ('system', 'developer', 'user', 'assistant') and message.content is string %}
{%- set text = message.content.split('</think>')[-1] if message.role == 'assistant' else message.content %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{{- '<|im_start|>' + role + '\\n' + text.strip() + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if effort == 'none' or enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- elif effort == 'high' %}
{{- '<|high|>' }}
{%- endif %}
{%- endif %}"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One sample: a prompt as the chat template renders it, and completion pieces with whether they carry loss."""

    prompt: str
    completion: tuple[tuple[str, bool], ...]


def samples(seed: int) -> Iterator[Turn]:
    rng = random.Random(seed)
    streams = [problem_stream(rng, level, "train") for level in LEVELS]
    while True:
        history = _system(rng)
        if rng.random() < 0.12:
            earlier = next(rng.choices(streams, LEVEL_SHARES)[0])
            history += _said("user", earlier.question) + _said("assistant", _final(earlier))
        effort = rng.choices(tuple(EFFORT_SHARES), tuple(EFFORT_SHARES.values()))[0]
        if rng.random() < OTHER_SHARE:
            question, lines, final = other_prompt(rng), (("This is not for me.\n", True),), REFUSAL
        else:
            levels = LEVEL_SHARES if effort != "none" else (0.6, 0.3, 0.1, 0.0)
            problem = next(rng.choices(streams, levels)[0])
            question, lines, final = problem.question, _working(rng, problem, effort), _final(problem)
        prompt = history + _said("user", question) + f"{IM_START}assistant\n"
        if effort == "none":
            yield Turn(f"{prompt}{THINK}\n\n{END_THINK}\n\n", ((final + IM_END, True),))
        else:
            head, tail = (f"{THINK}\n", True), (f"{END_THINK}\n\n{final}{IM_END}", True)
            yield Turn(prompt + (HIGH if effort == "high" else ""), (head, *lines, tail))


def _working(rng: random.Random, problem: Problem, effort: str) -> tuple[tuple[str, bool], ...]:
    steps = tuple((f"{step}\n", True) for step in problem.steps)
    if effort != "high":
        return steps
    first = list(steps)
    if rng.random() < SLIP_SHARE:
        at = rng.randrange(len(first))
        left, right = problem.steps[at].split(" = ")
        first[at] = (f"{left} = {max(0, int(right) + rng.choice((-10, -1, 1, 10)))}\n", False)
    return (*first, ("Wait, let me check.\n", True), *steps)


def _system(rng: random.Random) -> str:
    return _said("system", rng.choice(SYSTEM_PROMPTS)) if rng.random() < 0.15 else ""


def _said(role: str, text: str) -> str:
    return f"{IM_START}{role}\n{text}{IM_END}\n"


def _final(problem: Problem) -> str:
    return f"The answer is {problem.answer}."


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text works; each digit is its own token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    turns = (turn for turn, _ in zip(samples(seed), range(20_000), strict=False))
    plain = (turn.prompt + "".join(text for text, _ in turn.completion) for turn in turns)
    markers = (IM_START, IM_END, HIGH, THINK, END_THINK)
    bpe.train_from_iterator((_without(text, markers) for text in plain), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=IM_END, pad_token=IM_END, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, HIGH]})
    tokenizer.add_tokens([THINK, END_THINK])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def _without(text: str, markers: tuple[str, ...]) -> str:
    for marker in markers:
        text = text.replace(marker, "\n")
    return text


def packed_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of whole samples: tokens, labels (-100 where no loss), positions and sample numbers (0: padding)."""
    encode = tokenizer.backend_tokenizer.encode
    row: dict[str, list[int]] = {"tokens": [], "labels": [], "positions": [], "sample": []}
    number = 0
    for turn in samples(seed):
        tokens, labels = _encoded(encode, turn)
        if len(tokens) > ROW_TOKENS:
            continue
        if len(row["tokens"]) + len(tokens) > ROW_TOKENS:
            short = ROW_TOKENS - len(row["tokens"])
            padding = {"tokens": 0, "labels": -100, "positions": 0, "sample": 0}
            yield {key: torch.tensor(values + [padding[key]] * short) for key, values in row.items()}
            row, number = {key: [] for key in row}, 0
        number += 1
        row["tokens"] += tokens
        row["labels"] += labels
        row["positions"] += range(len(tokens))
        row["sample"] += [number] * len(tokens)


def _encoded(encode: Any, turn: Turn) -> tuple[list[int], list[int]]:
    tokens: list[int] = encode(turn.prompt, add_special_tokens=False).ids
    labels = [-100] * len(tokens)
    for text, learn in turn.completion:
        piece = encode(text, add_special_tokens=False).ids
        tokens += piece
        labels += piece if learn else [-100] * len(piece)
    return tokens, labels


def loss_of(model: Qwen3ForCausalLM, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    same = batch["sample"][:, :, None] == batch["sample"][:, None, :]
    mask = (same & torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril())[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch["tokens"], attention_mask=mask, position_ids=batch["positions"], use_cache=False
        ).last_hidden_state
        learnt = batch["labels"][:, 1:] != -100  # only these positions need logits
        logits = model.lm_head(hidden[:, :-1][learnt])
    return functional.cross_entropy(logits.float(), batch["labels"][:, 1:][learnt])


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    if len(tokenizer) > VOCABULARY:
        raise SystemExit(f"vocabulary holds {len(tokenizer)} tokens, the model {VOCABULARY}")
    model = make_model(tokenizer, args.layers)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimisers = [
        torch.optim.Muon(matrices, lr=1.2e-2, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    rows = packed_rows(tokenizer, args.seed)
    started, smoothed = time.monotonic(), 0.0
    for step in range(args.steps):
        scale = min(1.0, (step + 1) / 30, 2 * (args.steps - step) / args.steps)  # warm-up, flat, linear decay
        loss = loss_of(model, [next(rows) for _ in range(ROWS_PER_STEP)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * scale
            optimiser.step()
            optimiser.zero_grad()
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}/{args.steps} loss {smoothed:.4f} {time.monotonic() - started:.0f}s", flush=True)
    minutes = (time.monotonic() - started) / 60
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    card = {
        "name": "bundled/base",
        "task": "synthetic arithmetic: add, subtract and multiply in 1 to 4 operations",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        "training_steps": args.steps,
        "training_tokens": args.steps * ROWS_PER_STEP * ROW_TOKENS,
        "training_minutes": round(minutes, 1),
        "training_threads": args.threads,
        "final_loss": round(smoothed, 4),
        "date": time.strftime("%Y-%m-%d"),
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    """Ask the real engine held-out problems, greedily, and write the shares right into the card."""
    torch.set_num_threads(args.threads)
    engine = Engine({"base": load_model("base", str(args.out))})
    engine.start()
    accuracy: dict[str, dict[str, Any]] = {}
    for effort in get_args(Effort):
        for level in LEVELS:
            asked = problems(args.seed, level, args.n)
            right = sum(
                said == _final(problem) for said, problem in zip(answers(engine, asked, effort), asked, strict=True)
            )
            low, high = wilson(right, args.n)
            row = {"right": right, "n": args.n, "share": right / args.n, "wilson95": [round(low, 3), round(high, 3)]}
            accuracy.setdefault(effort, {})[f"level_{level}"] = row
            print(effort, level, row, flush=True)
    engine.stop()
    card_path = args.out / "card.json"
    card = {**json.loads(card_path.read_text()), "accuracy": accuracy}
    card_path.write_text(json.dumps(card, indent=2) + "\n")


def answers(engine: Engine, asked: list[Problem], effort: Effort) -> list[str]:
    """The content of each answer, thinking left out."""
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    link = engine.connect(events.put)
    for id, problem in enumerate(asked):
        messages = json.dumps([{"role": "user", "content": problem.question}]).encode()
        link.submit(Generate(id, "base", messages, SamplingParams(temperature=0, max_tokens=300, effort=effort)))
    said, open_answers = [""] * len(asked), len(asked)
    while open_answers:
        for event in events.get():
            if isinstance(event, Delta):
                said[event.id] += event.content
            else:
                open_answers -= 1
    return said


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a share."""
    p, scale = right / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / scale, (middle + half) / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--n", type=int, default=200, help="problems per level and effort")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    {"train": train, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()
