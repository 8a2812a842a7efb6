import json
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from local_engine.errors import ModelLoadError
from local_engine.reason.artifact import MANIFEST, TENSORS, read, read_for, weights_sha256, write
from tests.local_engine.reason.test_rules import artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write(artifact(pass_min_logprob=1.5, bias=-0.25), tmp_path)
    return tmp_path


def test_what_is_written_is_read_back(folder: Path) -> None:
    found = read(folder)
    assert found is not None
    assert found.probe == artifact(pass_min_logprob=1.5, bias=-0.25).probe
    assert read(folder / "nowhere") is None


def test_an_artifact_of_other_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="fitted on other weights"):
        read_for(folder)
    stated = json.loads((folder / MANIFEST).read_text())
    stated["weights_sha256"] = weights_sha256(folder)
    (folder / MANIFEST).write_text(json.dumps(stated))
    assert read_for(folder) is not None


def test_a_damaged_artifact_is_refused(folder: Path) -> None:
    good = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ModelLoadError, match="does not match tensors_sha256"):
        read(folder)
    (folder / TENSORS).write_bytes(b"\xff" * 20)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ModelLoadError, match="leadline exits fit"):
        read(folder)


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["weight"] = tensors["weight"][:3]
    save_file(tensors, folder / TENSORS)
    stated = json.loads((folder / MANIFEST).read_text())
    stated["tensors_sha256"] = sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(stated))
    with pytest.raises(ModelLoadError, match="one finite"):
        read(folder)
