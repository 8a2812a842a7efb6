"""Plans as a policy writes them: `local`, `local+high` (with an effort), `local>strong` (a cascade), and
`one&other>strong` (a cascade whose first two are asked at the same time)."""

import re
from collections.abc import Iterable
from typing import get_args

from msgspec.structs import replace

from routers.types import Effort, Single, stages_name
from routers.units import UnitError

MAX_STAGES = 4
EFFORTS: tuple[Effort, ...] = get_args(Effort)
_WORDS: dict[str, Effort] = {**{effort: effort for effort in EFFORTS}, "off": "none", "think": "high"}


def parse_plan(text: str) -> tuple[Single, ...]:
    """What runs, in turn: one stage for a model, more for a cascade. Raises UnitError."""
    stages = tuple(
        [
            replace(_stage(part.strip(), text), beside=place > 0)
            for beside in text.split(">")
            for place, part in enumerate(beside.split("&"))
        ]
    )
    if len(stages) > MAX_STAGES:
        raise UnitError(f"a cascade of {len(stages)} stages", f"write at most {MAX_STAGES}; each one is waited for")
    if stages[-1].beside:
        raise UnitError(
            f"`{text[:60]}` ends in models that are asked at the same time, and nobody decides between them",
            f"add who answers where they differ, such as {text[:60]}>strong",
        )
    if len({stage.name for stage in stages}) < len(stages):
        raise UnitError(
            "a cascade that asks the same twice", "write each stage once, from the cheapest to the strongest"
        )
    return stages


def plan_name(stages: Iterable[Single]) -> str:
    """The plan in its one spelling: `local+think` is `local+high`."""
    return stages_name(stages)


def models_of(names: Iterable[str]) -> tuple[str, ...]:
    """The models that plans of these names run, each once."""
    return tuple(dict.fromkeys(part.partition("+")[0] for name in names for part in re.split("[>&]", name)))


def no_plan_for(*, choices: int, tools: bool, json: bool, logprobs: bool) -> str:
    """What of a request keeps the plan of a model from running, by the request's own field; "": nothing. A plan is for
    one choice of plain text."""
    if choices > 1:
        return "n"
    return "tools" if tools else "response_format" if json else "logprobs" if logprobs else ""


def _stage(part: str, whole: str) -> Single:
    model, plus, word = part.partition("+")
    if not model:
        example = "one&other>strong" if "&" in whole else "local>strong" if ">" in whole else "local+high"
        raise UnitError("a plan without a model", f"write a model on each side, such as {example}")
    if not plus:
        return Single(model)
    effort = _WORDS.get(word)
    if effort is None:
        raise UnitError(f"`{word[:20]}` is no effort", f"write one of {', '.join(_WORDS)}, such as {model}+high")
    return Single(model, effort)
