import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import local_engine
from local_engine import kernels, shared_product, step
from local_engine.config import Device, Dtype
from local_engine.engine import Engine
from local_engine.model import LocalModel, load_model
from tests.local_engine.engine_harness import ARCHITECTURES, StartEngine, Watch
from tests.local_engine.fake_prober import FakeProber

BUNDLED = Path(local_engine.__file__).parent / "bundled" / "base"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where models run: see `devices.py`."""
    return torch.device(getattr(request, "param", "cpu"))


@pytest.fixture(scope="module")
def weights_dtype(request: pytest.FixtureRequest) -> Dtype:
    chosen: Dtype = getattr(request, "param", "float32")
    return chosen


@cache
def _bundled(device: Device, dtype: Dtype) -> LocalModel:
    return load_model("m", "bundled/base", dtype, device)


@pytest.fixture(scope="module")
def bundled(device: torch.device, weights_dtype: Dtype) -> LocalModel:
    """The same for all tests of one device and type."""
    return _bundled("cuda" if device.type == "cuda" else "cpu", weights_dtype)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a randomly initialised checkpoint of the family, and the bundled tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"tiny-{family}"
        if not folder.exists():
            config_class, model_class = ARCHITECTURES[family]
            torch.manual_seed(5)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            extra = {"sliding_window": 24} if family == "mistral" else {}
            config = config_class(
                vocab_size=512,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.4,
                bos_token_id=None,
                eos_token_id=None,
                **sizes,
                **extra,
            )
            model_class(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=[kernels.ZEN, kernels.XEON], ids=["zen", "xeon"])
def habits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[kernels.Habits]:
    """Those of one kind of CPU: what is compiled meanwhile is as it would be there."""
    made = kernels.product, shared_product._work, step._work, step.whole
    monkeypatch.setattr(kernels, "HABITS", request.param)
    for one in made:
        one.cache_clear()
    yield request.param
    for one in made:
        one.cache_clear()


@pytest.fixture
def endless(bundled: LocalModel) -> LocalModel:
    """The bundled model, never ending its turn."""
    return dataclasses.replace(bundled, end_tokens=frozenset())


@pytest.fixture
def gate() -> Watch:
    """Holds every forward pass of the engine that is started with it."""
    return Watch(gated=True)


@pytest.fixture
def prober() -> FakeProber:
    return FakeProber()


@pytest.fixture
def start_engines() -> Iterator[Callable[..., Engine]]:
    """Start engines, given their models by name, that stop with the test; each must be healthy and empty then."""
    engines: list[Engine] = []

    def start(models: dict[str, LocalModel], prober: FakeProber | None = None, **options: Any) -> Engine:
        # A step computes as much as it may, whatever the steps before it took on a busy machine.
        engine = Engine(models, prober, **{"step_s": 3600.0, **options})
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        assert engine.alive, "the engine's thread died"
        engine.stop()
        assert not engine.alive
        assert (engine.stats().kv_bytes, engine.stats().running) == (0, 0), "something was left behind"


@pytest.fixture
def start_engine(start_engines: Callable[..., Engine]) -> StartEngine:
    """Start an engine with one model, called m."""
    return lambda model, prober=None, **options: start_engines({"m": model}, prober, **options)
