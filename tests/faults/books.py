"""Truth × ledger × transcript: three accounts of the same calls, joined by the name that the caller gave each.

The caller's name travels in `metadata.call` to the upstream's truth file and in `X-Session-Id` to the ledger.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, select

from gateway.ledger.tables import AttemptRow, RequestRow
from tests.upstream.oracle import Tokens
from tests.upstream.truth import Row


@dataclass
class Call:
    """One call in the upstream's and the gateway's books."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    """Of the ledger: one, if all is well."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Of the ledger, in order."""
    truth: list[Row] = field(default_factory=list)
    """The upstream's rows, in order of arrival."""

    @property
    def request(self) -> dict[str, Any]:
        (request,) = self.requests
        return request


def join(truth: list[Row], engine: Engine) -> dict[str, Call]:
    """Every row of both books, by the caller's name of the call. Raises AssertionError for a row without one."""
    calls: dict[str, Call] = defaultdict(Call)
    of_request: dict[str, Call] = {}
    with engine.connect() as connection:
        for row in connection.execute(select(RequestRow.__table__)).mappings():  # type: ignore[attr-defined]
            assert row["session"], f"{row['id']} has no session"
            call = of_request[row["id"]] = calls[row["session"]]
            call.requests.append(dict(row))
        attempts = select(AttemptRow.__table__).order_by(AttemptRow.seq)  # type: ignore[attr-defined, arg-type]
        for row in connection.execute(attempts).mappings():
            of_request[row["request_id"]].attempts.append(dict(row))
    for told in truth:
        assert told.call, f"{told.id} has no call"
        calls[told.call].truth.append(told)
    return dict(calls)


def tokens_of(row: dict[str, Any]) -> Tokens:
    """A ledger row's tokens, in the oracle's words."""
    return Tokens(
        row["input_tokens"],
        row["cached_input_tokens"],
        row["cache_write_tokens"],
        row["output_tokens"],
        row["reasoning_tokens"],
    )
