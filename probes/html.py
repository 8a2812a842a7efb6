"""`--report`: the page of one command, put together from what it has at hand."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Protocol

import numpy as np

from probes.calibrate import Array
from probes.certify import accept_losses, route_losses, to_last
from probes.evaluate import Row
from probes.manifest import Certificate, Manifest
from probes.page import (
    calibration_section,
    identity_section,
    numbers_section,
    page,
    risk_section,
    routing_section,
    tiles,
)
from probes.table import Table
from probes.train import routing_scores

FIRST = ("APGR", "CPT50", "ECE")


class Named(Protocol):
    """An artifact of any tier."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def version(self) -> str: ...


def probe_report(
    title: str,
    lead: str,
    artifact: "Named",
    source: str,
    table: Table,
    probes: Mapping[str, Array],
    rows: Sequence[Row],
    *,
    certificates: Sequence[Certificate] = (),
    seed: int = 0,
) -> str:
    """Probabilities [n, heads] of one probe or several on a table, NaN where it abstains; the first is `artifact`,
    which the page is about.

    `rows` are the measured numbers; `certificates` those whose loss the table shows. `lead` says where the
    probabilities come from: in one sentence, what a reader must know before the numbers.
    """
    first = next(iter(probes))
    sections = [tiles([row for row in rows if row.metric in FIRST and row.name.partition(":")[0] == first])]
    if (found := routing_scores(table, probes, seed)) is not None:
        routers, both = found
        sections.append(routing_section(routers, table.column("weak")[both], table.column("strong")[both], seed=seed))
    sections += risk_sections(table, probes[first], certificates)
    heads = {}
    for i, name in enumerate(table.names):
        known = ~np.isnan(table.labels[:, i] + probes[first][:, i])
        if known.any() and table.kinds[i] in ("correct", "needs_reasoning"):
            heads[name] = probes[first][known, i], table.labels[known, i]
    sections.append(calibration_section(heads))
    if rows:
        sections.append(numbers_section(rows))
    facts = {"measured on": f"{source}: {len(table.prompts):,} prompts, sha256 {table.sha256()}"}
    sections.append(
        identity_section(artifact.manifest, artifact.version, facts | {"report of": date.today().isoformat()})
    )
    return page(title, lead, sections)


def risk_sections(table: Table, probabilities: Array, certificates: Sequence[Certificate]) -> list[str]:
    """One section for each loss that is certified over heads of this table."""
    sections = []
    for heads in dict.fromkeys(one.heads for one in certificates):
        if not set(heads) <= set(table.names):
            continue
        columns = [table.names.index(head) for head in heads]
        known = ~np.isnan(table.labels[:, columns]).any(1)
        p, y = to_last(probabilities[known][:, columns]), table.labels[known][:, columns]
        if len(heads) == 1:
            scores, losses = p[:, 0], accept_losses(p[:, 0], 1 - y[:, 0])
        else:
            scores, losses = (p[:, :-1] - p[:, -1:]).max(1), route_losses(p, y)
        sections.append(risk_section(losses, scores, [one for one in certificates if one.heads == heads]))
    return sections
