"""`leadline probe certify | compare`: commands that use fitted artifacts. Heavy imports stay inside commands."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.cli import (
    DropIf,
    EncoderName,
    Head,
    JsonOut,
    Prompt,
    Report,
    Seed,
    TablePath,
    _explained,
    _parse_heads,
    _write_report,
    app,
)
from probes.manifest import ARTIFACTS, artifact_folder

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from probes.certify import Horizon, Method
    from probes.compare import Compared
    from probes.manifest import Certificate

__all__ = ["app"]

SHARED = 0.05
"""Of the rows, the share that an artifact may have been fitted on: real tables hold repetitions."""


ArtifactPath = Annotated[
    Path, typer.Argument(parser=artifact_folder, metavar="ARTIFACT", help="Folder of a fitted artifact.")
]
CertifiedHeads = Annotated[
    list[str],
    typer.Option(
        "--head",
        help="NAME=COLUMN, repeatable, cheapest first: a head and its 0/1 label. Several are routed between; one is "
        "accepted or not.",
    ),
]


@app.command()
def certify(
    artifact: ArtifactPath,
    table: TablePath,
    prompt: Prompt,
    head: CertifiedHeads,
    alpha: Annotated[list[float] | None, typer.Option(help="Bound on the loss, repeatable; 0.02, 0.05, 0.1.")] = None,
    method: Annotated[
        Literal["both", "ltt", "crc"], typer.Option(help="`ltt`: with confidence 1 - delta; `crc`: on average.")
    ] = "both",
    delta: Annotated[float, typer.Option(help="Chance that an ltt certificate does not hold.")] = 0.05,
    horizon: Annotated[
        int | None,
        typer.Option(
            min=0, help="Queries whose realised loss ltt bounds; as many as there are rows. 0: the expected loss."
        ),
    ] = None,
    known_only: Annotated[
        bool, typer.Option(help="Leave out rows without a label; only if that does not depend on the answer.")
    ] = False,
    drop_if: DropIf = None,
    encoder: EncoderName = "default",
    json_out: JsonOut = None,
    report: Report = None,
) -> None:
    """Certify thresholds on rows that the artifact was not fitted on, and store them in its probe.json."""
    with _explained():
        from probes.certify import ALPHAS, METHODS, issue, require_rows, to_last
        from probes.errors import CertificateError, TableError
        from probes.manifest import write_manifest
        from probes.report import console
        from probes.scored import opened, scored
        from probes.table import read_table

        heads = _parse_heads(head)
        probe = opened(artifact)
        if artifact.parent == ARTIFACTS:
            raise TableError(
                f"{artifact.name} ships with Leadline, and an update would take your certificates away: copy {artifact}"
                " to a folder of your own, certify that, and name it in the policy"
            )
        data = read_table(table, prompt, heads, drop_if=drop_if)
        if known_only:
            data = data.labelled()
        missing = int((data.labels != data.labels).any(1).sum())
        if missing:
            raise TableError(
                f"{table}: {missing} of {len(data.prompts)} rows lack a label of {' or '.join(heads.values())}; label "
                "them, or give --known-only if whether a row is labelled does not depend on the answer"
            )
        whole = len(data.prompts) if data.sha256() == probe.manifest.data_sha256 else 0
        shared = max(whole, probe.manifest.seen(data.prompts))
        known = f"{probe.version} was fitted on about {shared} of these {len(data.prompts)} prompts"
        if shared > SHARED * len(data.prompts):
            raise TableError(f"{table}: {known}, whose scores prove nothing; certify on other rows")
        if shared:
            typer.echo(f"warning: {known}: the promise is a little weaker", err=True)
        promises: list[tuple[float, Method, Horizon]] = []
        for bound in alpha or ALPHAS:
            for how in METHODS if method == "both" else (method,):
                over: Horizon = "rows" if horizon is None or how == "crc" else horizon or None
                try:
                    require_rows(len(data.prompts), bound, how, delta, over)
                except CertificateError as error:
                    if alpha:
                        raise
                    typer.echo(f"no certificate for alpha {bound:g} ({how}): {error}", err=True)
                else:
                    promises.append((bound, how, over))
        if not promises:
            raise CertificateError("nothing can be certified; see the reasons above")
        said = scored(data, probe, encoder, progress=True)
        if (silent := int((said != said).any(1).sum())) == len(said):
            raise CertificateError(
                f"{probe.version} abstains from all {silent} rows: there is no answer of it to prove anything of; "
                "certify on rows like those that it was fitted on"
            )
        if silent:
            typer.echo(f"note: {probe.version} abstains from {silent} rows, which stay with the last head", err=True)
        p = to_last(said)
        issued = [
            issue(
                p, data.labels, data.names, alpha=bound, method=how, delta=delta, horizon=over,
                rows="held_out", data_sha256=data.sha256(), manifest=probe.manifest,
            )
            for bound, how, over in promises
        ]  # fmt: skip
        for one in issued:
            kept = one.shares if len(one.heads) == 1 else {head: one.shares[head] for head in one.heads[:-1]}
            if not any(kept.values()):
                why = f"nothing can be kept at {' or '.join(kept)} with a loss of at most {one.alpha:g} ({one.method})"
                typer.echo(f"note: {why}: this certificate is true and saves nothing", err=True)
        write_manifest(probe.manifest.certified(issued), artifact)
        if report is not None:
            from probes.html import probe_report

            lead = f"Certified on {len(data.prompts):,} rows of {table.name} that the artifact was not fitted on."
            _write_report(
                report,
                probe_report(
                    f"Certificates of {probe.version}", lead, probe, table.name, data, {probe.version: said}, (),
                    certificates=issued,
                ),
            )  # fmt: skip
    console().print(_certificate_table(f"{probe.version}, certified on {len(data.prompts)} rows", issued))
    if json_out is not None:
        rows = [one.model_dump(mode="json") for one in issued]
        json_out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"wrote {len(issued)} certificates to {artifact}")


def _certificate_table(title: str, certificates: "list[Certificate]") -> "RichTable":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for header in ("alpha", "method", "threshold", "loss on the rows"):
        table.add_column(header, justify="right" if header != "method" else "left", no_wrap=True)
    for header in certificates[0].shares:
        table.add_column(f"to {header}", justify="right")
    for one in certificates:
        shares = [f"{share:.1%}" for share in one.shares.values()]
        table.add_row(f"{one.alpha:g}", one.method, f"{one.threshold:+.4f}", f"{one.risk:.4f}", *shares)
    return table


@app.command()
def compare(
    table: TablePath,
    artifact: Annotated[
        list[Path],
        typer.Argument(
            parser=artifact_folder,
            metavar="ARTIFACT...",
            help="Artifact folders, or shipped ones by name, such as `default`; each is held against the first.",
        ),
    ],
    prompt: Prompt,
    head: Head,
    at_most: Annotated[float, typer.Option(help="Also compare what their certificates for this loss keep.")] = 0.05,
    drop_if: DropIf = None,
    encoder: EncoderName = "default",
    seed: Seed = 0,
    json_out: JsonOut = None,
) -> None:
    """Put several artifacts side by side on rows that none was fitted on, with paired intervals."""
    with _explained():
        from probes.compare import compare as compared
        from probes.errors import TableError
        from probes.report import console
        from probes.scored import opened, scored
        from probes.table import read_table

        probes = [opened(folder) for folder in artifact]
        versions = [probe.version for probe in probes]
        if len(probes) < 2 or len(set(versions)) < len(versions):
            raise TableError(f"{', '.join(versions)}: give two artifacts or more, each of them once")
        data = read_table(table, prompt, _parse_heads(head), drop_if=drop_if)
        scores = {probe.version: scored(data, probe, encoder, progress=True) for probe in probes}
        certificates = [probe.manifest.certificate_for(at_most, heads=("weak", "strong")) for probe in probes]
        rows = compared(data, scores, certificates, seed=seed)
        seen = [probe.version for probe in probes if probe.manifest.seen(data.prompts)]
    if seen:
        typer.echo(f"warning: {', '.join(seen)} was fitted on some of these prompts: this flatters it", err=True)
    console().print(_comparison(f"{len(data.prompts)} prompts of {table.name}", versions, rows))
    if json_out is not None:
        told = {"artifacts": versions, "measures": [row.to_json() for row in rows]}
        json_out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _comparison(title: str, versions: list[str], rows: "list[Compared]") -> "RichTable":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("measure", no_wrap=True)
    for version in versions:
        table.add_column(version, justify="right")
    for row in rows:
        cells = [f"{row.values[0]:.4f}"]
        for value, (gap, low, high) in zip(row.values[1:], row.differences, strict=True):
            cells.append(f"{value:.4f}\n{gap:+.4f} [{low:+.4f}, {high:+.4f}]")
        better = f" ({row.better} is better)" if row.better else ""
        table.add_row(f"{row.measure}{better}", *cells)
    return table
