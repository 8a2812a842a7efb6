"""What the bundled models learn from: samples, rows, and a loss that sees each sample as if it were alone."""

import random
from itertools import islice

import pytest
import torch
import train_bundled
from bundled_data import (
    END_THINK,
    HIGH,
    RECHECK,
    RECHECK_AGAIN,
    ROW_TOKENS,
    STEP_END,
    Rows,
    Sample,
    attention_mask,
    samples,
)
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from local_engine.arithmetic import VERDICT_CUE, split_of

TINY = train_bundled.Size(width=32, layers=2, heads=2, kv_heads=1, inner=64, steps=0, rate=0, exits=(1,))


@pytest.fixture(scope="module")
def drawn() -> list[Sample]:
    return list(islice(samples(seed=3, verdict_share=0.5), 3000))


def question(sample: Sample) -> str:
    """The last user turn."""
    return sample.prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def test_a_seed_decides_the_samples(drawn: list[Sample]) -> None:
    assert list(islice(samples(seed=3, verdict_share=0.5), 50)) == drawn[:50]
    assert list(islice(samples(seed=4, verdict_share=0.5), 50)) != drawn[:50]


def test_no_held_out_question_is_learnt(drawn: list[Sample]) -> None:
    sums = [sample for sample in drawn if "The answer is" in sample.pieces[-1].text]
    assert len(sums) > 2000
    assert {split_of(question(sample)) for sample in sums} == {"train"}


def test_high_effort_checks_and_sometimes_slips(drawn: list[Sample]) -> None:
    high = [sample for sample in drawn if HIGH in sample.prompt and "The answer is" in sample.pieces[-1].text]
    texts = ["".join(piece.text for piece in sample.pieces) for sample in high]
    checked, twice = ([cue in text for text in texts] for cue in (RECHECK, RECHECK_AGAIN))
    slips = [sample for sample in high if not all(piece.learn for piece in sample.pieces)]
    assert 0.8 < sum(checked) / len(high) < 0.97
    assert 0.15 < sum(twice) / len(high) < 0.35
    assert 0.08 < len(slips) / len(high) < 0.18
    for sample in slips:
        (slip,) = [piece.text for piece in sample.pieces if not piece.learn]
        parts = slip.strip().split(" = ")
        assert eval(parts[0].replace("mod", "%")) != int(parts[-1])
        assert any(piece.text == RECHECK_AGAIN for piece in sample.pieces)


def test_every_step_ends_with_a_blank_line(drawn: list[Sample]) -> None:
    for sample in drawn:
        for piece in sample.pieces[1:-1]:
            assert piece.text.endswith(STEP_END)
            assert STEP_END not in piece.text.removesuffix(STEP_END)


def test_a_verdict_is_nine_exactly_for_a_right_step(drawn: list[Sample]) -> None:
    ratings = {"9": 0, "0": 0}
    for sample in drawn:
        for verdict in sample.verdicts:
            said = sample.pieces[verdict.at]
            assert not said.learn or (verdict.step == said.text) == (verdict.rating == "9")
            ratings[verdict.rating] += 1
    assert min(ratings.values()) > 300


def test_rows_hold_whole_samples_and_little_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Rows(tokenizer, seed=1, verdict_share=0.5)
    for kind, length in ROW_TOKENS.items():
        batch = rows.batch(kind, 8)
        assert {column.shape for column in batch.values()} == {(8, length)}
        assert (batch["sample"] == 0).float().mean() < 0.3
        assert (batch["labels"][batch["sample"] == 0] == -100).all()
        first_of_sample = batch["positions"] == 0
        starts = {tokenizer.decode([token]) for token in batch["tokens"][first_of_sample & (batch["sample"] > 0)]}
        assert starts == {"<|im_start|>"}


def test_a_packed_sample_has_the_loss_it_has_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every sample of a row, cut out with its branch's tokens put where a reader would have them."""
    torch.manual_seed(2)
    model = train_bundled.make_model(tokenizer, TINY)
    batch = Rows(tokenizer, seed=5, verdict_share=1.0).batch("short", 2)
    with torch.no_grad():
        packed = train_bundled.losses(model, batch, TINY.exits)
        alone = torch.zeros_like(packed)
        for row in range(2):
            columns = {name: column[row] for name, column in batch.items()}
            for number in set(columns["sample"].tolist()) - {0}:
                for branch in (0, 1):
                    alone += _loss_alone(model, columns, number, branch)
    assert packed.shape == (2,)
    torch.testing.assert_close(packed, alone, rtol=0.02, atol=0.05)
    assert (batch["branch"] > 0).any()


def _loss_alone(model: Qwen3ForCausalLM, row: dict[str, torch.Tensor], number: int, branch: int) -> torch.Tensor:
    """A trunk, or a branch after the part of its trunk that it follows: a plain causal sequence."""
    trunk = (row["sample"] == number) & (row["branch"] == 0)
    own = (row["sample"] == number) & (row["branch"] == branch)
    if not own.any():
        return torch.zeros(2)
    before = trunk & (row["positions"] < row["fork"][own][0]) if branch else torch.zeros_like(trunk)
    tokens = torch.cat([row["tokens"][before], row["tokens"][own]])
    labels = torch.cat([torch.full((int(before.sum()),), -100), row["labels"][own]])
    zeros = torch.zeros_like(tokens)
    plain = {"tokens": tokens, "labels": labels, "positions": torch.arange(len(tokens)), "sample": zeros + 1}
    plain |= {"branch": zeros, "fork": zeros}
    return train_bundled.losses(model, {name: column[None] for name, column in plain.items()}, TINY.exits)


def test_the_mask_lets_nobody_look_ahead_or_elsewhere() -> None:
    """Two samples, the first with a branch that leaves its trunk after two tokens, and padding."""
    columns = {
        "sample": [1, 1, 1, 1, 1, 2, 2, 0],
        "branch": [0, 0, 0, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 2, 3, 0, 1, 0],
        "fork": [0, 0, 0, 2, 2, 0, 0, 0],
        "tokens": [0] * 8,
    }
    mask = attention_mask({name: torch.tensor([column]) for name, column in columns.items()})[0, 0]
    seen = [row.nonzero()[:, 0].tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6], [7]]


def test_digits_steps_and_cues_are_whole_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer.encode(text)]

    assert pieces(f"12 + 345 = 357{STEP_END}") == ["1", "2", " + ", "3", "4", "5", " = ", "3", "5", "7", "\n\n"]
    assert pieces(RECHECK)[0] == "Wait"
    assert pieces(f"{END_THINK}{VERDICT_CUE}")[0] == END_THINK
    for text in ("Ünïcödé 🎉 42", f"{VERDICT_CUE}9", "a\n\n\nb  c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rng = random.Random(1)
    number = str(rng.randint(10**9, 10**10))
    assert pieces(number) == list(number)
