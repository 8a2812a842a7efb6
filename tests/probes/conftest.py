"""Shared pieces: one loaded encoder, a synthetic table, and where the real data may lie."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.artifact import Artifact
from probes.calibrate import Isotonic, Platt
from probes.extract import Encoder
from probes.heads import Heads
from probes.manifest import HeadInfo, Manifest
from probes.runtime import EncoderProbe

DATA = Path(os.environ.get("LEADLINE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.load()


@pytest.fixture(scope="session")
def default_probe() -> EncoderProbe:
    return EncoderProbe.load()


def table(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path.name} in {DATA}: set LEADLINE_DATA to the folder of routing tables")
    return path


@pytest.fixture
def routellm_mmlu() -> Path:
    return table("routellm_mmlu.parquet")


@pytest.fixture
def routellm_gsm8k() -> Path:
    return table("routellm_gsm8k.parquet")


@pytest.fixture
def artifact() -> Artifact:
    rng = np.random.default_rng(0)
    heads = Heads(
        ("weak", "strong"),
        (rng.normal(size=(2, 4 * 384)) / 50).astype(np.float32),
        np.array([0.1, 0.7], np.float32),
        (Platt(1.1, -0.2), Isotonic(np.array([-1.0, 0.3, 2.0]), np.array([0.1, 0.4, 0.9]))),
    )
    infos = tuple(
        HeadInfo(name=name, label="synthetic", n=9, base_rate=0.5, calibration=kind)
        for name, kind in [("weak", "platt"), ("strong", "isotonic")]
    )
    manifest = Manifest(
        name="toy",
        encoder="toy-encoder",
        encoder_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        layers=(3, 4, 5, 6),
        dims=384,
        max_tokens=64,
        heads=infos,
        data_sha256="0",
        n=9,
        created="2026-01-01",
        versions={},
        metrics={},
    )
    return Artifact(manifest, heads)


@pytest.fixture
def shifted(artifact: Artifact) -> Artifact:
    """The same, but for the bias of its heads."""
    assert isinstance(artifact.heads, Heads)
    return replace(artifact, heads=replace(artifact.heads, bias=artifact.heads.bias + 1))


@pytest.fixture
def sums_and_essays() -> pd.DataFrame:
    """Forty sums, which both models get right, and forty essays, which only the strong one does, mostly."""
    rng = np.random.default_rng(1)
    sums = [f"What is {a} plus {b}?" for a, b in rng.integers(2, 99, (40, 2))]
    essays = [f"Write essay number {i} on the causes of the fall of empire {i * 7}." for i in range(40)]
    return pd.DataFrame(
        {
            "question": sums + essays,
            "cheap": [1] * 38 + [0, 0] + [0] * 37 + [1, 1, 1],
            "dear": [1] * 39 + [0] + [1] * 33 + [0] * 7,
            "kind": ["sum", "algebra"] * 20 + ["essay", "letter"] * 20,
            "bad": [False] * 78 + [True, True],
        }
    )
