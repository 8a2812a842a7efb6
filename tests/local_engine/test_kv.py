"""Every KV cache: what was stored comes back, the budget holds, and nothing leaks."""

import gc
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from local_engine import kv_paged
from local_engine.kv import KVCache, KVFull, KVShape, Span
from local_engine.kv_paged import PAGE, PagedKV, kernel_attends
from local_engine.kv_rows import RowsKV
from tests.local_engine.devices import NEEDS_CUDA
from tests.local_engine.runner_harness import by_torch

SHAPE = KVShape(
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=64,
    context=1024,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
MakeKV = Callable[[KVShape, int], KVCache]


def rows_for_torch(shape: KVShape, limit: int) -> KVCache:
    """Rows as they are held where our own kernels, for which they are cut, are not for the CPU."""
    with by_torch():
        return RowsKV(shape, limit)


def pages_on_cuda(shape: KVShape, limit: int) -> KVCache:
    return PagedKV(replace(shape, device=torch.device("cuda")), limit)


@pytest.fixture(
    params=[RowsKV, rows_for_torch, PagedKV, pytest.param(pages_on_cuda, marks=NEEDS_CUDA)],
    ids=["rows", "rows-for-torch", "paged", "paged-cuda"],
)
def make_kv(request: pytest.FixtureRequest) -> MakeKV:
    make: MakeKV = request.param
    return make


def content(tokens: list[int], shape: KVShape = SHAPE) -> Tensor:
    """Keys and values that tell which token they are of."""
    values = torch.tensor(tokens, dtype=torch.float32).view(1, 1, 1, -1, 1)
    return values.expand(shape.layers, 2, shape.kv_heads, -1, shape.head_dim)


def held(kv: KVCache, slot: int) -> list[int]:
    exported = kv.export(slot, 0, kv.length(slot))
    tokens: list[int] = exported[0, 0, 0, :, 0].int().tolist()
    assert torch.equal(exported, content(tokens, kv.shape))
    return tokens


def test_blocks_are_exported_into_what_is_given(make_kv: MakeKV) -> None:
    kv = make_kv(SHAPE, 1_000 * SHAPE.token_bytes)
    for tokens in (list(range(100, 140)), list(range(40))):
        slot = kv.open(40)
        kv.load(slot, 0, content(tokens))
    parts = [torch.full_like(kv.export(slot, 0, 8), -1.0) for _ in range(3)]
    kv.export_into(slot, 8, parts)
    assert torch.equal(torch.cat(parts, dim=3), kv.export(slot, 8, 32))
    with pytest.raises(ValueError, match="holds 40"):
        kv.export_into(slot, 24, parts)
    with pytest.raises(ValueError, match="are needed, and one is of"):
        kv.export_into(slot, 8, [parts[0], parts[1].double()])
    assert torch.equal(torch.cat(parts, dim=3), kv.export(slot, 8, 32))


@pytest.mark.parametrize("seed", range(4))
def test_2500_random_operations_keep_content_and_budget_and_leak_nothing(make_kv: MakeKV, seed: int) -> None:
    draw = random.Random(seed)
    limit = 6_000 * SHAPE.token_bytes
    kv = make_kv(SHAPE, limit)
    expected: dict[int, list[int]] = {}
    full = 0
    for step in range(2_500):
        slot = draw.choice([*expected, None]) if len(expected) < 40 else draw.choice([*expected])
        action = draw.choice(["reserve", "append", "append", "truncate", "fork", "close"])
        before = kv.bytes_used
        try:
            if slot is None:
                expected[kv.open(draw.choice([0, 1, 100, 300, 900]), draw.choice([0, 400, 1024]))] = []
                continue
            tokens = expected[slot]
            if action == "reserve":
                kv.reserve(slot, draw.randrange(1025))
            elif action == "append":
                new = [step] * draw.randrange(1, min(120, 1026 - len(tokens))) if len(tokens) < 1024 else []
                kv.load(slot, len(tokens), content(new))
                tokens.extend(new)
            elif action == "truncate":
                length = draw.randrange(len(tokens) + 1)
                kv.truncate(slot, length)
                del tokens[length:]
            elif action == "fork":
                length = draw.randrange(len(tokens) + 1)
                expected[kv.fork(slot, length, draw.choice([0, 400, 1024]))] = tokens[:length]
            else:
                kv.close(slot)
                del expected[slot]
        except KVFull:
            full += 1
            assert kv.bytes_used == before
        assert kv.bytes_used <= kv.bytes_allocated <= limit
        if step % 100 == 0:
            assert {slot: held(kv, slot) for slot in expected} == expected
    assert full  # the budget was felt
    for slot in expected:
        kv.close(slot)
    assert kv.bytes_used == 0


def test_all_that_the_budget_has_room_for_can_be_opened_whatever_was_open_before(make_kv: MakeKV) -> None:
    kv = make_kv(SHAPE, 2_048 * SHAPE.token_bytes)
    for capacity, fit in ((256, 8), (1024, 2), (512, 4)):
        slots = [kv.open(capacity) for _ in range(fit)]
        assert kv.bytes_used == kv.bytes_limit
        with pytest.raises(KVFull, match="0 of the"):
            kv.open(1)
        for slot in slots:
            kv.close(slot)


def test_one_sequence_may_grow_to_the_whole_budget(make_kv: MakeKV) -> None:
    kv = make_kv(SHAPE, 1_024 * SHAPE.token_bytes)
    slot = kv.open(1)
    tokens = list(range(1024))
    for start in range(0, 1024, 64):
        kv.load(slot, start, content(tokens[start : start + 64]))
    assert held(kv, slot) == tokens


def test_a_row_that_will_grow_is_not_moved_and_gives_back_what_others_need() -> None:
    kv = RowsKV(SHAPE, 2_048 * SHAPE.token_bytes)
    if not kv.in_chunks:
        pytest.skip("rows are cut for our own kernels, which this CPU cannot run")
    grows = kv.open(10, 1024)
    kv.load(grows, 0, content(list(range(200))))
    place = kv._rows[grows]
    assert (place.pool.capacity, kv.bytes_used) == (1024, 256 * SHAPE.token_bytes)
    kv.reserve(grows, 512)
    assert kv._rows[grows] is place
    late = kv.open(10, 1024)  # there is no plenty any more
    assert kv._rows[late].pool.capacity == 256
    others = [kv.open(256) for _ in range(3)]
    assert kv._rows[grows] is place
    with pytest.raises(KVFull, match="768 tokens more need"):
        kv.reserve(late, 1024)
    assert kv._rows[grows] is place
    others.append(kv.open(512))
    assert kv.bytes_used == kv.bytes_allocated == kv.bytes_limit
    assert held(kv, grows) == list(range(200))
    with pytest.raises(KVFull, match="512 tokens more need"):
        kv.load(grows, 200, content(list(range(200, 600))))
    assert held(kv, grows) == list(range(200))
    for slot in others:
        kv.close(slot)
    kv.load(grows, 200, content(list(range(200, 600))))
    assert held(kv, grows) == list(range(600))


@pytest.mark.parametrize("tokens", [100, 256, 300, 500, 600, 1_000, 1_024, 5_000])
@pytest.mark.parametrize("context", [100, 700, 1_024])
def test_the_most_tokens_of_one_slot_are_what_it_can_have(make_kv: MakeKV, tokens: int, context: int) -> None:
    shape = replace(SHAPE, context=context)
    kv = make_kv(shape, tokens * shape.token_bytes)
    most = kv.most_tokens
    assert most <= min(tokens, context)
    if most:
        kv.close(kv.open(most))
    with pytest.raises((KVFull, ValueError)):
        kv.open(most + 1)


def open_rows(kv: RowsKV, slot: int) -> None:
    for _ in range(100):
        kv.open(256)


def lengthen(kv: RowsKV, slot: int) -> None:
    kv.reserve(slot, 1024)


@pytest.mark.parametrize("grow", [open_rows, lengthen])
def test_where_the_system_has_no_memory_nothing_changes(grow: Callable[[RowsKV, int], None]) -> None:
    kv = RowsKV(replace(SHAPE, layers=8, query_heads=8, kv_heads=8, head_dim=128), 1 << 40)  # 2 MiB a row and layer
    slots = [kv.open(256) for _ in range(3)]
    tokens = [list(range(at, at + 200)) for at in (0, 1000, 2000)]
    for slot, these in zip(slots, tokens, strict=True):
        kv.load(slot, 0, content(these, kv.shape))
    before = kv.bytes_allocated
    gc.collect()  # what it would free later makes room
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20), limits[1]))  # for some layers
        with pytest.raises(torch.OutOfMemoryError):
            grow(kv, slots[0])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert kv.bytes_allocated == before
    assert [held(kv, slot) for slot in slots] == tokens
    kv.reserve(slots[0], 512)
    assert [held(kv, slot) for slot in slots] == tokens


def test_what_is_held_in_large_pages_is_what_is_attended_to() -> None:
    kv = RowsKV(SHAPE, 1 << 27)
    slots = [kv.open(SHAPE.context) for _ in range(20)]
    for slot in slots:
        kv.load(slot, 0, content([3] * 7))
    plan = kv.plan([Span(slot, 7, 1) for slot in slots])
    query, new = (
        torch.ones(20, SHAPE.query_heads, SHAPE.head_dim),
        torch.full((20, SHAPE.kv_heads, SHAPE.head_dim), 3.0),
    )
    torch.testing.assert_close(plan.attend(1, query, new, new, 1.0, None), 3 * query)


def test_a_closed_slot_is_unknown_and_its_name_is_not_used_again(make_kv: MakeKV) -> None:
    kv = make_kv(SHAPE, 4_096 * SHAPE.token_bytes)
    slot = kv.open(1)
    kv.close(slot)
    assert kv.open(1) != slot
    for use in (kv.close, kv.length, lambda slot: kv.truncate(slot, 0), lambda slot: kv.fork(slot, 0)):
        with pytest.raises(KeyError):
            use(slot)


def test_what_does_not_fit_a_slot_is_refused(make_kv: MakeKV) -> None:
    kv = make_kv(SHAPE, 4_096 * SHAPE.token_bytes)
    slot = kv.open(1)
    kv.load(slot, 0, content([1, 2, 3]))
    for use, message in (
        (lambda: kv.truncate(slot, 4), "holds 3"),
        (lambda: kv.fork(slot, 4), "holds 3"),
        (lambda: kv.export(slot, 2, 4), "holds 3"),
        (lambda: kv.load(slot, 2, content([4])), "holds 3"),
        (lambda: kv.open(1025), "context is 1024"),
        (lambda: kv.reserve(slot, 1025), "context is 1024"),
        (lambda: kv.plan([Span(slot, 4, 1)]), "leaves no gap"),
        (lambda: kv.plan([Span(slot, 3, 1000)]), "reserve it first"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert held(kv, slot) == [1, 2, 3]


def test_a_fork_shares_whole_pages_and_copies_the_one_it_ends_in() -> None:
    kv = PagedKV(SHAPE, 4_096 * SHAPE.token_bytes)
    slot = kv.open(0)
    kv.load(slot, 0, content(list(range(600))))
    assert kv.bytes_used == 3 * kv.page_bytes
    forked = kv.fork(slot, 600)
    assert kv.bytes_used == 4 * kv.page_bytes
    kv.fork(slot, 2 * PAGE)
    assert kv.bytes_used == 4 * kv.page_bytes
    kv.close(slot)
    assert kv.bytes_used == 3 * kv.page_bytes
    assert held(kv, forked) == list(range(600))


def varlen_by_hand(*args: Any, **kwargs: Any) -> Tensor:
    """What torch's `varlen_attn` gives, and what FlashAttention 2 insists on, in float32 on any device."""
    call = signature(varlen_attn).bind(*args, **kwargs).arguments
    query, keys, values, table = (call[name] for name in ("query", "key", "value", "block_table"))
    query_ends, lengths = call["cu_seq_q"], call["seqused_k"]
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (query_ends, call["cu_seq_k"], lengths, table))
    assert query.is_contiguous()
    assert keys.shape[1] % 256 == values.shape[1] % 256 == 0
    assert (call["max_q"], call["max_k"]) == (int(query_ends.diff().max()), int(lengths.max()))
    assert call["cu_seq_k"].diff().tolist() == lengths.tolist()
    left, right = call["window_size"]
    assert right == 0
    assert call["enable_gqa"]
    out = torch.empty_like(query)
    ends = query_ends.tolist()
    for row, (first, last, length) in enumerate(zip(ends, ends[1:], lengths.tolist(), strict=False)):
        mine, theirs = (part[table[row]].flatten(0, 1)[:length].float() for part in (keys, values))
        heads = query.shape[1] // mine.shape[1]
        mine, theirs = mine.repeat_interleave(heads, 1), theirs.repeat_interleave(heads, 1)
        scores = torch.einsum("qhd,khd->hqk", query[first:last].float(), mine) * call["scale"]
        behind = torch.arange(length - (last - first), length).unsqueeze(1) - torch.arange(length)
        seen = (behind >= 0) & ((behind <= left) | (left < 0))
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), theirs)
    return out


@pytest.mark.parametrize("window", [None, 300])
def test_the_kernel_is_asked_for_what_gathering_gives(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for FlashAttention, which no CPU has."""
    monkeypatch.setattr(kv_paged, "varlen_attn", varlen_by_hand)
    shape = replace(SHAPE, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(4)
    kv = PagedKV(shape, 8_192 * shape.token_bytes)
    spans = []
    for held, new in ((600, 1), (0, 40), (255, 4), (256, 1), (511, 1)):
        slot = kv.open(held + new)
        kv.load(slot, 0, torch.randn(2, 2, 2, held, 64, generator=draw).to(torch.bfloat16))
        spans.append(Span(slot, held, new))
    count = sum(span.tokens for span in spans)
    query, key, value = (torch.randn(count, heads, 64, generator=draw).to(torch.bfloat16) for heads in (4, 2, 2))
    found = []
    for kv.by_kernel in (True, False):
        found.append(kv.plan(spans).attend(1, query, key, value, 0.125, window))
    torch.testing.assert_close(*found, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "attends"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.float16, 64, (7, 5), False),  # T4
        (torch.float16, 100, (8, 0), False),
        (torch.bfloat16, 264, (8, 0), False),
    ],
)
def test_the_kernel_is_left_out_where_it_cannot_run(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], attends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shape = replace(SHAPE, dtype=dtype, head_dim=head_dim, device=torch.device("cuda"))
    assert kernel_attends(shape) == attends
    assert not kernel_attends(replace(shape, device=torch.device("cpu")))


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    kv = PagedKV(SHAPE, 4_096 * SHAPE.token_bytes)
    slot = kv.open(0)
    kv.load(slot, 0, content(list(range(256))))
    forked = kv.fork(slot, 256)
    kv.truncate(slot, 100)
    kv.load(slot, 100, content([7]))
    assert held(kv, slot) == [*range(100), 7]
    assert held(kv, forked) == list(range(256))
    forked_again = kv.fork(forked, 256)
    kv.truncate(forked_again, 10)
    before = kv.bytes_used
    kv.plan([Span(forked_again, 4, 2)])  # a step that resumes writes tokens that are there
    assert kv.bytes_used == before + kv.page_bytes


@pytest.mark.parametrize("moved", [False, True], ids=["the row is given out again", "another row moves into its place"])
def test_what_a_closed_slot_held_reaches_nobody(make_kv: MakeKV, moved: bool) -> None:
    kv = make_kv(SHAPE, 1_024 * SHAPE.token_bytes)
    poisoned = kv.open(200)
    kv.load(poisoned, 0, torch.full_like(content(list(range(200))), float("nan")))
    short = kv.open(200) if moved else None
    if short is not None:
        kv.load(short, 0, content(list(range(10))))
    kv.close(poisoned)
    if short is None:
        short = kv.open(200)
        kv.load(short, 0, content(list(range(10))))
    long = kv.open(200)
    kv.load(long, 0, content(list(range(100))))
    plan = kv.plan([Span(short, 10, 1), Span(long, 100, 1)])
    row = torch.zeros(2, SHAPE.kv_heads, SHAPE.head_dim)
    out = plan.attend(0, torch.zeros(2, SHAPE.query_heads, SHAPE.head_dim), row, row, 0.1, None)
    assert out.isfinite().all()
