"""`leadline probe score TABLE`: P(correct) and a decision for every row of any table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.errors import CertificateError, ProbeError, TableError
from probes.manifest import BELOW_ALL, Manifest, artifact_folder, default_artifact_path

if TYPE_CHECKING:
    from probes.score import Decide, Prober
    from probes.text import Message

AT_MOST = 0.05


@dataclass(frozen=True, slots=True)
class Decider:
    """What to score with, once it is needed, and what to make of it."""

    probe: "Callable[[], Prober]"
    decide: "Decide"
    says: str
    """The rule in words."""


def score(
    table: Annotated[Path, typer.Argument(help="A .parquet, .csv or .jsonl file.")],
    column: Annotated[str, typer.Option(help="Column of prompts: texts, or conversations as lists or JSON.")],
    out: Annotated[Path, typer.Option(help="The .parquet file to write; a run that was killed goes on beside it.")],
    probe: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_folder, metavar="ARTIFACT", help="Artifact folder, or a shipped one by name; `default`."
        ),
    ] = None,
    encoder: Annotated[str, typer.Option(help="`default`, a folder, or a hub id.")] = "default",
    policy: Annotated[Path | None, typer.Option(help="A policy, whose probe scores and whose routes decide.")] = None,
    at_most: Annotated[
        float | None, typer.Option(help=f"Decide by the artifact's certificate for this loss; {AT_MOST}.")
    ] = None,
    method: Annotated[
        Literal["ltt", "crc"] | None, typer.Option(help="Which kind of certificate; ltt goes first.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Decide by this: the first head if its P is more than so far above the last's.")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="With --threshold: the heads, cheapest first; weak, strong.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to copy; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="With --policy: the model or alias that is asked for.")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write what was counted to this file.")] = None,
) -> None:
    """Write P(correct) per head and the decision for each row of a table. Rows that cannot be read say why."""
    import json

    from gateway.policies import CannotServe
    from probes.cells import read_columns
    from probes.score import file_sha256, score_cells, write_scores, write_whole

    try:
        if out.suffix != ".parquet":
            raise TableError(f"--out {out}: the result is a .parquet file; name it so")
        if out.resolve() == table.resolve():
            raise TableError(f"--out {out}: would replace the table; give another name")
        if policy is not None and (probe, at_most, method, threshold, head) != (None,) * 5:
            raise TableError("--policy decides alone: leave out --probe, --at-most, --method, --threshold and --head")
        with_policy = policy is not None
        decider = (
            _by_policy(policy, model)
            if policy is not None
            else _by_threshold(probe or default_artifact_path(), encoder, at_most, method, threshold, head)
        )
        columns = read_columns(table, [column, *(keep or [])])
        source = {"table": table.name, "table_sha256": file_sha256(table), "column": column}
        sounding = decider.probe()
        taken = {"row", "decision", "rule", "reason", *(f"p_{name}" for name in sounding.heads)}
        for name in keep or []:
            if name in taken:
                raise TableError(f"--keep {name}: the result has a column of that name; rename it in the table")
        rows = score_cells(columns[column], sounding, out, source, progress=True)
        facts = {**source, "probe": sounding.version, "rule": decider.says}
        kept = {name: columns[name] for name in keep or []}
        counts = write_scores(out, rows, columns[column], sounding.heads, decider.decide, kept, facts)
    except (ProbeError, CannotServe) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or out}: {error.strerror}; run it again to go on", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{len(rows)} rows by {sounding.version}: {decider.says}")
    for (name, reason), count in sorted(counts.items(), key=lambda item: (item[0][1] is not None, -item[1])):
        typer.echo(f"  {count:>8}  {name}{'' if reason is None else f', not scored: {reason}'}")
    typer.echo(f"wrote {out}")
    if json_out is not None:
        decisions, reasons = _sums(counts)
        told = {**facts, "rows": len(rows), "decisions": decisions, "not_scored": reasons, "by_policy": with_policy}
        write_whole(json_out, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())


def _sums(counts: Mapping[tuple[str, str | None], int]) -> tuple[dict[str, int], dict[str, int]]:
    """(rows by decision, rows by the reason why they were not scored)."""
    decisions: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for (name, reason), count in counts.items():
        decisions[name] = decisions.get(name, 0) + count
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + count
    return decisions, reasons


def _by_threshold(
    artifact: Path,
    encoder: str,
    at_most: float | None,
    method: Literal["ltt", "crc"] | None,
    threshold: float | None,
    heads: Sequence[str] | None,
) -> Decider:
    """A threshold that is given, or the artifact's certificate; without either, no decision."""
    from probes.manifest import read_manifest
    from probes.score import prober

    manifest = read_manifest(artifact)
    probe = partial(prober, artifact, encoder)
    if threshold is not None:
        if at_most is not None or method is not None:
            raise TableError("--threshold and --at-most both decide; give one of them")
        order = tuple(heads or ("weak", "strong"))
        known = [head.name for head in manifest.heads]
        for name in order:
            if name not in known:
                raise TableError(f"--head {name}: the artifact has {', '.join(known)}; name its heads, cheapest first")
        says = f"first of {', '.join(order[:-1])} more than {threshold:+g} above {order[-1]}, else {order[-1]}"
        return Decider(probe, _choosing(order, threshold), says)
    if heads:
        raise TableError("--head goes with --threshold; a certificate names its own heads")
    bound = AT_MOST if at_most is None else at_most
    found = manifest.certificate_for(bound, method=method)
    if found is None:
        if at_most is None and method is None:
            return Decider(probe, lambda *_: {"decision": None}, f"no decision: {_no_certificate(manifest)}")
        raise CertificateError(f"--at-most {bound:g}: {_no_certificate(manifest)}")
    return Decider(probe, _choosing(found.heads, found.threshold), str(found))


def _no_certificate(manifest: Manifest) -> str:
    known = ", ".join(f"{one.alpha:g} ({one.method})" for one in manifest.certificates) or "none"
    return (
        f"the artifact {manifest.name!r} has no such certificate, only {known}; run `leadline probe certify`, or give "
        "--threshold"
    )


def _choosing(heads: Sequence[str], threshold: float) -> "Decide":
    """As `Certificate.choose`; a row without probabilities goes to the last head, the safe one."""
    *cheaper, last = heads

    def decide(_row: int, _said: object, p: Mapping[str, float] | None) -> Mapping[str, object]:
        if p is None:
            return {"decision": last}
        margin = max(threshold, BELOW_ALL)
        return {"decision": next((one for one in cheaper if p[one] - p[last] > margin), last)}

    return decide


def _by_policy(file: Path, model: str) -> Decider:
    """What the gateway would decide with this policy, these probabilities and nothing down."""
    from gateway.in_order import InOrder
    from gateway.policies import checked_policy
    from gateway.simulate.routed import Caller, query_for
    from probes.text import render
    from probes.types import Estimate
    from routers.decide import decide
    from routers.errors import NoCandidate
    from routers.types import Signals, State

    policy, folder = checked_policy(file, secrets=False)
    if policy.difficulty is None:
        raise TableError(f"--policy {file}: it has no probe; add `signals: {{difficulty: {{probe: default}}}}`")

    def by_policy(row: int, said: "Sequence[Message] | None", p: Mapping[str, float] | None) -> Mapping[str, object]:
        query = query_for("" if said is None else render(said), Caller(model))
        signals = Signals(probe="unavailable")
        if p is not None:
            heads = policy.heads_for(query)
            known = {name: Estimate(p[h], source=f"probe/{h}") for name, h in heads.items() if h in p}
            signals = Signals(p_success=known, probe="ok")
        try:
            decision = decide(query, signals, policy, State(), seed=row)
        except NoCandidate as error:
            if error.kind == "unknown_model":
                raise TableError(f"--model {model}: {error}") from None
            return {"decision": None, "rule": f"refused: {error.kind}"}
        return {"decision": decision.plan.name, "rule": decision.rule}

    return Decider(lambda: InOrder.of(policy, folder), by_policy, f"policy {policy.version_hash} of {file.name}")
