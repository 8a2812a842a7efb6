"""What one request asks of its own decision, in headers. Each of them can only narrow what the policy allows."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import get_args

from gateway.errors import InvalidRequest
from routers.fields import NAME_PATTERN
from routers.types import Effort, Hints

MAX_COST, MIN_QUALITY = b"x-leadline-max-cost", b"x-leadline-min-quality"
EFFORT, MODELS = b"x-leadline-effort", b"x-leadline-models"
HINTS = (EFFORT, MAX_COST, MIN_QUALITY, MODELS)
MAX_MODELS = 64
_EFFORTS: tuple[Effort, ...] = get_args(Effort)
QUALITY_PATTERN = r"^(0(\.[0-9]{1,9})?|1(\.0{1,9})?)$"
MODELS_PATTERN = rf"{NAME_PATTERN[:-1]}( *, *{NAME_PATTERN[1:-1]}){{0,{MAX_MODELS - 1}}}$"


def read_hints(headers: Mapping[bytes, str]) -> Hints:
    """The hints, by the names of their headers. Raises InvalidRequest, with the header, the value and the fix."""
    cost, quality, effort, models = map(headers.get, (MAX_COST, MIN_QUALITY, EFFORT, MODELS))
    return Hints(
        max_cost_nanousd=dollars(MAX_COST.decode(), cost) if cost is not None else None,
        min_p_success=_quality(quality) if quality is not None else None,
        effort=_effort(effort) if effort is not None else None,
        models=_models(models) if models is not None else None,
    )


def dollars(header: str, text: str) -> int:
    """An amount of money, with or without its sign, in nano-dollars. Raises InvalidRequest."""
    try:
        nanousd = Decimal(text.removeprefix("$")) * 10**9
        whole = int(nanousd)
    except (InvalidOperation, ValueError, OverflowError):
        whole, nanousd = -1, Decimal(0)
    if whole < 0 or whole != nanousd or whole >= 2**63:
        raise InvalidRequest(f"{header}: {text[:40]!r} is not an amount of dollars such as 0.50.")
    return whole


def _quality(text: str) -> float:
    if not re.fullmatch(QUALITY_PATTERN, text):
        raise InvalidRequest(f"x-leadline-min-quality: {text[:40]!r} is not a probability such as 0.9; send 0 to 1.")
    return float(text)


def _effort(text: str) -> Effort:
    for effort in _EFFORTS:
        if text == effort:
            return effort
    raise InvalidRequest(f"x-leadline-effort: {text[:40]!r} is no effort; send one of {', '.join(_EFFORTS)}.")


def _models(text: str) -> frozenset[str]:
    if not re.fullmatch(MODELS_PATTERN, text):
        raise InvalidRequest(
            f"x-leadline-models: {text[:80]!r} is not a list of the policy's models; send up to {MAX_MODELS} names "
            "with ',' between them, such as `local, strong`."
        )
    return frozenset(name.strip() for name in text.split(","))
