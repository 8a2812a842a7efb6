"""Each vendor's way to count, as its answers show it, and the same disjoint classes of all of them."""

import re
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.settle import Usage, WireUsage, cost_nanousd, worst_case_usage
from routers.policy import Price, Tier

VENDORS: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "openai chat": (
        {
            "prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306,
            "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 192, "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        },
        Usage(86, 1920, 0, 108, 192),
    ),
    "openai responses": (
        {
            "input_tokens": 328, "input_tokens_details": {"cached_tokens": 128},
            "output_tokens": 52, "output_tokens_details": {"reasoning_tokens": 32}, "total_tokens": 380,
        },
        Usage(200, 128, 0, 20, 32),
    ),
    "anthropic": (
        {
            "input_tokens": 50, "cache_creation_input_tokens": 1000, "cache_read_input_tokens": 100000,
            "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 544},
            "output_tokens": 503, "service_tier": "standard",
        },
        Usage(50, 100000, 1000, 503, 0),
    ),
    "anthropic, creation by lifetime alone": (
        {
            "input_tokens": 50, "cache_read_input_tokens": 0, "output_tokens": 5,
            "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 544},
        },
        Usage(50, 0, 1000, 5, 0),
    ),
    "a proxy before anthropic, cached within the prompt": (
        {
            "prompt_tokens": 1150, "completion_tokens": 20, "total_tokens": 1170,
            "prompt_tokens_details": {"cached_tokens": 100},
            "cache_read_input_tokens": 100, "cache_creation_input_tokens": 1000,
        },
        Usage(50, 100, 1000, 20, 0),
    ),
    "a proxy before anthropic, cached beside the prompt": (
        {
            "prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 1170,
            "cache_read_input_tokens": 100, "cache_creation_input_tokens": 1000,
        },
        Usage(50, 100, 1000, 20, 0),
    ),
    "deepseek": (
        {
            "prompt_tokens": 1000, "completion_tokens": 400, "total_tokens": 1400,
            "prompt_cache_hit_tokens": 640, "prompt_cache_miss_tokens": 360,
            "completion_tokens_details": {"reasoning_tokens": 250},
        },
        Usage(360, 640, 0, 150, 250),
    ),
    "gemini, thoughts shown in the total alone": (
        {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530},
        Usage(10, 0, 0, 20, 500),
    ),
    "xai, reasoning beside the completion": (
        {
            "prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135,
            "prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 6},
            "completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0},
        },
        Usage(26, 6, 0, 9, 94),
    ),
    "groq, with timings": (
        {
            "queue_time": 0.03, "prompt_tokens": 18, "prompt_time": 0.0007, "completion_tokens": 556,
            "completion_time": 0.46, "total_tokens": 574, "total_time": 0.47,
            "completion_tokens_details": {"reasoning_tokens": 500},
        },
        Usage(18, 0, 0, 56, 500),
    ),
    "openrouter": (
        {
            "prompt_tokens": 10339, "completion_tokens": 60, "total_tokens": 10399, "cost": 0.95,
            "prompt_tokens_details": {"cached_tokens": 10318, "cache_write_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 0}, "cost_details": {"upstream_inference_cost": 19},
        },
        Usage(1, 10318, 20, 60, 0),
    ),
    "mistral": ({"prompt_tokens": 16, "completion_tokens": 34, "total_tokens": 50}, Usage(16, 0, 0, 34, 0)),
    "vllm, details null": (
        {"prompt_tokens": 16, "completion_tokens": 3, "total_tokens": 19, "prompt_tokens_details": None},
        Usage(16, 0, 0, 3, 0),
    ),
    "embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8)),
    "embeddings, the total alone": ({"total_tokens": 8}, Usage(8)),
    "nothing counted": ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, None),
    "all null": ({"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}, None),
}  # fmt: skip


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_vendors_counts_become_disjoint_classes(vendor: str) -> None:
    payload, expected = VENDORS[vendor]
    assert msgspec.json.decode(msgspec.json.encode(payload), type=WireUsage).split() == expected


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_whole_number_written_as_a_float_is_the_same_count(vendor: str) -> None:
    payload, expected = VENDORS[vendor]
    floats = re.sub(rb":(\d+)(?=[,}])", rb":\1.0", msgspec.json.encode(payload))
    assert msgspec.json.decode(floats, type=WireUsage).split() == expected


@pytest.mark.parametrize("odd", ["4", 4.5, -3, True, [4], {"count": 4}])
def test_a_detail_that_cannot_be_read_costs_that_detail_alone(odd: Any) -> None:
    counted = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    for payload, expected in (
        ({"prompt_tokens_details": {"cached_tokens": odd, "cache_write_tokens": 2}}, Usage(8, 0, 2, 5)),
        ({"completion_tokens_details": {"reasoning_tokens": odd}}, Usage(10, output=5)),
        ({"prompt_tokens_details": odd, "completion_tokens_details": odd, "cache_creation": odd}, Usage(10, output=5)),
        ({"total_tokens": odd, "cache_read_input_tokens": odd}, Usage(10, output=5)),
    ):
        assert msgspec.convert(counted | payload, WireUsage).split() == expected


@pytest.mark.parametrize("odd", ["4", 4.5, True, [4]])
def test_a_count_that_cannot_be_read_is_as_good_as_none(odd: Any) -> None:
    anthropic = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 3}
    for name in anthropic:
        assert msgspec.convert({**anthropic, name: odd}, WireUsage).split() is None
    for name in ("prompt_tokens", "completion_tokens"):
        assert msgspec.convert({"prompt_tokens": 10, "completion_tokens": 5, name: odd}, WireUsage).split() is None


COUNT = st.one_of(st.none(), st.integers(-5, 5000))
DETAILS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("cached_tokens", "cache_write_tokens", "reasoning_tokens"), COUNT)
    ),
)
COUNTS = (
    "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens", "cache_read_input_tokens",
    "cache_creation_input_tokens", "prompt_cache_hit_tokens",
)  # fmt: skip
PARTS = ("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details")


@given(st.fixed_dictionaries({}, optional={**dict.fromkeys(COUNTS, COUNT), **dict.fromkeys(PARTS, DETAILS)}))
def test_no_class_is_negative_and_none_is_above_what_was_reported(payload: dict[str, Any]) -> None:
    usage = msgspec.convert(payload, WireUsage).split()
    if usage is None:
        return
    classes = (usage.input, usage.cached_input, usage.cache_write, usage.output, usage.reasoning)
    assert min(classes) >= 0
    assert sum(classes) > 0
    total = payload.get("total_tokens") or 0
    assert sum(classes) >= total, "nothing that the provider counted goes unbilled"


@given(
    st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_classes_sum_to_the_providers_total(
    fresh: int, cached: int, written: int, output: int, reasoning: int, cached_beside: bool, reasoning_beside: bool
) -> None:
    prompt, completion = fresh + cached + written, output + reasoning
    payload = {
        "prompt_tokens": fresh if cached_beside else prompt,
        "completion_tokens": output if reasoning_beside else completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    usage = msgspec.convert(payload, WireUsage).split()
    if prompt + completion == 0:
        assert usage is None
        return
    assert usage is not None
    assert usage.input + usage.cached_input + usage.cache_write + usage.output + usage.reasoning == prompt + completion
    ambiguous = reasoning_beside and reasoning == cached + written  # the total fits both readings
    if not cached_beside and payload["completion_tokens"] and not ambiguous:
        assert usage == Usage(fresh, cached, written, output, reasoning)


LONG = Price(3, 1, 4, 15, 15, tiers=(Tier(200, Price(6, 2, 8, 22, 22)), Tier(500, Price(9, 9, 9, 30, 30))))


def scaled(price: Price, factor: int) -> Price:
    return Price(
        price.input * factor, price.cached_input * factor, price.cache_write * factor, price.output * factor,
        price.reasoning * factor, tuple(Tier(tier.above, scaled(tier.price, factor)) for tier in price.tiers),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("usage", "per_input", "per_output"),
    [(Usage(200, output=10), 3, 15), (Usage(201, output=10), 6, 22), (Usage(501, output=10), 9, 30)],
)
def test_a_call_is_billed_whole_in_the_tier_that_its_input_reaches(
    usage: Usage, per_input: int, per_output: int
) -> None:
    price = scaled(LONG, 10**6)
    assert cost_nanousd(price, usage) == usage.input * per_input + usage.output * per_output


def test_all_classes_of_input_count_towards_the_tier() -> None:
    assert LONG.at(200).input == 3
    price = Price(0, 10**6, 0, 0, 0, tiers=(Tier(200, Price(0, 2 * 10**6, 0, 0, 0)),))
    assert cost_nanousd(price, Usage(100, 50, 50)) == 50
    assert cost_nanousd(price, Usage(100, 50, 51)) == 100


def test_unpriced_is_not_zero() -> None:
    assert cost_nanousd(None, Usage(5, output=5)) is None
    worst = worst_case_usage(None, body_bytes=10, context=100, max_output=7, choices=2, text_only=True)
    assert (worst.input, worst.output) == (100, 14)


@given(st.data())
def test_no_usage_within_its_bounds_costs_more_than_the_reservation_in_any_tier(data: st.DataObject) -> None:
    rising = sorted(data.draw(st.lists(st.integers(1, 2000), max_size=3, unique=True)))
    steps = []
    classes = [0] * 5
    for _ in range(1 + len(rising)):
        more = [data.draw(st.integers(0, 10**9)) for _ in range(5)]
        more[1] = min(more[0], more[1])  # reading from a cache is not dearer than reading
        classes = [each + step for each, step in zip(classes, more, strict=True)]
        steps.append(Price(classes[0], classes[1], classes[2], classes[3], classes[4]))
    base, *above = steps
    tiers = [Tier(at, price) for at, price in zip(rising, above, strict=True)]
    price = replace(base, tiers=tuple(tiers))
    body = data.draw(st.integers(0, 2000))
    worst = worst_case_usage(price, body_bytes=body, context=2000, max_output=50, choices=1, text_only=True)
    bound = worst.input + worst.cache_write
    prompt = data.draw(st.integers(0, bound))
    cached = data.draw(st.integers(0, prompt))
    written = data.draw(st.integers(0, prompt - cached))
    output = data.draw(st.integers(0, 50))
    reasoning = data.draw(st.integers(0, output))
    usage = Usage(prompt - cached - written, cached, written, output - reasoning, reasoning)
    assert cost_nanousd(price, usage) <= cost_nanousd(price, worst)
