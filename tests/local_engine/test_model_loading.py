"""A checkpoint that cannot be served is refused at load: in words that name the model, its folder and what is wrong."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import local_engine
from local_engine.errors import ModelLoadError
from local_engine.model import load_model
from tests.local_engine.small_tokenizers import save_model

DRAFT = Path(local_engine.__file__).parent / "bundled" / "draft"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a bundled checkpoint, to be broken."""
    return shutil.copytree(DRAFT, tmp_path / "checkpoint")


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def configure(folder: Path, **fields: Any) -> None:
    change(folder / "config.json", **fields)


def change_tensors(folder: Path, changed: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    """The words that it is refused in: one line, which names model and folder."""
    with pytest.raises(ModelLoadError) as refused:
        load_model("mine", str(folder), "float32", "cpu")
    words = str(refused.value)
    assert words.startswith(f"model 'mine' cannot be loaded from {folder}: ")
    assert "\n" not in words
    return words.removeprefix(f"model 'mine' cannot be loaded from {folder}: ")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(NORM))
    assert f"its weights lack 1 tensor that its config.json asks for: {NORM};" in refusal(folder)


def test_of_many_missing_tensors_the_first_are_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name])
    words = refusal(folder)
    assert "lack 13 tensors" in words
    assert "model.layers.0.input_layernorm.weight" in words
    assert "and 10 more" in words


def test_a_head_that_is_not_the_embedding_must_be_there(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(folder)


def test_an_embedding_that_is_saved_as_the_head_that_it_is_tied_to_is_no_missing_one(folder: Path) -> None:
    before = load_model("m", str(folder), "float32", "cpu").network.model.embed_tokens.weight
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert load_model("m", str(folder), "float32", "cpu").network.model.embed_tokens.weight.equal(before)


def test_tensors_that_nothing_asks_for_are_told_of_in_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    change_tensors(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.zeros(16)}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load_model("mine", str(folder), "float32", "cpu")
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "11 tensors of its weights" in told.getMessage()
    assert "model.layers.2.input_layernorm.weight" in told.getMessage()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    def break_one(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][70, 300] = value

    change_tensors(folder, break_one)
    assert "model.layers.2.mlp.down_proj.weight" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_weights_are_finite_though_their_sum_is_not(folder: Path, dtype: torch.dtype) -> None:
    large = torch.full((128,), torch.finfo(dtype).max, dtype=dtype)
    change_tensors(folder, lambda tensors: tensors.update({NORM: large}))
    network = load_model("m", str(folder), "bfloat16" if dtype == torch.bfloat16 else "float32", "cpu").network
    assert network.get_parameter(NORM).equal(large.to(network.dtype))


def test_angles_that_are_not_finite_are_named(folder: Path) -> None:
    configure(folder, rope_parameters={"rope_type": "default", "rope_theta": 0.0})
    assert "model.rotary_emb.inv_freq" in refusal(folder)


@pytest.mark.parametrize("eos_token_id", [507, 0])
def test_missing_tokenizer_files_are_asked_for(folder: Path, eos_token_id: int) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    configure(folder, eos_token_id=eos_token_id)
    assert "tokenizer.json" in refusal(folder)


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(tmp_path: Path) -> None:
    assert "its tokenizer has 390 tokens, and its network 300" in refusal(save_model(tmp_path / "m", vocabulary=300))


@pytest.mark.parametrize("stated", [9999, -1, "<|im_end|>", [507, 512]])
def test_an_end_token_that_does_not_exist_is_named(folder: Path, stated: int | str | list[int]) -> None:
    change(folder / "generation_config.json", eos_token_id=stated)
    wrong = stated[-1] if isinstance(stated, list) else stated
    assert f"its end token {wrong!r}" in refusal(folder)


def test_a_checkpoint_that_names_no_end_token_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    configure(folder, eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token=None)
    assert "eos_token_id" in refusal(folder)


def test_quantized_weights_are_refused_for_what_they_are(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    words = refusal(folder)
    assert "quantized (gptq)" in words
    assert "use the checkpoint that they were made from" in words


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vocab_size": 100}, "pad_token_id 507.*vocab_size 100"),
        ({"pad_token_id": 9999}, "pad_token_id 9999.*vocab_size 512"),
        ({"vocab_size": 509}, r"model\.embed_tokens\.weight.*\[512, 128\].*\[509, 128\]"),
        ({"hidden_size": 96}, r"model\.embed_tokens\.weight.*\[512, 128\].*\[512, 96\].*and 26 more"),
        ({"num_key_value_heads": 4}, r"model\.layers\.0\.self_attn\.k_proj\.weight.*\[64, 128\].*\[128, 128\]"),
        ({"hidden_size": "many"}, "hidden_size.*expected int"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_parameters.rope_type.*'spiral'"),
        ({"hidden_act": "step"}, "hidden_act.*'step'"),
    ],
)
def test_what_is_wrong_in_the_configuration_is_named(folder: Path, fields: dict[str, Any], reason: str) -> None:
    configure(folder, **fields)
    assert re.search(reason, refusal(folder))


def test_a_tokenizer_file_without_the_parts_of_one_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer: KeyError: 'added_tokens'; download its files again" in refusal(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for x in %}", "Expected an expression"),
        ("{{ messages | shouted }}", "No filter named 'shouted'"),
        ("{{ persona.name }}", "'persona' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ '' }}", "no tokens"),
    ],
)
def test_a_chat_template_that_writes_no_prompt_is_refused(folder: Path, template: str, reason: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    words = refusal(folder)
    assert "chat template" in words
    assert reason in words


def test_a_mistake_of_our_own_is_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "exits.json").mkdir()  # read by our own code, which looks for a file
    assert "the log says more" in refusal(folder)
    (told,) = [record for record in caplog.records if record.name == "local_engine.model"]
    assert told.exc_info is not None
    assert isinstance(told.exc_info[1], IsADirectoryError)
