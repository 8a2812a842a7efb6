"""Our own kernels beside torch: the same numbers, and the same bits for a row whatever is beside it."""

from array import array

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from local_engine import kernels
from local_engine.fused import fused_rotary
from local_engine.kv import KVShape, Span
from local_engine.kv_rows import RowsKV
from local_engine.norms import HeadNorms, KernelNorm, KernelTurn, _TorchTurn
from local_engine.products import KernelGated, KernelProduct
from local_engine.simd import address
from tests.local_engine.runner_harness import by_torch

CPU = torch.device("cpu")
NARROW = (torch.float32, torch.bfloat16)
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not kernels.made_for(dtype), reason=f"this CPU is not one that our {dtype} kernels are for"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
TYPES = [
    pytest.param(
        kernels.Types(states, weights),
        marks=pytest.mark.skipif(
            not kernels.made_for(states), reason=f"this CPU is not one that our {states} kernels are for"
        ),
    )
    for states, weights in ((torch.float32, torch.float32), NARROW, (torch.bfloat16, torch.bfloat16))
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def near(got: Tensor, expected: Tensor) -> bool:
    """`expected` in float32, by a share of its greatest value."""
    error = float((got.float() - expected).abs().max() / expected.abs().max())
    return error <= TOLERANCE[got.dtype]


def numbers(types: kernels.Types, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Such that holding them as weights loses nothing."""
    return [torch.randn(size).to(types.weights).to(types.states) for size in sizes]


@pytest.mark.parametrize("inputs", [50, 96])
@pytest.mark.parametrize("types", TYPES)
def test_products_are_torchs(types: kernels.Types, inputs: int, habits: kernels.Habits) -> None:
    """Of bfloat16 96 inputs are a CPU's own matrix tiles', where it has them."""
    torch.manual_seed(3)
    dtype, held = types.states, types.weights
    weight, bias, up = numbers(types, (96, inputs), (96,), (96, inputs))
    plain, biased, gated = (
        KernelProduct(weight, None, held),
        KernelProduct(weight, bias, held),
        KernelGated(weight, up, held),
    )
    for rows in (1, 7, 8, 9, 16, 21, 32, 37, 64, 85):
        x, term = torch.randn(rows, inputs).to(dtype), torch.randn(rows, 96).to(dtype)
        exact, exact_up = (linear(x.float(), part.float()) for part in (weight, up))
        assert near(plain(x), exact), rows
        assert near(biased(x), exact + bias.float()), rows
        assert near(plain.plus(x, term), exact + term.float()), rows
        assert near(biased.plus(x, term), exact + bias.float() + term.float()), rows
        assert near(gated(x), silu(exact) * exact_up), rows
        assert near(gated.part(0, x), exact), rows
        assert near(gated.part(1, x), exact_up), rows


@pytest.mark.parametrize("inputs", [50, 96])
@pytest.mark.parametrize("types", TYPES)
def test_a_row_gives_the_same_bits_whatever_is_beside_it(
    types: kernels.Types, inputs: int, habits: kernels.Habits
) -> None:
    torch.manual_seed(5)
    weight, bias = numbers(types, (64, inputs), (64,))
    product, x = KernelProduct(weight, bias, types.weights), torch.randn(85, inputs).to(types.states)
    alone = torch.cat([product(x[at : at + 1]) for at in range(85)])
    for rows in (2, 8, 15, 16, 17, 31, 32, 33, 48, 49, 85):
        assert torch.equal(product(x[:rows]), alone[:rows]), rows
        assert torch.equal(product(x[-rows:]), alone[-rows:]), rows


@pytest.mark.skipif(not kernels.made_for(torch.float32), reason="this CPU is not one for our kernels")
@pytest.mark.parametrize("rows", [1, 8, 15, 16, 37, 300])
def test_float32_held_in_half_its_bytes_gives_the_same_bits(rows: int, habits: kernels.Habits) -> None:
    torch.manual_seed(4)
    (weight,) = numbers(kernels.Types(*NARROW), (128, 300))
    x = torch.randn(rows, 300)
    assert kernels.held_as([weight]) == torch.bfloat16
    wide, narrow = (KernelProduct(weight, None, held) for held in NARROW)
    assert narrow.packed.nbytes == wide.packed.nbytes / 2
    assert torch.equal(narrow(x), wide(x))
    wide_gated, narrow_gated = (KernelGated(weight[:64], weight[64:], held) for held in NARROW)
    assert torch.equal(narrow_gated(x), wide_gated(x))


@pytest.mark.skipif(not kernels.made_for(torch.float32), reason="this CPU is not one for our kernels")
def test_weights_are_held_as_they_are_where_one_of_them_would_lose_a_bit() -> None:
    weights = numbers(kernels.Types(*NARROW), (64, 40), (32, 40))
    weights[0][0, :4] = torch.tensor([torch.inf, torch.nan, -0.0, 1e-40]).bfloat16()
    assert kernels.held_as(weights) == torch.bfloat16
    weights[1][31, 39] = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    assert kernels.held_as(weights) == torch.float32
    assert kernels.held_as([weights[0].bfloat16()]) == torch.bfloat16
    with by_torch():
        assert kernels.held_as(weights[:1]) == torch.float32


@pytest.mark.parametrize("types", TYPES)
def test_what_a_product_fetches_beside_its_weights_changes_nothing(
    types: kernels.Types, habits: kernels.Habits
) -> None:
    torch.manual_seed(2)
    dtype = types.states
    (weight,) = numbers(types, (96, 50))
    product = KernelProduct(weight, None, types.weights)
    x = torch.randn(37, 50).to(dtype)
    told = {
        kernels.Beside.ADDRESS: x.data_ptr(),
        kernels.Beside.RUN: 300,
        kernels.Beside.STRIDE: 1000,
        kernels.Beside.END: 5000,
        kernels.Beside.PACE: 24,
    }
    words = array("q", [told[word] for word in kernels.Beside])
    out = torch.full((37, 96), torch.nan, dtype=dtype)
    weights = product.packed.data_ptr()
    room = torch.empty(kernels.room_bytes(37, 50, types), dtype=torch.uint8)
    kernel = kernels.product(types, "plain")
    kernel(x.data_ptr(), weights, None, out.data_ptr(), 37, 50, 96, 0, 96, weights, address(words), room.data_ptr())
    assert torch.equal(out, product(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_turns_are_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(5, 80).to(dtype), torch.randn(80).to(dtype)
    assert near(KernelNorm(weight, 1e-6)(x), rms_norm(x.float(), (80,), weight.float(), 1e-6))
    shape = KVShape(1, 4, 2, 32, 256, dtype, CPU)
    wide = KVShape(1, 4, 2, 32, 256, torch.float32, CPU)
    heads, angles = torch.randn(5, 8, 32).to(dtype), torch.randn(5, 32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = torch.randn(6, 32).to(dtype)
    for norms, wide_norms in ((None, None), (HeadNorms(weights, 1e-6), HeadNorms(weights.float(), 1e-6))):
        expected = _TorchTurn(wide, wide_norms)(heads[:, :6].float(), fused_rotary(cos.float(), sin.float()))
        ours = heads.clone()
        assert near(KernelTurn(shape, norms)(ours[:, :6], fused_rotary(cos, sin)), expected)
        assert torch.equal(ours[:, 6:], heads[:, 6:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "head_dim"), [(2, 64), (6, 32), (16, 128)])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_torchs(dtype: torch.dtype, query_heads: int, head_dim: int, window: int | None) -> None:
    torch.manual_seed(head_dim)
    shape = KVShape(1, query_heads, 2, head_dim, 512, dtype, CPU)
    kv = RowsKV(shape, 1 << 28)
    spans, expected = [], []
    query, key, value = (torch.randn(9, heads, head_dim).to(dtype) for heads in (query_heads, 2, 2))
    offset = 0
    for held, count in ((0, 1), (16, 1), (300, 1), (40, 3), (17, 3)):
        slot = kv.open(held + count)
        before = torch.randn(1, 2, 2, held, head_dim).to(dtype)
        kv.load(slot, 0, before)
        spans.append(Span(slot, held, count))
        own = slice(offset, offset + count)
        keys, values = (
            torch.cat((old.transpose(0, 1), new[own])).transpose(0, 1).float()
            for old, new in zip(before[0], (key, value), strict=True)
        )
        place, seen = held + torch.arange(count).unsqueeze(1), torch.arange(held + count)
        visible = seen <= place if window is None else (seen <= place) & (seen > place - window)
        queries = query[own].transpose(0, 1).float()
        out = scaled_dot_product_attention(queries, keys, values, visible, scale=0.3, enable_gqa=True)
        expected.append(out.transpose(0, 1))
        offset += count
    plan = kv.plan(spans)
    starts = [0, 1, 2, 3, 6, 9]
    packed = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in plan.order])
    got = plan.attend(0, query[packed], key[packed], value[packed], 0.3, window)
    assert near(got, torch.cat(expected)[packed])
    for span in spans:
        kv.commit(span.slot, span.start + span.tokens)
    assert torch.equal(kv.export(spans[3].slot, 40, 43)[0, 0].transpose(0, 1), key[3:6])


@pytest.mark.parametrize("types", TYPES)
def test_what_a_row_gives_does_not_depend_on_its_batch(types: kernels.Types) -> None:
    torch.manual_seed(3)
    (weight,) = numbers(types, (64, 96))
    product = KernelProduct(weight, None, types.weights)
    x = torch.randn(19, 96).to(types.states)
    together = product(x)
    assert all(torch.equal(product(x[at : at + 1])[0], together[at]) for at in range(19))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_copied_out_of_any_row_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    shape = KVShape(3, 4, 2, 32, 1024, dtype, CPU)
    kv = RowsKV(shape, 1 << 24)
    assert kv._export is not None, "or this shows nothing"
    slots = {kv.open(length): length for length in (40, 300, 70)}
    for slot, length in slots.items():
        kv.load(slot, 0, torch.randn(3, 2, 2, length, 32).to(dtype))
    for slot, length in slots.items():
        room = torch.zeros(2, 3, 2, 2, 16, 32, dtype=dtype)
        kv.export_into(slot, length - 33, room.unbind(0))
        assert torch.equal(torch.cat(room.unbind(0), dim=3), kv.export(slot, length - 33, length - 1))
        askew = torch.zeros(room[0].numel() + 1, dtype=dtype)[1:].view(room[0].shape)
        kv.export_into(slot, 5, [askew])
        assert torch.equal(askew, kv.export(slot, 5, 21))
