"""JSON that is not what was to be read is told with its field, what is wrong with it, and what may be written."""

from typing import Any, Literal

import msgspec
import pytest

from gateway.decode_errors import misread


class Apple(msgspec.Struct, tag="apple"):
    colour: Literal["red", "green"] = "red"


class Pear(msgspec.Struct, tag="pear"):
    ripe: bool = False


class Basket(msgspec.Struct):
    fruit: list[Apple | Pear] = []
    best: Apple | None = None
    named: dict[str, Literal["small", "large"]] = {}
    size: Literal[1, 2] | None = None
    counts: dict[int, int] = {}


@pytest.mark.parametrize(
    ("kind", "given", "within", "path", "sentence"),
    [
        (Basket, '{"fruit": [{"type": "plum"}]}', "", "fruit[0].type", "Invalid value 'plum'; send one of apple, pear"),
        (Basket, '{"best": {"colour": "blue", "type": "apple"}}', "gift", "gift.best.colour",
         "Invalid enum value 'blue'; send one of green, red"),
        (Basket, '{"named": {"a": "tiny"}}', "", "named[...]", "Invalid enum value 'tiny'; send one of large, small"),
        (Basket, '{"counts": {"x": 1}}', "gift", "gift.counts", "Expected `int`, got `str`"),
        (Basket, '{"size": 3}', "", "size", "Invalid enum value 3; send one of 1, 2"),
        (Basket, '{"fruit": [{}]}', "gift", "gift.fruit[0].type", "is missing"),
        (Apple | Pear, "{}", "", "type", "is missing"),
        (Apple | Pear, '{"type": "plum"}', "gift", "gift.type", "Invalid value 'plum'; send one of apple, pear"),
        (list[Literal["a"]], '["a", "b"]', "gift", "gift[1]", "Invalid enum value 'b'; send one of a"),
        (Basket, "[]", "", None, "Expected `object`, got `array`"),
        (Basket, "[]", "gift", "gift", "Expected `object`, got `array`"),
        (Basket, '{"best": 7}', "", "best", "Expected `object | null`, got `int`"),
    ],
)  # fmt: skip
def test_the_field_the_problem_and_the_choices(
    kind: Any, given: str, within: str, path: str | None, sentence: str
) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(given, type=kind)
    assert misread(caught.value, kind, within) == (path, sentence)
