"""Header lines are the headers they were made of, and never others."""

import pytest

from gateway.header_lines import lines_of, pairs_of

PAIRS = [(b"x-request-id", b"req_1"), (b"x-leadline-model", b""), (b"x-time", b"12: 30")]


def test_lines_are_the_headers_they_were_made_of() -> None:
    assert lines_of(PAIRS) == b"x-request-id: req_1\r\nx-leadline-model: \r\nx-time: 12: 30\r\n"
    assert pairs_of(lines_of(PAIRS)) == PAIRS
    assert pairs_of(lines_of([])) == []


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"a\0b"])
def test_a_value_that_would_write_another_header_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="line break or a NUL"):
        lines_of([*PAIRS, (b"x-leadline-route", value)])
