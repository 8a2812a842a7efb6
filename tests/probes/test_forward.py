"""An encoder run on packed tokens says what transformers says, whatever stands beside a text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, BertModel, DistilBertConfig, DistilBertModel

from probes.extract import Encoder, locate
from probes.forward import SPARE_TOKENS, PackedBert, Padded, alike, forward_of

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TEXTS = [[2, 5, 9, 3], [2, 3], [2, *range(4, 60), 3], [2, 7, 7, 3]]


@pytest.fixture
def bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=64, **SIZES)).eval()


def test_packed_tokens_give_what_transformers_gives(bert: Any) -> None:
    wanted = Padded(bert)(TEXTS, 3)
    assert wanted.shape == (4, 4, 48)
    torch.testing.assert_close(PackedBert(bert)(TEXTS, 3), wanted, atol=1e-5, rtol=1e-4)


def test_a_lower_depth_leaves_the_upper_layers_out(bert: Any) -> None:
    forward = PackedBert(bert)
    torch.testing.assert_close(forward(TEXTS, 1), forward(TEXTS, 3)[:, :2])


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "relu"}, {"is_decoder": True}, {"position_embedding_type": "relative_key"}], ids=str
)
def test_a_bert_that_computes_something_else_is_not_packed(changed: dict[str, Any]) -> None:
    assert PackedBert.runs(BertConfig(**SIZES))
    assert not PackedBert.runs(BertConfig(**SIZES, **changed))


def test_another_architecture_runs_as_it_is() -> None:
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(vocab_size=64, dim=48, n_layers=2, n_heads=4, hidden_dim=96)).eval()
    forward = forward_of(model)
    assert isinstance(forward, Padded)
    with torch.inference_mode():
        hidden = model(torch.tensor([TEXTS[2]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(forward(TEXTS, 2)[2], torch.cat(hidden).mean(1), atol=1e-5, rtol=1e-4)


def test_the_default_encoder_stays_close_to_its_float32(encoder: Encoder) -> None:
    """The shipped probes were fitted on float32."""
    texts = [
        "What is 7 times 8?",
        "Prove that there are infinitely many primes.",
        "ok",
        "x = [i ** 2 for i in range(9)]",
    ]
    whole = Padded(AutoModel.from_pretrained(locate("default")[0], local_files_only=True, dtype=torch.float32).eval())
    wanted = whole([encoder._tokenizer(text)["input_ids"] for text in texts], 6)
    same = torch.nn.functional.cosine_similarity(torch.from_numpy(encoder.features(texts)), wanted, dim=-1)
    assert same.min() > 0.9995


@given(st.lists(st.integers(0, 256), max_size=70), st.integers(1, 32))
def test_padded_batches_hold_each_row_once_with_little_padding(lengths: list[int], most: int) -> None:
    batches = alike(lengths, most)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        tokens = [lengths[row] for row in batch]
        assert 1 <= len(batch) <= most
        assert max(tokens) * len(batch) <= 1.25 * sum(tokens) + SPARE_TOKENS
