"""The lean forward pass: used only where it gives the network's own numbers, and holding no weight twice."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from local_engine import fused, shared_product, whole
from local_engine.model import LocalModel
from local_engine.products import OneDNNProduct, PlainProduct, Stand
from local_engine.runner import Runner, Segment, new_kv
from tests.local_engine.engine_harness import ARCHITECTURES
from tests.local_engine.runner_harness import BUDGET, FAMILIES, Pair, by_torch, close, text, tiny_model, tiny_network

WIDE = 384
"""Wide enough for products to be repacked."""


@pytest.fixture(params=["ours", "ours, two threads", "torch's"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By our own kernels, where they are for this CPU, by one thread and several, and by torch's."""
    torch.set_num_threads(2 if "two" in request.param else 1)
    monkeypatch.setattr(whole, "_WEIGHTS_EACH", 1)
    monkeypatch.setattr(shared_product, "_WORK_EACH", 1)
    with by_torch() if request.param == "torch's" else nullcontext():
        yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("family", FAMILIES)
def test_repacked_layers_and_the_modules_that_share_their_weights_agree_with_transformers(
    family: str, bundled: LocalModel
) -> None:
    model = tiny_model(family, bundled, WIDE)
    reference = tiny_network(family, WIDE)
    for use_fused in (True, False):  # the second runner drives the modules that the first one's products stand in for
        kv = new_kv(model, BUDGET)
        pair = Pair(Runner(model, kv, fused=use_fused), kv, reference)
        texts = [text(length, seed=length) for length in (40, 33, 12)]
        slots = [pair.read(tokens[:-new]) for tokens, new in zip(texts, (1, 1, 4), strict=True)]
        out = pair.runner.run(
            [
                Segment(slot, len(tokens) - new, tokens[-new:], logits=new)
                for slot, tokens, new in zip(slots, texts, (1, 1, 4), strict=True)
            ]
        )
        expected = [pair.expected(tokens, last=new) for tokens, new in zip(texts, (1, 1, 4), strict=True)]
        assert close(out.logits, torch.cat(expected))


def test_repacked_weights_are_not_held_twice(bundled: LocalModel) -> None:
    model = tiny_model("qwen2", bundled, WIDE)
    body = model.network.model
    Runner(model, new_kv(model, BUDGET))
    weights = [parameter for layer in body.layers for parameter in layer.parameters()]
    assert sum(weight.numel() for weight in weights) == 2 * WIDE * len(body.layers)  # the norms
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert isinstance(getattr(body.layers[0].self_attn, name), Stand)


def test_joined_weights_are_not_held_twice(bundled: LocalModel) -> None:
    model = tiny_model("llama", bundled)
    Runner(model, new_kv(model, BUDGET))
    attention = model.network.model.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_a_layer_that_differs_is_not_fused_and_the_log_says_so(
    bundled: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    networks = []
    for _ in range(2):
        config_class, network_class = ARCHITECTURES["qwen3"]
        config = config_class(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,
            hidden_act="gelu",
        )
        torch.manual_seed(5)
        networks.append(network_class(config).eval())
    model = dataclasses.replace(bundled, network=networks[0])
    kv = new_kv(model, BUDGET)
    pair = Pair(Runner(model, kv), kv, networks[1])
    assert "not used: layer 0 differs" in caplog.text
    slot = pair.read(text(9))
    assert close(pair.next_logits(slot, [*text(9), 1]), pair.expected([*text(9), 1])[0])


def test_a_second_runner_of_a_network_takes_the_same_layers(bundled: LocalModel) -> None:
    model = tiny_model("llama", bundled)
    kv = new_kv(model, BUDGET)
    runner = Runner(model, kv)
    angles = runner.rotary.first(fused.CHECK_TOKENS)
    assert fused.fuse(model.network, kv, angles) is fused.fuse(model.network, new_kv(model, BUDGET), angles)
    assert kv.bytes_used == 0


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_products_are_torch_products(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(96, 64).to(dtype), torch.randn(96).to(dtype)
    x, other = torch.randn(rows, 64).to(dtype), torch.randn(rows, 96).to(dtype)
    kept = other.clone()
    plain, tolerance = PlainProduct(weight, bias), 1e-4 if dtype == torch.float32 else 1e-1
    for product in (OneDNNProduct(weight, bias, repack=True), OneDNNProduct(weight, bias, repack=False)):
        for got, expected in (
            (product(x), plain(x)),
            (product.silu(x), plain.silu(x)),
            (product.times(x, other), plain.times(x, other)),
            (product.plus(x, other), plain.plus(x, other)),
        ):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(other, kept)


@pytest.mark.usefixtures("products")
def test_bfloat16_is_as_near_to_the_exact_logits_as_transformers_is(bundled: LocalModel) -> None:
    model = tiny_model("qwen3", bundled, WIDE)
    exact, rounded = tiny_network("qwen3", WIDE), tiny_network("qwen3", WIDE).to(torch.bfloat16)
    model.network.to(torch.bfloat16)
    kv = new_kv(model, BUDGET)
    runner = Runner(model, kv)
    texts = [text(length, seed=length) for length in (40, 33, 12)]
    slots = [kv.open(64) for _ in texts]
    pairs = list(zip(slots, texts, strict=True))
    runner.run([Segment(slot, 0, tokens[:-1]) for slot, tokens in pairs])
    logits = runner.run([Segment(slot, len(tokens) - 1, tokens[-1:], logits=1) for slot, tokens in pairs]).logits
    with torch.no_grad():
        expected, theirs = (
            torch.cat([network(torch.tensor([tokens])).logits[0, -1:] for tokens in texts]).float()
            for network in (exact, rounded)
        )
    assert float((logits - expected).abs().max()) <= 2 * float((theirs - expected).abs().max())
