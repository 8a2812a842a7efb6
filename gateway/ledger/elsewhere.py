"""What requests spent on models that did not serve them: failed attempts before a fallback, hedges that lost.

Sums per model begin with the model that served, to which a request belongs whole; these selects then move the money
and the tokens of the other attempts to where they were spent. Added in one statement, nothing is counted twice.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, or_, select
from sqlmodel import col

from gateway.ledger.tables import AttemptRow, RequestRow


def moves(conditions: Sequence[ColumnElement[bool]], *at: ColumnElement[Any]) -> list[Select[Any]]:
    """Two selects of (`at`…, model, cost, input tokens, output tokens): what to add where it was spent, and the same
    below zero for the models that served. `conditions` and `at` are of the request's row; a request without a known
    cost moves no money, as no sum contains it.
    """
    request, attempt = RequestRow, AttemptRow
    served = col(request.model_served)
    cost = func.sum(case((col(request.cost_nanousd).is_(None), 0), else_=col(attempt.cost_nanousd)))
    read = func.sum(col(attempt.input_tokens) + col(attempt.cached_input_tokens) + col(attempt.cache_write_tokens))
    written = func.sum(col(attempt.output_tokens) + col(attempt.reasoning_tokens))
    return [
        select(*at, model, sign * cost, sign * read, sign * written)
        .join_from(request, attempt, col(attempt.request_id) == col(request.id))
        .where(
            *conditions,
            or_(col(request.attempts) > 1, served.is_(None)),
            or_(served.is_(None), served != col(attempt.model)),
        )
        .group_by(*at, model)
        for model, sign in ((col(attempt.model), 1), (served, -1))
    ]
