"""Text comes out of tokens whole, as the tokenizer itself would write it, and each token has its own bytes."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from local_engine.detok import Detokenizer
from local_engine.errors import ModelLoadError
from local_engine.pieces import Pieces
from tests.local_engine.small_tokenizers import byte_level, sentencepiece, word_pieces

TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
PIECES = {name: Pieces(tokenizer) for name, tokenizer in TOKENIZERS.items()}
SPECIAL = {token for tokenizer in TOKENIZERS.values() for token in tokenizer.get_added_vocab()}
"""No text is written with them: a sentencepiece tokenizer begins anew, with a space, after each."""


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=40).filter(
        lambda text: not any(token in text for token in SPECIAL)
    )
)
@example(text="é🎉日本語\u200d👩‍👩‍👧")
@example(text="  two  spaces \n\n ,. ")
def test_text_comes_out_whole_and_unchanged(kind: str, text: str) -> None:
    tokens = encode(TOKENIZERS[kind], text)
    detokenizer = Detokenizer(PIECES[kind])
    parts = [detokenizer.push(token) for token in tokens]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text
    assert b"".join(PIECES[kind][token] for token in tokens) in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_unfinished_character_is_never_shown(kind: str) -> None:
    tokens = encode(TOKENIZERS[kind], "ok 🦊")
    detokenizer = Detokenizer(PIECES[kind])
    assert len(tokens) > 4
    assert "".join(detokenizer.push(token) for token in tokens[:-1]) == "ok "
    assert PIECES[kind][tokens[-1]] == "🦊".encode()[-1:], "a part of a character has its own byte"


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, len(TOKENIZERS["byte level"]) - 3), max_size=30))
def test_any_tokens_read_as_the_tokenizer_reads_them(tokens: list[int]) -> None:
    """Also those that no text has: what is no character is U+FFFD, and waits for nothing."""
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = Detokenizer(PIECES["byte level"])
    end = encode(tokenizer, "x")
    shown = "".join(detokenizer.push(token) for token in tokens + end)
    assert shown == tokenizer.decode(tokens + end, clean_up_tokenization_spaces=False)


def test_bytes_that_are_no_text_hold_nothing_up() -> None:
    pieces = PIECES["byte level"]
    (bad,) = [token for token in range(len(TOKENIZERS["byte level"])) if pieces[token] == b"\xff"]
    detokenizer = Detokenizer(pieces)
    assert [detokenizer.push(bad) for _ in range(3)] == ["\ufffd"] * 3


def test_tokens_beyond_the_tokenizers_have_no_text() -> None:
    for kind, tokenizer in TOKENIZERS.items():
        assert PIECES[kind][len(tokenizer) + 5] == b""
        assert PIECES[kind][tokenizer.eos_token_id] == b"<|im_end|>"


def test_a_tokenizer_that_is_not_byte_exact_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="WordPiece"):
        Pieces(word_pieces())
