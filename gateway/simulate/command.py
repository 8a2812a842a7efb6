"""`leadline simulate POLICY TABLE`: what a policy would have done on queries whose outcomes are known."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.moments import moment
from probes.errors import ProbeError, TableError


def simulate(
    file: Annotated[Path, typer.Argument(metavar="POLICY", help="Policy file.")],
    table: Annotated[Path, typer.Argument(help="A .parquet or .csv file of what each model did on each query.")],
    model: Annotated[
        list[str],
        typer.Option(
            help="A model of the policy and its columns, repeatable: NAME=CORRECT[:COST_USD[:OUT_TOKENS]]. With --by, "
            "NAME=VALUE: what stands in that column."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Column of the prompt.")] = "prompt",
    by: Annotated[str | None, typer.Option(help="One row per query and model: the column of the model.")] = None,
    query: Annotated[str, typer.Option(help="With --by: the columns that name a query, by commas.")] = "query",
    prompts: Annotated[Path | None, typer.Option(help="With --by: a table that holds the prompts.")] = None,
    correct: Annotated[str, typer.Option(help="With --by: column of correctness.")] = "correct",
    cost: Annotated[str | None, typer.Option(help="With --by: column of the cost in US dollars.")] = None,
    tokens: Annotated[str | None, typer.Option(help="With --by: column of output tokens.")] = None,
    p_success: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN, repeatable: P(success) from the table. Without: the policy's own probe."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Column of the task or domain, for its prior.")] = None,
    drop_if: Annotated[str | None, typer.Option(help="Leave out rows where this 0/1 column is 1.")] = None,
    ask: Annotated[str, typer.Option(help="The model or alias that callers name.")] = "auto",
    tag: Annotated[list[str] | None, typer.Option(help="A tag of the requests; may be repeated.")] = None,
    tenant: Annotated[str, typer.Option(help="The tenant of the caller's key.")] = "default",
    at: Annotated[str | None, typer.Option(help="When they ask, for schedules, such as 2026-11-01T09:00.")] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Folder for the probe's scores: beside --report or --json, else in ~/.leadline."),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page with the curve to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of folds and resamples.")] = 0,
) -> None:
    """Run a policy over a table of outcomes: accuracy, cost and share per model beside every baseline.

    Nothing is called but the probe. Its scores are kept, so that a run that was broken off goes on.
    """

    from gateway.policies import CannotServe, checked_policy
    from gateway.settings import Settings, SettingsError
    from gateway.simulate import run
    from gateway.simulate.routed import Caller
    from gateway.simulate.table import Columns, Long, read_outcomes
    from probes.report import console

    try:
        policy, folder = checked_policy(file, secrets=False)
        columns = Columns(
            prompt=prompt,
            models=_models(model, list(policy.models), long=by is not None),
            long=Long(by, tuple(query.split(",")), correct, cost, tokens) if by is not None else None,
            p_success=_pairs("--p-success", p_success or []),
            group=group,
            drop_if=drop_if,
        )
        _known("--p-success", columns.p_success, list(columns.models))
        if by is None and (prompts or cost or tokens):
            raise TableError("--prompts, --cost and --tokens belong to --by; without it, name columns in --model")
        outcomes = read_outcomes(table, columns, prompts)
        output = report or json_out
        kept = scores or (output.parent if output is not None else Settings.from_env().home / "scores")
        now_ms = time.time_ns() // 1_000_000
        caller = Caller(ask, tenant, frozenset(tag or ()), now_ms if at is None else moment("--at", at, now_ms))
        found = run.simulated(policy, folder, outcomes, caller, kept, seed)
    except (ProbeError, CannotServe, SettingsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    title = f"{file.name} {policy.version_hash} on {table.name}"
    shown = console()
    for fact in found.facts:
        shown.print(fact, highlight=False, markup=False)
    shown.print(run.rendered(title, found.measured))
    for rule, count in found.rules:
        shown.print(f"  {count:>7}  {rule}", highlight=False, markup=False)
    if json_out is not None:
        told = run.as_json(policy, file, table, len(outcomes.prompts), found)
        json_out.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if report is not None:
        from gateway.simulate.page import page

        report.write_text(page(title, found), encoding="utf-8")


def _models(given: Sequence[str], known: list[str], *, long: bool) -> dict[str, tuple[str, str | None, str | None]]:
    found: dict[str, tuple[str, str | None, str | None]] = {}
    for name, value in _pairs("--model", given).items():
        parts = [value] if long else value.split(":")
        if len(parts) > 3 or not all(parts):
            raise TableError(f"--model {name}={value}: write NAME=CORRECT[:COST_USD[:OUT_TOKENS]]")
        correct, cost, tokens = (*parts, None, None)[:3]
        assert correct is not None
        found[name] = correct, cost, tokens
    _known("--model", {name.partition("+")[0]: name for name in found}, known)
    if len(found) < 2:
        raise TableError("--model: name at least two models; with one there is nothing to choose")
    return found


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise TableError(f"{option} {pair}: write NAME=COLUMN, such as {option} strong=gpt4_correct")
        if name in found:
            raise TableError(f"{option} {name}: given twice; keep one")
        found[name] = value
    return found


def _known(option: str, given: Mapping[str, Any], names: list[str]) -> None:
    from routers.shape import did_you_mean

    for name in given:
        if name not in names:
            raise TableError(f"{option} {name}: the policy has no such model in play; {did_you_mean(name, names)}")
