"""What the bundled models are trained on: samples, the tokenizer made from them, and packed rows.

A sample is a conversation as the chat template renders it, with the working that the effort asks for. Low effort is
one short line a step. High effort is the same, then "Wait, let me check." and the steps again in smaller parts, once or
twice. In some high-effort samples the first pass holds a slip, most often where there are carries; slips carry no loss,
what follows from them does. A verdict sample branches off before a step: a step, right or wrong, and its rating.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from local_engine.arithmetic import LEVELS, REFUSAL, VERDICT_CUE, Problem, other_prompt, problem_stream
from local_engine.arithmetic_steps import Step, work_out

LEVEL_SHARES = (0.18, 0.19, 0.2, 0.22, 0.13, 0.08)
NONE_LEVEL_SHARES = (0.6, 0.25, 0.1, 0.05, 0.0, 0.0)  # answering at once is learnable for one operation, hardly for two
OTHER_SHARE = 0.1
EFFORT_SHARES = {"none": 0.1, "low": 0.62, "high": 0.28}
SLIP_SHARE = 0.13
UNCHECKED_SHARE = 0.1  # high-effort samples that end at the cue, so that a forced answer there is nothing strange
TWICE_CARRIES = 9  # from so many carries on, two rechecks: about one problem in five, the hard ones
ROW_TOKENS = {"short": 224, "long": 448}  # attention costs the square of it, so short samples have rows of their own
OPEN_ROWS = 8  # a sample goes where it fits best, so that little is padded
VOCABULARY = 512
WINDOW = 1024
STEP_END = "\n\n"
RECHECK, RECHECK_AGAIN = f"Wait, let me check.{STEP_END}", f"Wait, let me check again.{STEP_END}"
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
class Piece:
    text: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """A branch that leaves the trunk before piece `at`: a step and its rating; only the rating carries loss."""

    at: int
    step: str
    rating: Literal["9", "0"]


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: str
    pieces: tuple[Piece, ...]
    verdicts: tuple[Verdict, ...] = field(default=())


def samples(seed: int, verdict_share: float = 0.0) -> Iterator[Sample]:
    """Endless samples; `verdict_share` of those with a working carry a verdict as well."""
    rng = random.Random(seed)
    streams = [problem_stream(rng, level, "train") for level in LEVELS]
    while True:
        history = _said("system", rng.choice(SYSTEM_PROMPTS)) if rng.random() < 0.12 else ""
        if rng.random() < 0.06:
            earlier = next(rng.choices(streams, LEVEL_SHARES)[0])
            history += _said("user", earlier.question) + _said("assistant", final(earlier))
        effort = rng.choices(tuple(EFFORT_SHARES), tuple(EFFORT_SHARES.values()))[0]
        if rng.random() < OTHER_SHARE:
            question, working, end = other_prompt(rng), Sample("", (Piece(f"This is not for me.{STEP_END}"),)), REFUSAL
        else:
            problem = next(rng.choices(streams, NONE_LEVEL_SHARES if effort == "none" else LEVEL_SHARES)[0])
            question, working, end = problem.question, _working(rng, problem, effort, verdict_share), final(problem)
        prompt = history + _said("user", question) + f"{IM_START}assistant\n"
        if effort == "none":
            yield Sample(f"{prompt}{THINK}{STEP_END}{END_THINK}{STEP_END}", (Piece(end + IM_END),))
        else:
            head, tail = Piece(f"{THINK}\n"), Piece(f"{END_THINK}{STEP_END}{end}{IM_END}")
            verdicts = tuple(replace(verdict, at=verdict.at + 1) for verdict in working.verdicts)
            yield Sample(prompt + (HIGH if effort == "high" else ""), (head, *working.pieces, tail), verdicts)


def final(problem: Problem) -> str:
    return f"The answer is {problem.answer}."


def _working(rng: random.Random, problem: Problem, effort: str, verdict_share: float) -> Sample:
    steps = problem.steps
    verdicts: tuple[Verdict, ...] = (_verdict(rng, problem),) if rng.random() < verdict_share else ()
    right = tuple(Piece(step.short + STEP_END) for step in steps)
    if effort == "low" or rng.random() < UNCHECKED_SHARE:
        return Sample("", right, verdicts)
    slipped = _slipped(rng, problem) if rng.random() < SLIP_SHARE else None
    first = right
    if slipped is not None:
        at, wrong = slipped
        first = tuple(Piece(step.short + STEP_END, learn=i != at) for i, step in enumerate(wrong))
        verdicts = tuple(verdict for verdict in verdicts if verdict.at <= at)
    careful = tuple(Piece(step.long + STEP_END) for step in steps)
    pieces = (*first, Piece(RECHECK), *careful)
    if slipped is not None or problem.carries >= TWICE_CARRIES:
        pieces = (*pieces, Piece(RECHECK_AGAIN), *right)
    return Sample("", pieces, verdicts)


def _slipped(rng: random.Random, problem: Problem) -> tuple[int, tuple[Step, ...]] | None:
    """Which step went wrong and what follows from it, each later step right for the numbers it got."""
    at = rng.choices(range(len(problem.steps)), [0.2 + step.carries for step in problem.steps])[0]
    wrong = work_out(problem.operations, {at: _error(rng, problem.steps[at])})
    sound = all(step.value >= 0 for step in wrong) and wrong[-1].value < 100_000
    return (at, wrong) if sound else None


def _error(rng: random.Random, step: Step) -> int:
    """A forgotten or doubled carry, or a digit that is off."""
    place: int = 10 ** rng.randrange(max(1, len(str(abs(step.value)))))
    return rng.choice((-1, 1)) * place * (1 if rng.random() < 0.7 else rng.randint(2, 5))


def _verdict(rng: random.Random, problem: Problem) -> Verdict:
    at = rng.choices(range(len(problem.steps)), [0.5 + step.carries for step in problem.steps])[0]
    step = problem.steps[at]
    if rng.random() < 0.5:
        return Verdict(at, step.short + STEP_END, "9")
    if rng.random() < 0.75:
        wrong = replace(step, value=step.value + _error(rng, step))
    else:  # right for its numbers, which are not the problem's
        other = max(1, step.right + rng.choice((-1, 1)) * rng.choice((1, 2, 10)))
        operator = step.operator if rng.random() < 0.6 else rng.choice(("+", "-"))
        if (operator, other) == (step.operator, step.right):
            other += 1
        value = {"+": step.left + other, "-": step.left - other, "*": step.left * other, "mod": step.left % other}
        wrong = Step(step.left, operator, other, value[operator])
    return Verdict(at, wrong.short + STEP_END, "0")


def _said(role: str, text: str) -> str:
    return f"{IM_START}{role}\n{text}{IM_END}\n"


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text works; each digit is its own token, an operator takes its spaces along."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n+| ?\p{L}+| ?[^\s\p{L}\p{N}]+ ?(?=\d)| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    drawn = (sample for sample, _ in zip(samples(seed, verdict_share=0.1), range(12_000), strict=False))
    texts = (_plain(sample) for sample in drawn)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=IM_END, pad_token=IM_END, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, HIGH]})
    tokenizer.add_tokens([THINK, END_THINK])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = WINDOW
    if len(tokenizer) > VOCABULARY:
        raise SystemExit(f"vocabulary holds {len(tokenizer)} tokens, the models {VOCABULARY}")
    return tokenizer


def _plain(sample: Sample) -> str:
    text = sample.prompt + "".join(piece.text for piece in sample.pieces) + VERDICT_CUE * len(sample.verdicts)
    for marker in (IM_START, IM_END, HIGH, THINK, END_THINK):
        text = text.replace(marker, "\n")
    return text


@dataclass(slots=True)
class Row:
    """Whole samples one after the other. `labels` -100: no loss; `sample` 0: padding; `branch` 0: trunk;
    `fork`: for a branch, the trunk's position where it leaves."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    fork: list[int] = field(default_factory=list)

    def append(self, tokens: list[int], labels: list[int], start: int, sample: int, branch: int) -> None:
        self.tokens += tokens
        self.labels += labels
        self.positions += range(start, start + len(tokens))
        self.sample += [sample] * len(tokens)
        self.branch += [branch] * len(tokens)
        self.fork += [start if branch else 0] * len(tokens)

    def padded(self, length: int) -> dict[str, torch.Tensor]:
        short = length - len(self.tokens)
        columns = {name: getattr(self, name) for name in self.__slots__}
        return {name: torch.tensor(c + [-100 if name == "labels" else 0] * short) for name, c in columns.items()}


class Rows:
    """Draws samples and packs them; one that is longer than a long row is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, verdict_share: float) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._samples = enumerate(samples(seed, verdict_share), start=1)
        self._open = {kind: [Row() for _ in range(OPEN_ROWS)] for kind in ROW_TOKENS}
        self._full: dict[str, deque[dict[str, torch.Tensor]]] = {kind: deque() for kind in ROW_TOKENS}

    def batch(self, kind: str, rows: int) -> dict[str, torch.Tensor]:
        """The next `rows` rows of a kind, stacked: every column [rows, tokens]."""
        while len(self._full[kind]) < rows:
            self._place(*next(self._samples))
        drawn = [self._full[kind].popleft() for _ in range(rows)]
        return {name: torch.stack([row[name] for row in drawn]) for name in drawn[0]}

    def _place(self, number: int, sample: Sample) -> None:
        segments = _segments(self._encode, sample)
        length = sum(len(tokens) for tokens, _, _ in segments)
        kind = next((kind for kind, room in ROW_TOKENS.items() if length <= room), None)
        if kind is None or len(self._full[kind]) > 200:  # the mix of the batches decides how many of a kind are used
            return
        fitting = [row for row in self._open[kind] if len(row.tokens) + length <= ROW_TOKENS[kind]]
        if fitting:
            row = max(fitting, key=lambda row: len(row.tokens))
        else:
            row = max(self._open[kind], key=lambda row: len(row.tokens))
            self._full[kind].append(row.padded(ROW_TOKENS[kind]))
            self._open[kind].remove(row)
            self._open[kind].append(row := Row())
        for branch, (tokens, labels, start) in enumerate(segments):
            row.append(tokens, labels, start, number, branch)


def _segments(encode_text: Any, sample: Sample) -> list[tuple[list[int], list[int], int]]:
    """(tokens, labels, first position) of the trunk and then of each branch."""

    def encode(text: str) -> list[int]:
        ids: list[int] = encode_text(text, add_special_tokens=False).ids
        return ids

    tokens = encode(sample.prompt)
    labels = [-100] * len(tokens)
    starts = []
    for piece in sample.pieces:
        starts.append(len(tokens))
        ids = encode(piece.text)
        tokens += ids
        labels += ids if piece.learn else [-100] * len(ids)
    segments = [(tokens, labels, 0)]
    for verdict in sample.verdicts:
        asked, rating = encode(verdict.step) + encode(VERDICT_CUE), encode(verdict.rating)
        segments.append((asked + rating, [-100] * len(asked) + rating, starts[verdict.at]))
    return segments


def attention_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[rows, 1, tokens, tokens], True where a token (second last) may look: back in its own segment, and a branch at
    its sample's trunk up to its fork."""
    same_sample = batch["sample"][:, :, None] == batch["sample"][:, None, :]
    same_branch = batch["branch"][:, :, None] == batch["branch"][:, None, :]
    tokens = batch["tokens"].shape[1]
    back = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    trunk = (batch["branch"][:, None, :] == 0) & (batch["positions"][:, None, :] < batch["fork"][:, :, None])
    return (same_sample & ((same_branch & back) | trunk))[:, None]
