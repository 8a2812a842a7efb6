"""`leadline probe accept`: the accept rule of a cascade, from answers that were measured."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from msgspec.structs import asdict

from probes.cli import Seed, _explained

if TYPE_CHECKING:
    from probes.accept_rule import FittedAccept
    from probes.calibrate import Array


def accept(
    table: Annotated[Path, typer.Argument(help="A .parquet, .csv or .jsonl file, one answer a row.")],
    logprobs: Annotated[
        str,
        typer.Option(
            help="Column of the log probabilities of each answer's tokens: numbers, or `logprobs` as an API returned "
            "it; lists or JSON."
        ),
    ],
    correct: Annotated[str, typer.Option(help="Column of 0/1: whether the answer is right.")],
    out: Annotated[Path, typer.Option(help="The .json file to write; a policy names it: `accept: {rule: FILE}`.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Certify: accepted answers are wrong in at most this share of all queries; with --stronger, wrong "
            "where that one is right."
        ),
    ] = None,
    method: Annotated[
        Literal["ltt", "crc"], typer.Option(help="`ltt`: with confidence 1 - delta; `crc`: on average.")
    ] = "ltt",
    delta: Annotated[float, typer.Option(help="Chance that an ltt certificate does not hold.")] = 0.05,
    right_at_least: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="In place of --alpha: the share of accepted answers that shall be right."),
    ] = None,
    stronger: Annotated[
        str | None,
        typer.Option(
            help="Column of 0/1: whether the model that is asked next is right. Without --alpha and --right-at-least: "
            "accepted answers shall be right as often as that one is."
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Fit when a cascade accepts an answer of its first model, certify it, and write it for a policy to name.

    An answer is judged by the log probabilities of its tokens and their number, which the gateway sees of any model
    that returns them. Fit it on answers of that model, to prompts like those that will come.
    """
    with _explained():
        from probes.accept import answer_features, certified_accept, digest, fit_accept
        from probes.accept_rule import AcceptRule, write_rule
        from probes.errors import TableError

        if alpha is not None and right_at_least is not None:
            raise TableError("--alpha and --right-at-least both set the threshold; give one of them")
        if alpha is None and right_at_least is None and stronger is None:
            raise TableError(
                "what do accepted answers owe? Give --alpha 0.05 for a certificate, or --right-at-least 0.95, or "
                "--stronger COLUMN"
            )
        values, right, other = _read(table, logprobs, correct, stronger)
        features = answer_features(values)
        if alpha is not None:
            found = certified_accept(
                features, right, alpha=alpha, stronger=other, method=method, delta=delta, seed=seed
            )
        else:
            share = right_at_least if right_at_least is not None or other is None else float(other.mean())
            assert share is not None
            found = fit_accept(features, right, right_at_least=share, seed=seed)
        labels = [right] if other is None else [right, other]
        rule = AcceptRule(
            **(asdict(found) | {"n": len(right)}),
            source=f"{table.name}: {correct}", data_sha256=digest(features, *labels), created=date.today().isoformat(),
        )  # fmt: skip
        write_rule(rule, out)
    for line in _lines(found, right, other):
        typer.echo(line)
    typer.echo(f"wrote {out}; in a route with a cascade: accept: {{rule: {out.name}}}")


def _read(
    table: Path, logprobs: str, correct: str, stronger: str | None
) -> "tuple[list[list[float]], Array, Array | None]":
    from probes.accept import logprobs_of
    from probes.cells import at_row, read_columns
    from probes.errors import TableError

    columns = read_columns(table, [logprobs, correct, *([stronger] if stronger else [])])
    values = []
    for number, cell in enumerate(columns[logprobs]):
        try:
            values.append(logprobs_of(cell))
        except (ValueError, TypeError, KeyError):
            raise TableError(
                f"{table}: column {logprobs!r} in {at_row(number)}: no list of log probabilities; drop such rows"
            ) from None
    labels = [_labels(columns[name], table, name) for name in (correct, stronger) if name]
    return values, labels[0], labels[1] if stronger else None


def _labels(cells: list[Any], table: Path, name: str) -> "Array":
    import numpy as np

    from probes.cells import at_row
    from probes.errors import TableError

    found = np.empty(len(cells))
    for number, cell in enumerate(cells):
        try:
            found[number] = {"true": 1.0, "false": 0.0}.get(str(cell).lower(), cell)
        except (ValueError, TypeError):
            found[number] = np.nan
        if found[number] not in (0.0, 1.0):
            raise TableError(
                f"{table}: column {name!r} holds {cell!r} in {at_row(number)}; labels are 0 or 1, of every answer"
            )
    return found


def _lines(found: "FittedAccept", right: "Array", other: "Array | None") -> list[str]:
    next_one = "" if other is None else f"; of the model that is asked next {other.mean():.1%}"
    lines = [
        f"{len(right)} answers, {right.mean():.1%} right{next_one}",
        f"accepts {found.accepted:.1%} of {found.n} answers that the threshold was measured on, of which "
        f"{found.accepted_right:.1%} are right; {found.keeps_right:.1%} of the right ones, {found.keeps_wrong:.1%} of "
        "the wrong ones",
    ]
    if found.certificate is not None:
        return [*lines, f"certified: {found.certificate}"]
    return [*lines, "not certified: --alpha asks for that", str(found)]
