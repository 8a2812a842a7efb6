"""`leadline check | explain | diff | schema`: what a policy file says and means. Each imports what it needs."""

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from routers.units import format_money

if TYPE_CHECKING:
    from gateway.history import Replayed
    from gateway.upstream.types import CallHeaders
    from routers.diff import Moved
    from routers.policy import Policy
    from routers.types import Query, Signals, State

PolicyPath = Annotated[Path, typer.Argument(help="Policy file.")]
MAX_SAMPLES_SHOWN = 4
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def add_to(app: typer.Typer) -> None:
    for command in (check, explain, diff, schema):
        app.command()(command)


def check(file: PolicyPath, as_json: AsJson = False) -> None:
    """Load a policy file strictly: every problem with its line and its fix, or a summary and what may not be meant."""
    from gateway.checks import callers_of, notes
    from gateway.guarantees import with_certificates
    from gateway.ledger.prices import price_list
    from gateway.policies import located, unloadable
    from gateway.settings import Settings, SettingsError

    policy = load(file)
    folder = file.parent.absolute()
    if wrong := located([*unloadable(policy, folder), *with_certificates(policy, folder)[1]], file):
        stop("\n".join(wrong))
    try:
        callers = callers_of(Settings.from_env().database_url)
    except (ModuleNotFoundError, SettingsError):
        callers = None
    found = located(notes(policy, callers), file)
    sizes = {name: len(getattr(policy, name)) for name in ("providers", "models", "routes", "limits")}
    if as_json:
        typer.echo(json.dumps({"version": policy.version_hash, **sizes, "notes": found}, indent=2))
        return
    typer.echo(f"{file}: ok, version {policy.version_hash}: {', '.join(f'{n} {name}' for name, n in sizes.items())}")
    typer.echo(f"prices that it leaves out: {price_list().source}")
    for sentence in found:
        typer.echo(f"note: {sentence}")


def explain(
    file: PolicyPath,
    prompt: Annotated[str | None, typer.Argument(help="The user's message; or --request.")] = None,
    model: Annotated[str, typer.Option(help="The model or alias that a caller would name.")] = "auto",
    tag: Annotated[list[str] | None, typer.Option(help="A tag of the request; may be repeated.")] = None,
    tenant: Annotated[str, typer.Option(help="The tenant of the caller's key.")] = "default",
    key: Annotated[str, typer.Option(help="The name of the caller's key.")] = "",
    team: Annotated[str | None, typer.Option(help="The team of the caller's key.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The caller's own cap.")] = None,
    at: Annotated[str | None, typer.Option(help="When, such as 2026-11-21T22:30+01:00; UTC without a zone.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="'NAME: VALUE', as a caller sends; may be repeated.")] = None,
    request: Annotated[
        str | None, typer.Option(help="A request of the ledger, by its id, in place of a prompt.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the policy would decide, and why each other candidate lost and each other route did not take it.

    Nothing runs but the probe. With --request: what was decided then, and what this policy would decide now.
    """
    from gateway.guarantees import with_certificates

    policy, _ = with_certificates(load(file), file.parent)
    if (prompt is None) == (request is None):
        stop("give a prompt, or --request with the id of a request of the ledger")
    if request is not None:
        _explain_past(policy, request, as_json)
        return
    from routers.cost import PROMPT_MARGIN
    from routers.seeds import UNEXPLORED
    from routers.types import Query, State

    sent = _sent(header, policy) if header else None
    body = json.dumps([{"role": "user", "content": prompt}], ensure_ascii=False).encode()
    query = Query(
        model=model,
        tenant=tenant,
        input_tokens_estimate=-(-len(body) // 4),
        input_tokens_max=len(body) + PROMPT_MARGIN,
        max_output_tokens=max_tokens,
        tags=frozenset(tag or ()) | (sent.tags if sent is not None else frozenset()),
        session=sent.session if sent is not None else None,
        run=sent.scope if sent is not None else None,
        hints=sent.hints if sent is not None else None,
        key=key,
        team=team,
        id="explain",
        at_ms=_moment(at),
    )
    assert prompt is not None
    signals = _probe_signals(policy, query, prompt, file.parent)
    _say(_told(policy, query, signals, State(now_ms=query.at_ms), UNEXPLORED), as_json)


def diff(
    old: Annotated[Path, typer.Argument(help="Policy file, as it was.")],
    new: Annotated[Path, typer.Argument(help="Policy file, as it is to be.")],
    hours: Annotated[float, typer.Option(min=0, help="How much of the ledger's history to decide anew.")] = 720,
    as_json: AsJson = False,
) -> None:
    """Say what changed in meaning between two policies, and which requests would get another model.

    Exits with 1 where something changed, as diff does.
    """
    from routers.diff import changes, sample_changes

    before, after = load(old), load(new)
    found = changes(before, after)
    samples, asked = sample_changes(before, after)
    replayed, why = _over_history(before, after, hours)
    if as_json:
        history = None
        if replayed is not None:
            moved = [{"before": a, "after": b, "requests": n} for (a, b), n in replayed.changed.most_common()]
            history = {"requests": replayed.requests, "changed": moved}
        typer.echo(
            json.dumps(
                {
                    "changes": [asdict(change) for change in found],
                    "samples": {"asked": asked, "changed": [asdict(sample) for sample in samples]},
                    "history": history,
                },
                indent=2,
            )
        )
    else:
        for change in found:
            typer.echo(str(change))
        typer.echo(f"{len(found)} changes in meaning; {len(samples)} of {asked} sample requests get another model")
        for line in _grouped(samples):
            typer.echo(f"  {line}")
        if replayed is None:
            typer.echo(f"history: {why}")
        else:
            from gateway.history import AS_THEN

            typer.echo(
                f"history: {replayed.changed.total()} of the newest {replayed.requests} requests, of the last "
                f"{hours:g} hours, get another model, {AS_THEN}"
            )
            for (a, b), count in replayed.changed.most_common():
                typer.echo(f"  {count}: {a} -> {b}")
    raise typer.Exit(1 if found else 0)


def schema() -> None:
    """Print the JSON Schema of a policy file, for editors."""
    from routers.schema import policy_schema

    typer.echo(json.dumps(policy_schema(), indent=2, ensure_ascii=False))


def load(file: Path | None) -> "Policy":
    """The policy; ends the command with all of its problems where it has some."""
    from gateway.policies import load_policy
    from routers.errors import PolicyError

    try:
        return load_policy(file)
    except PolicyError as error:
        stop(str(error))
    except OSError as error:
        stop(f"{file}: cannot be read ({error.strerror})")


def stop(message: str) -> NoReturn:
    """End the command with a message."""
    typer.echo(message, err=True)
    raise typer.Exit(os.EX_DATAERR)


def _over_history(before: "Policy", after: "Policy", hours: float) -> "tuple[Replayed | None, str]":
    """What the ledger's requests would get; or None, and why that is not known."""
    from gateway.settings import Settings, SettingsError

    since_ms = int((time.time() - hours * 3600) * 1000)
    try:
        from gateway.history import over_history

        return over_history(Settings.from_env(), before, after, since_ms), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed; install leadline[server]"
    except (SettingsError, LookupError) as error:
        return None, str(error)


def _grouped(samples: "list[Moved]") -> list[str]:
    """One line for each pair of plans, the most frequent first, with the first few of its queries."""
    groups: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        groups.setdefault((sample.before, sample.after), []).append(sample.query)
    lines = []
    for (before, after), queries in sorted(groups.items(), key=lambda item: -len(item[1])):
        more = f"; and {len(queries) - MAX_SAMPLES_SHOWN} more" if len(queries) > MAX_SAMPLES_SHOWN else ""
        lines.append(f"{len(queries)}: {before} -> {after} ({'; '.join(queries[:MAX_SAMPLES_SHOWN])}{more})")
    return lines


def _explain_past(policy: "Policy", request_id: str, as_json: bool) -> None:
    from gateway.history import APPROXIMATE, AS_THEN, past_request
    from gateway.settings import Settings, SettingsError
    from routers.explain import to_dict, to_lines
    from routers.seeds import UNEXPLORED

    try:
        past = past_request(Settings.from_env(), request_id)
    except (SettingsError, LookupError) as error:
        stop(str(error))
    if past is None:
        stop(f"--request {request_id!r}: the ledger has no such request")
    seed = past.decision.seed if past.decision is not None else UNEXPLORED
    told = _told(policy, past.query, past.signals, past.state, seed)
    how = AS_THEN if past.exact else APPROXIMATE
    if as_json:
        then = to_dict(past.decision) if past.decision is not None else None
        typer.echo(json.dumps({"then": then, "now": told.data, "how": how}, indent=2))
        return
    row = past.row
    cost = "unpriced" if row["cost_nanousd"] is None else format_money(row["cost_nanousd"])
    typer.echo(f"then, {datetime.fromtimestamp(row['created_at_ms'] / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC:")
    typer.echo(f"  {row['outcome']} ({row['http_status']}), served by {row['model_served'] or 'none'}, cost {cost}")
    for line in to_lines(past.decision) if past.decision is not None else ["nothing was decided"]:
        typer.echo(f"  {line}")
    typer.echo(f"now, by policy {policy.version_hash} ({how}):")
    for line in told.lines:
        typer.echo(f"  {line}")


class _Told(NamedTuple):
    lines: list[str]
    data: dict[str, Any]
    decided: bool


def _told(policy: "Policy", query: "Query", signals: "Signals", state: "State", seed: int) -> _Told:
    """The decision with all that led to it, for people and for programs."""
    from routers.decide import decide
    from routers.errors import NoCandidate
    from routers.explain import signal_lines, to_dict, to_lines
    from routers.facts import route_facts

    facts = route_facts(policy, query)
    measured = signal_lines(signals)
    lines = [*measured, *(str(fact) for fact in facts)]
    data: dict[str, Any] = {"signals": measured, "routes": [fact._asdict() for fact in facts]}
    try:
        decision = decide(query, signals, policy, state, seed)
    except NoCandidate as error:
        refusal = {"kind": error.kind, "reasons": dict(error.reasons)}
        return _Told([*lines, f"refused: {error}"], {**data, "refused": refusal}, False)
    return _Told(
        [*to_lines(decision, (policy, query)), *lines], {"decision": to_dict(decision, (policy, query)), **data}, True
    )


def _say(told: _Told, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(told.data, indent=2))
    else:
        for line in told.lines:
            typer.echo(line, err=not told.decided)
    if not told.decided:
        raise typer.Exit(os.EX_DATAERR)


def _sent(headers: list[str], policy: "Policy") -> "CallHeaders":
    from gateway.edge.headers import read_headers
    from gateway.errors import InvalidRequest
    from gateway.query import must_know

    try:
        sent = read_headers([_header(text) for text in headers])
        must_know(policy, sent.hints)
        return sent
    except InvalidRequest as error:
        stop(f"--header: {error}")


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        stop(f"--header {text!r}: write 'NAME: VALUE', such as 'x-leadline-effort: low'")
    return name.strip().lower().encode(), value.strip().encode()


def _moment(text: str | None) -> int:
    """Milliseconds since 1970 UTC; None: now."""
    if text is None:
        return time.time_ns() // 1_000_000
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        stop(f"--at {text!r}: not a time; write it as 2026-11-21T22:30 or 2026-11-21T22:30+01:00")
    return int((moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _probe_signals(policy: "Policy", query: "Query", prompt: str, folder: Path) -> "Signals":
    """What the policy's probes say of one prompt, in this process; absent where what they need is not installed."""
    from probes.errors import ProbeError
    from routers.types import Signals

    heads = policy.heads_for(query)
    if not heads or policy.difficulty is None:
        return Signals()
    try:
        from gateway.in_order import InOrder
    except ModuleNotFoundError as error:
        typer.echo(f"note: no probe here ({error.name} is not installed); install leadline[local]", err=True)
        return Signals(probe="unavailable")
    try:
        (found,) = InOrder.of(policy, folder).sound([[{"role": "user", "content": prompt}]], heads)
    except ProbeError as error:
        stop(f"signals.difficulty.probe: {error}")
    return found
