"""`leadline replay POLICY`: a new policy over the ledger's history, before anybody is served by it."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.moments import moment

if TYPE_CHECKING:
    from gateway.replay.estimate import Evaluation
    from gateway.replay.history import Replay


def replay(
    file: Annotated[Path, typer.Argument(metavar="POLICY", help="Policy file.")],
    since: Annotated[str, typer.Option(help="How far back (7d, 12h), or a moment (2026-11-01).")] = "30d",
    until: Annotated[str | None, typer.Option(help="Up to then, in the same words. Default: now.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of one tenant alone.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Say what a policy would have cost, got right and taken on the requests in the ledger, and how sure that is.

    Where the policy in force explored, the answer is an estimate with an interval; elsewhere it is arithmetic on the
    same tokens, and says so. Nothing is called.
    """
    from rich.console import Console

    from gateway.ledger.store import LedgerUnreachable, connect
    from gateway.policies import CannotServe, checked_policy
    from gateway.replay.history import Span
    from gateway.replay.history import replay as run
    from gateway.settings import Settings, SettingsError

    now_ms = time.time_ns() // 1_000_000
    try:
        policy, _ = checked_policy(file, secrets=False)
        span = Span(
            moment("--since", since, now_ms), now_ms if until is None else moment("--until", until, now_ms), tenant
        )
        if span.since_ms >= span.until_ms:
            raise typer.BadParameter(f"--since {since}: not before --until")
        settings = Settings.from_env()
        settings.prepare_home()
        engine = connect(settings.database_url, settings.durability)
    except (CannotServe, SettingsError, LedgerUnreachable) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        found = run(engine, policy, span)
    finally:
        engine.dispose()
    console = Console()
    for line in lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if json_out is not None:
        told = {"policy": {"file": file.name, "version": policy.version_hash}, **asdict(found)}
        json_out.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lines(found: "Replay") -> list[str]:
    """For a person, one fact per line."""
    from gateway.replay.estimate import MIN_ROWS

    out = [f"{found.rows} requests replayed; {found.same} would be decided the same, whatever is explored"]
    out += [f"  left out: {count}, {why}" for why, count in found.skipped.items()]
    if found.refused:
        out.append(f"  refused: {found.refused}, which cost nothing and answer nothing")
    if found.supported:
        out.append(f"Estimated on {found.supported} of them (doubly robust, 95% interval; models are matched by name):")
        too_few = found.supported < MIN_ROWS
        few = f"{found.supported} requests are too few: it takes {MIN_ROWS}" if too_few else ""
        out += [_estimated(name, estimate, few) for name, estimate in found.estimates.items()]
    repriced = found.repriced
    if repriced is not None:
        out.append(
            f"Repriced on the other {repriced.n}, where the new policy does what was not tried: arithmetic on the same "
            "tokens, not an estimate, as another model writes other answers of other lengths:"
        )
        if repriced.cost_before is None or repriced.cost_after is None:
            out.append("  cost per 1,000: not known, none of them has a price")
        else:
            out.append(f"  cost per 1,000: {_usd(repriced.cost_before)} then, {_usd(repriced.cost_after)} repriced")
        if 0 < repriced.unpriced < repriced.n:
            out.append(f"  {repriced.unpriced} of them have no price, and are in neither sum")
        if repriced.predicted_before is not None and repriced.predicted_after is not None:
            was, now = repriced.predicted_before, repriced.predicted_after
            some = f" (of {repriced.predicted} of them)" if repriced.predicted < repriced.n else ""
            out.append(f"  P(success) as the probe predicts it, not as measured{some}: {was:.3f} then, {now:.3f} now")
        out.append("  latency: not known")
        out.append("  To have an estimate there, let a share of the route's requests explore (`explore:` of a route).")
    return out


def _estimated(name: str, found: "Evaluation | None", few: str) -> str:
    """`few`: that the requests are too few for any estimate, in words; empty: they are not."""
    if found is None:
        unknown = {"quality": "too few of these requests were rated", "cost": "too few of them have a price"}
        return f"  {name}: not known, {few or unknown[name]}"
    show: Mapping[str, Any] = {"cost": _usd, "quality": "{:.3f}".format, "latency": "{:.0f} ms".format}
    told, change = show[name], found.change
    label = {"cost": "cost per 1,000", "quality": f"quality (of {found.n} rated)", "latency": "latency"}[name]
    clipped = f", {found.clipped:.1%} of weights cut" if found.clipped else ""
    clipped += "; so few that the interval is rough" if found.rough else ""
    return (
        f"  {label}: {told(found.before.value)} then, {told(found.after.value)} "
        f"({told(found.after.low)} to {told(found.after.high)}) now, a change of {told(change.value)} "
        f"({told(change.low)} to {told(change.high)}); weights worth {found.effective_n:.0f} rows, "
        f"the largest {found.largest_weight:.3g}{clipped}"
    )


def _usd(nanousd: float) -> str:
    """Of 1,000 requests."""
    dollars = nanousd * 1e-6
    return f"{'-' if dollars < 0 else ''}${abs(dollars):.4g}"
