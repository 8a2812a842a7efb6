"""The values of a policy file, each read exactly as a person writes it, with its pattern for editors."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from routers import sentences, units
from routers.addresses import check_base_url
from routers.types import Endpoint
from routers.units import UnitError
from routers.when import Need

_DRAFTER = "(auto|ngram|recycle|draft:[^+]+|exit:[1-9][0-9]*)"
_SPECULATION = rf"^(off|{_DRAFTER}(\+{_DRAFTER})*)$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UnitError("not text", "write it as text, in quotes if it looks like a number")
    return value


def _token_price(value: object) -> int:
    if not isinstance(value, str):
        raise UnitError("a price without its unit", "write dollars per million tokens, such as $0.25/Mtok")
    return units.parse_token_price(value)


def _duration(value: object) -> int:
    if not isinstance(value, str):
        raise UnitError("a duration without its unit", "write a number and ms, s, min, h or d, such as 250ms or 1h")
    milliseconds = units.parse_duration_ms(value)
    if milliseconds == 0:
        raise UnitError("a duration of zero", "write a longer one, such as 250ms or 1h")
    return milliseconds


def _budget(value: object) -> units.Budget:
    if not isinstance(value, str):
        raise UnitError("a budget without its unit", "write dollars per window, such as $50/month")
    return units.parse_budget(value)


def _rate(value: object) -> units.Rate:
    if not isinstance(value, str):
        raise UnitError("a rate without its unit", "write requests per s, min or h, such as 600/min")
    return units.parse_rate(value)


def _money(value: object) -> int:
    if not isinstance(value, str):
        raise UnitError("an amount without its unit", "write dollars with their sign, such as $0.01")
    return units.parse_money(value)


def _token_rate(value: object) -> units.Rate:
    if not isinstance(value, str):
        raise UnitError("a rate without its unit", "write tokens per s, min or h, such as 100000/min")
    return units.parse_rate(value, of="tokens")


def _share(value: object) -> float:
    if not isinstance(value, str):
        raise UnitError("a share without its unit", "write a percentage, such as 5%")
    return units.parse_percent(value) / 100


def _whole_percent(value: object) -> int:
    percent = units.parse_percent(_text(value))
    if percent != int(percent):
        raise UnitError("not a whole percentage", "write a whole one from 1% to 100%, such as 80%")
    return int(percent)


def _bound(value: object, sign: str, example: str) -> str:
    text = _text(value) if isinstance(value, str) else ""
    if not text.startswith(sign):
        raise UnitError("not a bound", f'write it with its sign and in quotes, such as "{sign} {example}"')
    return text.removeprefix(sign).strip()


def _probability(value: object, sign: str, example: str) -> float:
    text = _bound(value, sign, example)
    if not re.match(r"[0-9]{1,3}(\.[0-9]{1,9})?\Z", text):
        raise UnitError("not a probability", f'write a number between 0 and 1, such as "{sign} {example}"')
    number = float(text)
    if number > 1:
        raise UnitError(
            "no probability is above 1: nothing can satisfy this" if sign == ">=" else "above 1: always satisfied",
            f'write a number between 0 and 1, such as "{sign} {example}"',
        )
    return number


def _base_url(value: object) -> str:
    return check_base_url(_text(value))


def _secret_name(value: object) -> str:
    if not isinstance(value, str) or not re.match(r"env:[A-Za-z_][A-Za-z0-9_]{0,127}\Z", value):
        raise UnitError(
            "not the name of an environment variable; a policy never holds the key itself",
            "put the key in the environment and write its name, such as env:OPENAI_API_KEY",
        )
    return value.removeprefix("env:")


def _speculation(value: object) -> str:
    text = _text(value)
    if not re.match(_SPECULATION, text):
        raise UnitError(
            "not a way to draft",
            "write off, or some of `auto`, `ngram`, `recycle`, `draft:MODEL` and `exit:LAYER`, joined by +",
        )
    return text


def _days(value: object) -> frozenset[int]:
    return sentences.parse_days(_text(value))


def _hours(value: object) -> tuple[int, int]:
    return sentences.parse_hours(_text(value))


def _zone(value: object) -> str:
    return sentences.parse_zone(_text(value))


def _token_range(value: object) -> tuple[int, int | None]:
    if not isinstance(value, str):
        raise UnitError("a range without its sign", 'write ">= 1000", "<= 8000" or ">= 1000 and <= 8000"')
    return sentences.parse_token_range(value)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenPrice = Annotated[int, BeforeValidator(_token_price), _schema(units.TOKEN_PRICE_PATTERN, "$0.25/Mtok")]
Duration = Annotated[int, BeforeValidator(_duration), _schema(units.DURATION_PATTERN, "60s")]
BudgetOrTotal = Annotated[units.Budget, BeforeValidator(_budget), _schema(units.BUDGET_OR_TOTAL_PATTERN, "$50/month")]
RateText = Annotated[units.Rate, BeforeValidator(_rate), _schema(units.RATE_PATTERN, "600/min")]
TokenRateText = Annotated[units.Rate, BeforeValidator(_token_rate), _schema(units.RATE_PATTERN, "100000/min")]
Share = Annotated[float, BeforeValidator(_share), _schema(units.PERCENT_PATTERN, "5%")]
WholePercent = Annotated[int, BeforeValidator(_whole_percent), _schema(r"^(?:[1-9]\d?|100)%$", "80%")]
AtLeast = Annotated[
    float, BeforeValidator(lambda v: _probability(v, ">=", "0.90")), _schema(r"^>= *(0(\.\d+)?|1(\.0+)?)$", ">= 0.90")
]
AtMost = Annotated[
    float, BeforeValidator(lambda v: _probability(v, "<=", "0.10")), _schema(r"^<= *(0(\.\d+)?|1(\.0+)?)$", "<= 0.10")
]
CostAtMost = Annotated[
    int,
    BeforeValidator(lambda v: units.parse_money(_bound(v, "<=", "$0.01"))),
    _schema(r"^<= *\$\d{1,9}(\.\d{1,9})?$", "<= $0.01"),
]
Money = Annotated[int, BeforeValidator(_money), _schema(units.MONEY_PATTERN, "$0.01")]
DurationAtMost = Annotated[
    int,
    BeforeValidator(lambda v: _duration(_bound(v, "<=", "1.5s"))),
    _schema(r"^<= *\d{1,9}(\.\d{1,3})?(ms|s|min|h|d)$", "<= 1.5s"),
]
BaseUrl = Annotated[str, BeforeValidator(_base_url), _schema(r"^https?://[^@?#\s]+$", "https://api.openai.com/v1")]
SecretName = Annotated[
    str, BeforeValidator(_secret_name), _schema(r"^env:[A-Za-z_][A-Za-z0-9_]*$", "env:OPENAI_API_KEY")
]
Speculation = Annotated[str, BeforeValidator(_speculation), _schema(_SPECULATION, "auto")]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
Names = Annotated[list[Text], Field(min_length=1)]
NameOrNames = Annotated[Names, BeforeValidator(_one_or_many, json_schema_input_type=Text | Names)]
Days = Annotated[frozenset[int], BeforeValidator(_days), _schema(sentences.DAYS_PATTERN, "mon-fri")]
Hours = Annotated[tuple[int, int], BeforeValidator(_hours), _schema(sentences.HOURS_PATTERN, "09:00-18:00")]
Zone = Annotated[str, BeforeValidator(_zone), _schema(sentences.ZONE_PATTERN, "Europe/Berlin")]
TokenRange = Annotated[
    tuple[int, int | None], BeforeValidator(_token_range), _schema(sentences.TOKEN_RANGE_PATTERN, ">= 8000")
]
_ManyDays = Annotated[list[Days], Field(min_length=1)]
_ManyHours = Annotated[list[Hours], Field(min_length=1)]
_Endpoints = Annotated[list[Endpoint], Field(min_length=1)]
_Needs = Annotated[list[Need], Field(min_length=1)]
DaysOrMany = Annotated[_ManyDays, BeforeValidator(_one_or_many, json_schema_input_type=Days | _ManyDays)]
HoursOrMany = Annotated[_ManyHours, BeforeValidator(_one_or_many, json_schema_input_type=Hours | _ManyHours)]
EndpointOrMany = Annotated[_Endpoints, BeforeValidator(_one_or_many, json_schema_input_type=Endpoint | _Endpoints)]
NeedOrMany = Annotated[_Needs, BeforeValidator(_one_or_many, json_schema_input_type=Need | _Needs)]
