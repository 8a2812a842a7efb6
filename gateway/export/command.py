"""`leadline export …`: what the ledger has learned, as a table for other commands."""

import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.moments import moment

app = typer.Typer(no_args_is_help=True, help="Write what the ledger has learned to a table.")


@app.callback()
def export() -> None:
    """Write what the ledger has learned to a table."""


@app.command()
def outcomes(
    out: Annotated[Path, typer.Option(help="A .parquet or .csv file.")],
    since: Annotated[str, typer.Option(help="How far back (7d, 12h), or a moment (2026-11-01).")] = "365d",
    until: Annotated[str | None, typer.Option(help="Up to then, in the same words. Default: now.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of one tenant alone.")] = None,
    source: Annotated[str | None, typer.Option(help="What one source said alone, such as judge.")] = None,
    kept: Annotated[bool, typer.Option("--kept", help="Only requests whose prompt the policy keeps.")] = False,
) -> None:
    """Labels from feedback and judges, one row a request, for `leadline probe fit` and `leadline simulate`.

    The prompt is there where the policy kept it (`shadow: {keep: true}`); of all, there is a keyed hash. By model:
    correct_MODEL (0 or 1), score_MODEL, p_MODEL (as the decision expected), cost_usd_MODEL, out_tokens_MODEL.
    """
    import pandas as pd

    from gateway.export.outcomes import outcome_table
    from gateway.ledger.store import LedgerUnreachable, connect
    from gateway.replay.history import Span
    from gateway.settings import Settings, SettingsError

    if out.suffix not in (".parquet", ".csv"):
        raise typer.BadParameter(f"--out {out}: unknown table type {out.suffix!r}; give a .parquet or .csv file")
    now_ms = time.time_ns() // 1_000_000
    end_ms = now_ms if until is None else moment("--until", until, now_ms)
    try:
        settings = Settings.from_env()
        settings.prepare_home()
        engine = connect(settings.database_url, settings.durability)
    except (SettingsError, LedgerUnreachable) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        span = Span(moment("--since", since, now_ms), end_ms, tenant)
        rows = outcome_table(engine, span, source=source, kept=kept)
    finally:
        engine.dispose()
    if not rows:
        typer.echo("error: nothing was said of requests of that span; widen it, or see --source and --kept", err=True)
        raise typer.Exit(2)
    frame = pd.DataFrame(rows)
    frame.to_parquet(out, index=False) if out.suffix == ".parquet" else frame.to_csv(out, index=False)
    prompts = sum(row["prompt"] is not None for row in rows)
    typer.echo(f"wrote {out}: {len(rows)} requests, {prompts} with their prompt")
    models = [name.removeprefix("correct_") for name in frame.columns if name.startswith("correct_")]
    heads = " ".join(f"--head {model}=correct_{model}" for model in models)
    if prompts == len(rows):
        typer.echo(f"next: leadline probe fit {out} --prompt prompt {heads} --out FOLDER")
