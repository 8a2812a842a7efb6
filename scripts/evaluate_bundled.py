"""Measure the bundled models on questions that none was trained on: `python scripts/evaluate_bundled.py`.

Writes `card.json` and `card.md` beside each model: accuracy by level and effort, what an exit at the cue would save,
how often the recheck spoils a right answer, how well a smaller model foretells base's tokens, from which layer on the
next token can be read, and what probes on hidden states know beyond prompt length and token log-probabilities.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from bundled_cards import card_text
from bundled_data import END_THINK, STEP_END, final
from bundled_statistics import auc, auc_within, out_of_fold, wilson
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_engine.arithmetic import LEVELS, VERDICT_CUE, Problem, problems
from local_engine.chat import prompt_tokens
from local_engine.types import Effort

BUNDLED = Path(__file__).parents[1] / "local_engine" / "bundled"
MAX_TOKENS = {"none": 30, "low": 250, "high": 800}
BATCH = 64
Tokens = list[int]
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    problem: Problem
    prompt: Tokens
    tokens: Tokens
    """The greedy continuation, its end of turn included."""
    right: bool


class Model:
    """A bundled model with greedy batches and a pass that reads given tokens."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = int(self.network.config.num_hidden_layers)
        vocabulary = self.tokenizer.get_vocab()
        self.cue: int = vocabulary["Wait"]
        self.end: int = self.tokenizer.eos_token_id
        (self.step_end,) = self.encode(STEP_END)
        self.digits = [vocabulary[str(digit)] for digit in range(10)]

    def encode(self, text: str) -> Tokens:
        ids: Tokens = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def ask(self, asked: Sequence[Problem], effort: Effort) -> list[Said]:
        prompts = [
            prompt_tokens(self.tokenizer, [{"role": "user", "content": problem.question}], effort=effort)
            for problem in asked
        ]
        written = self.complete(prompts, MAX_TOKENS[effort])
        return [
            Said(problem, prompt, tokens, self.content(tokens) == final(problem))
            for problem, prompt, tokens in zip(asked, prompts, written, strict=True)
        ]

    def content(self, tokens: Tokens) -> str:
        """What is said after the thinking, "" when it never ends."""
        text: str = self.tokenizer.decode(tokens)
        if not text.endswith("<|im_end|>") or ("<think>" in text and END_THINK not in text):
            return ""
        return text.removesuffix("<|im_end|>").split(END_THINK)[-1].strip()

    @torch.no_grad()
    def complete(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        """The greedy continuation of each prompt."""
        out: list[Tokens] = [[] for _ in prompts]
        for rows in _by_length(prompts):
            width = max(len(prompts[i]) for i in rows)
            ids = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for at, i in enumerate(rows):
                ids[at, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[at, width - len(prompts[i]) :] = 1
            room = min(max_tokens, self.network.config.max_position_embeddings - width)
            written = self.network.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=self.end
            )
            for i, tokens in zip(rows, written[:, width:].tolist(), strict=True):
                out[i] = tokens[: tokens.index(self.end) + 1] if self.end in tokens else tokens
        return out

    @torch.no_grad()
    def read(self, texts: Sequence[Tokens]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, [layers + 1, tokens, width]) of each text: embeddings and every layer's output, the last normed."""
        for rows in _by_length(texts):
            width = max(len(texts[i]) for i in rows)
            ids = torch.tensor([texts[i] + [self.end] * (width - len(texts[i])) for i in rows])
            states = torch.stack(self.network.model(input_ids=ids, output_hidden_states=True).hidden_states)
            for at, i in enumerate(rows):
                yield i, states[:, at, : len(texts[i])]

    @torch.no_grad()
    def logits(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """[tokens, vocabulary], read after `layer` layers."""
        normed = states[layer] if layer == self.layers else self.network.model.norm(states[layer])
        logits: torch.Tensor = self.network.lm_head(normed)
        return logits


def _by_length(texts: Sequence[Tokens]) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def evaluate(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    models = {name: Model(args.folder / name) for name in ("base", "draft", "nano")}
    base_said: list[Said] = []
    draft_said: list[Said] = []
    for name in args.models:
        model = models[name]
        said = {
            (effort, level): model.ask(problems(args.seed, level, args.n), effort)
            for effort in get_args(Effort)
            for level in LEVELS
        }
        thought = [one for (effort, _), some in said.items() if effort != "none" for one in some]
        figures: Figures = {"evaluation": {"seed": args.seed, "n_per_level": args.n, "precision": "float32"}}
        figures["accuracy"] = _accuracy(said)
        figures["exit_at_cue"] = _exits(model, said)
        figures["exit_layers"] = _lens(model, thought)
        if name == "base":
            base_said = thought
            figures["probes"] = _query_probes(model, args) | _cue_probes(model, args)
        else:
            figures["agreement_with_base"] = _agreement(model, base_said)
        if name == "draft":
            draft_said = [one for level in LEVELS for one in said["low", level]]
        _write(args.folder / name, figures)
    if "base" in args.models and "draft" in args.models:
        _write(args.folder / "base", {"verdicts_on_draft_steps": _verdicts(models["base"], draft_said)})


def _accuracy(said: dict[tuple[Effort, int], list[Said]]) -> Figures:
    table: Figures = {}
    for (effort, level), some in said.items():
        right, n = sum(one.right for one in some), len(some)
        table.setdefault(effort, {})[f"level_{level}"] = {
            "right": right,
            "n": n,
            "share": round(right / n, 4),
            "wilson95": wilson(right, n),
            "mean_tokens": round(float(np.mean([len(one.tokens) for one in some])), 1),
        }
        print(effort, level, table[effort][f"level_{level}"], flush=True)
    return table


def _forced(model: Model, said: Sequence[Said]) -> tuple[list[Said], list[bool], list[int]]:
    """Those that reach a cue: they, whether the answer forced there is right, and the tokens it takes in all."""
    cued = [one for one in said if model.cue in one.tokens]
    stop = model.encode(f"{END_THINK}{STEP_END}")
    kept = [one.tokens[: one.tokens.index(model.cue)] + stop for one in cued]
    ends = model.complete([one.prompt + tokens for one, tokens in zip(cued, kept, strict=True)], MAX_TOKENS["none"])
    right = [model.content(end) == final(one.problem) for one, end in zip(cued, ends, strict=True)]
    return cued, right, [len(tokens) + len(end) for tokens, end in zip(kept, ends, strict=True)]


def _exits(model: Model, said: dict[tuple[Effort, int], list[Said]]) -> Figures:
    """High effort cut at the first cue. The oracle leaves there exactly when the forced answer is right."""
    table: Figures = {}
    for level in (*LEVELS, None):
        some = [one for at in LEVELS if level in (at, None) for one in said["high", at]]
        cued, right, tokens = _forced(model, some)
        full = sum(len(one.tokens) for one in some)
        saved = sum(len(one.tokens) - n for one, good, n in zip(cued, right, tokens, strict=True) if good)
        both = list(zip(cued, right, strict=True))
        table["all" if level is None else f"level_{level}"] = {
            "n": len(some),
            "reach_cue": len(cued),
            "forced_right": sum(right),
            "oracle_saves": round(saved / full, 4),
            "spoilt_by_recheck": sum(good and not one.right for one, good in both),
            "repaired_by_recheck": sum(one.right and not good for one, good in both),
        }
    print("exits", table["all"], flush=True)
    return table


def _lens(model: Model, said: Sequence[Said]) -> Figures:
    """How often the token read after each layer is the last layer's, over written tokens."""
    same, n = np.zeros(model.layers + 1), 0
    texts = [one.prompt + one.tokens for one in said]
    for i, states in model.read(texts):
        last = model.logits(states, model.layers)[len(said[i].prompt) - 1 : -1].argmax(-1)
        n += len(last)
        for layer in range(1, model.layers + 1):
            early = model.logits(states, layer)[len(said[i].prompt) - 1 : -1].argmax(-1)
            same[layer] += int((early == last).sum())
    return {"tokens": n, "agreement": {str(layer): round(same[layer] / n, 4) for layer in range(1, model.layers + 1)}}


def _agreement(model: Model, base_said: Sequence[Said]) -> Figures:
    """The share of base's greedy tokens that this model's first choice is too, given the same text before."""
    same: dict[str, list[int]] = {}
    for i, states in model.read([one.prompt + one.tokens for one in base_said]):
        one = base_said[i]
        guess = model.logits(states, model.layers)[len(one.prompt) - 1 : -1].argmax(-1).tolist()
        hits = [int(a == b) for a, b in zip(guess, one.tokens, strict=True)]
        for key in (f"level_{one.problem.level}", "all"):
            same.setdefault(key, []).extend(hits)
    figures = {key: round(float(np.mean(hits)), 4) for key, hits in sorted(same.items())}
    print("agreement", figures, flush=True)
    return {"tokens": len(same["all"]), "share": figures}


def _query_probes(model: Model, args: argparse.Namespace) -> Figures:
    """Is the low-effort answer right? Asked before its first token."""
    said = [one for level in LEVELS for one in model.ask(problems(args.seed + 1, level, args.probe_n), "low")]
    right = np.array([one.right for one in said])
    length = np.array([len(one.prompt) for one in said], dtype=float)
    carries = np.array([one.problem.carries for one in said], dtype=float)
    states = np.zeros((len(said), model.layers + 1, model.network.config.hidden_size), dtype=np.float32)
    for i, hidden in model.read([one.prompt for one in said]):
        states[i] = hidden[:, -1].numpy()
    features = {"prompt_length": length[:, None], "prompt_length_and_carries": np.stack([length, carries], 1)}
    features |= {f"hidden_layer_{layer}": states[:, layer] for layer in range(1, model.layers + 1)}
    scores = {name: out_of_fold(columns, right) for name, columns in features.items()}
    best = max((name for name in scores if "hidden" in name), key=lambda name: auc(scores[name], right)[0])
    scores[f"{best}_and_length"] = out_of_fold(np.column_stack([features[best], length]), right)
    table: Figures = {"n": len(said), "right": int(right.sum()), "label": "low-effort answer right"}
    table["auc"] = {name: auc(score, right) for name, score in scores.items()}
    scores["fewer_carries"] = -carries
    table["auc_at_equal_length"] = {
        name: auc_within(score, right, length) for name, score in scores.items() if name != "prompt_length"
    }
    print("query", table, flush=True)
    return {"at_prompt": table}


def _cue_probes(model: Model, args: argparse.Namespace) -> Figures:
    """Would an answer forced at the first cue be right? Asked when the cue has been written."""
    said = [one for level in LEVELS for one in model.ask(problems(args.seed + 2, level, args.probe_n // 2), "high")]
    cued, forced, _ = _forced(model, said)
    right = np.array(forced)
    states = np.zeros((len(cued), model.layers + 1, model.network.config.hidden_size), dtype=np.float32)
    mean, low = np.zeros(len(cued)), np.zeros(len(cued))
    texts = [one.prompt + one.tokens[: one.tokens.index(model.cue) + 1] for one in cued]
    for i, hidden in model.read(texts):
        states[i] = hidden[:, -1].numpy()
        start = len(cued[i].prompt)
        logprobs = torch.log_softmax(model.logits(hidden, model.layers)[start - 1 : -1], -1)
        chosen = logprobs.gather(1, torch.tensor(texts[i][start:])[:, None])[:-1]  # without the cue itself
        mean[i], low[i] = float(chosen.mean()), float(chosen.min())
    plain = np.column_stack([np.array([len(one.prompt) for one in cued]), mean, low, np.log(-low + 1e-6)])
    features = {
        "prompt_length": plain[:, :1],
        "mean_logprob": plain[:, 1:2],
        "min_logprob": plain[:, 2:4],
        "length_mean_min": plain,
    }
    features |= {f"hidden_layer_{layer}": states[:, layer] for layer in range(1, model.layers + 1)}
    scores = {name: out_of_fold(columns, right) for name, columns in features.items()}
    best = max((name for name in scores if "hidden" in name), key=lambda name: auc(scores[name], right)[0])
    scores[f"{best}_and_length_mean_min"] = out_of_fold(np.column_stack([features[best], plain]), right)
    table = {"n": len(cued), "right": int(right.sum()), "label": "answer forced at the first cue right"}
    table["auc"] = {name: auc(score, right) for name, score in scores.items()}
    print("cue", table, flush=True)
    return {"at_cue": table}


def _verdicts(model: Model, draft_said: Sequence[Said]) -> Figures:
    """Base judges the draft's steps, of each answer the first wrong one, or else the last: by its rating, and beside
    it by the lowest log-probability that it gives to a token of the step, for which it need not be asked."""
    asked, steps, right = [], [], []
    cue = model.encode(VERDICT_CUE)
    for one in draft_said:
        ends = [at + 1 for at, token in enumerate(one.tokens) if token == model.step_end]
        lines = [step.short for step in one.problem.steps]
        start = 2  # "<think>" and a line feed
        for at, end in enumerate(ends[: len(lines)]):
            good = model.tokenizer.decode(one.tokens[start : end - 1]) == lines[at]
            if not good or at == len(lines) - 1:
                asked.append(one.prompt + one.tokens[:end] + cue)
                steps.append(slice(len(one.prompt) + start, len(one.prompt) + end))
                right.append(good)
                break
            start = end
    rating, lowest = np.zeros(len(asked)), np.zeros(len(asked))
    for i, states in model.read(asked):
        logits, step = model.logits(states, model.layers), steps[i]
        rating[i] = float(torch.softmax(logits[-1, model.digits], -1) @ torch.arange(10.0))
        logprobs = torch.log_softmax(logits[step.start - 1 : step.stop - 1], -1)
        lowest[i] = float(logprobs.gather(1, torch.tensor(asked[i][step])[:, None]).min())
    good = np.array(right)
    table: Figures = {"n": len(asked), "right_steps": int(good.sum())}
    table |= {"auc_rating": auc(rating, good), "auc_min_logprob": auc(lowest, good)}
    print("verdicts", table, flush=True)
    return table


def _write(folder: Path, figures: Figures) -> None:
    path = folder / "card.json"
    card = {**json.loads(path.read_text()), **figures}
    path.write_text(json.dumps(card, indent=1) + "\n")
    (folder / "card.md").write_text(card_text(card))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="where nano, draft and base are")
    parser.add_argument(
        "--models", nargs="+", default=["base", "draft", "nano"], help="base first: others compare to it"
    )
    parser.add_argument("--seed", type=int, default=1, help="draws other problems, never one that was trained on")
    parser.add_argument("--n", type=int, default=300, help="problems per level and effort")
    parser.add_argument("--probe-n", type=int, default=800, help="problems per level for the probes")
    parser.add_argument("--threads", type=int, default=1)
    evaluate(parser.parse_args())


if __name__ == "__main__":
    main()
