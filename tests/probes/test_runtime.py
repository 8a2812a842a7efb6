"""The shipped probe, as the engine runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from probes.artifact import Artifact, read
from probes.errors import ArtifactError
from probes.extract import Encoder
from probes.manifest import ARTIFACTS, default_artifact_path, read_manifest
from probes.runtime import EncoderProbe
from probes.train import DEFAULT_LAYERS, Recipe

EASY = "What is the capital of France?\nA. Berlin\nB. Paris\nC. Rome\nD. Madrid\nAnswer:"
HARD = (
    "Let F be a free group on two generators. How many subgroups of index 3 does it have?\n"
    "A. 4\nB. 7\nC. 13\nD. 22\nAnswer:"
)


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_shipped_artifact_is_small() -> None:
    assert sum(file.stat().st_size for file in default_artifact_path().iterdir()) < 2_000_000


@pytest.mark.parametrize("name", ["default", "gsm8k", "llmrouter", "zeroeval"])
def test_a_shipped_probe_leaves_the_upper_layers_out(name: str) -> None:
    assert read_manifest(ARTIFACTS / name).layers == DEFAULT_LAYERS == (0, 1, 2)


def test_a_recipe_leaves_out_layers_of_the_encoder_that_it_was_measured_on_alone(
    encoder: Encoder, tmp_path: Path
) -> None:
    assert Recipe().layers_of(encoder) == DEFAULT_LAYERS
    config = BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    other = Encoder.load(str(tmp_path))
    assert Recipe().layers_of(other) == tuple(range(7))
    assert Recipe((2, 5)).layers_of(encoder) == Recipe((2, 5)).layers_of(other) == (2, 5)


def test_probabilities_fall_with_difficulty(default_probe: EncoderProbe) -> None:
    easy, hard = default_probe.probe([_ask(EASY), _ask(HARD)])
    assert list(easy) == list(default_probe.heads)
    assert all(0 <= p <= 1 for p in (*easy.values(), *hard.values()))
    assert easy["weak"] > hard["weak"] + 0.2
    assert easy["strong"] > hard["strong"]
    if "local" in default_probe.heads:
        (sum_,) = default_probe.probe([_ask("What is 12 + 7?")])
        assert sum_["local"] > 0.8 > 0.2 > hard["local"]


def test_a_batch_answers_as_its_members_do(default_probe: EncoderProbe) -> None:
    asked = [_ask(EASY), _ask(HARD), _ask(""), [*_ask(EASY), {"role": "assistant", "content": "B"}, *_ask("Why?")]]
    together = default_probe.probe(asked)
    for conversation, answer in zip(asked, together, strict=True):
        assert default_probe.probe([conversation])[0] == pytest.approx(answer, abs=2e-3)
    assert default_probe.probe([]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "\x00\x07" * 300,
        "\ud800 alone",
        "Wie hoch ist der Turm? 塔有多高？ كم ارتفاع البرج؟",
        "x" * 2_000_000,
    ],
    ids=["empty", "blank", "binary", "surrogate", "languages", "huge"],
)
def test_odd_prompts_get_a_sober_answer(default_probe: EncoderProbe, text: str) -> None:
    (odd,) = default_probe.probe([_ask(text)])
    assert set(odd) == set(default_probe.heads)
    # What resembles nothing it has seen gets about the base rate, nothing surer.
    for head in ("weak", "strong"):
        assert 0.3 < odd[head] < 0.97


def test_embeddings_travel_as_bytes(default_probe: EncoderProbe) -> None:
    data, dims, tokens = default_probe.embed(["one", "two"])
    assert np.frombuffer(data, "<f4").reshape(2, dims).shape == (2, 384)
    assert tokens == 6
    assert default_probe.embed([]) == (b"", 384, 0)


def test_the_version_names_the_artifact(default_probe: EncoderProbe) -> None:
    name, _, digest = default_probe.version.partition("@")
    assert name == "default"
    assert len(digest) == 8


def test_a_probe_refuses_another_encoder(artifact: Artifact, encoder: Encoder) -> None:
    foreign = Artifact(artifact.manifest.model_copy(update={"encoder_sha256": "0" * 64}), artifact.heads)
    with pytest.raises(ArtifactError, match="was fitted on encoder"):
        EncoderProbe(foreign, encoder)


def test_inference_needs_neither_scikit_learn_nor_pandas() -> None:
    code = """
import sys, time, json
for name in ("sklearn", "pandas", "pyarrow", "scipy", "sentence_transformers"):
    sys.modules[name] = None
import torch, transformers
from transformers import AutoModel, AutoTokenizer
from transformers.models.bert import modeling_bert
start = time.process_time()
from probes.runtime import EncoderProbe
probe = EncoderProbe.load()
loaded = time.process_time() - start
print(json.dumps([loaded, probe.probe([[{"role": "user", "content": "What is 2 plus 2?"}]])]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded_s, answers = json.loads(done.stdout)
    assert loaded_s < 10  # of the CPU's time: 0.5 s on an idle machine
    assert set(answers[0]) >= {"weak", "strong"}


@pytest.mark.parametrize(
    ("name", "model"), [("zeroeval", "gpt-4o-2024-08-06"), ("gsm8k", "weak"), ("llmrouter", "gemma-2-9b-it")]
)
def test_the_other_shipped_artifacts_are_read(encoder: Encoder, name: str, model: str) -> None:
    probe = EncoderProbe(read(ARTIFACTS / name), encoder)
    easy, hard = probe.probe([_ask("Tom has 3 apples and buys 2 more. How many apples has he?"), _ask(HARD)])
    assert 1 >= easy[model] > hard[model] >= 0
