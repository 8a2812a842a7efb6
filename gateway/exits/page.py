"""Exits on one HTML page: no script, no request to anywhere, light and dark."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.exits.compare import Row
from gateway.exits.fitting import Fitted

_STYLE = """
:root{color-scheme:light dark;--ink:#1b2733;--soft:#5d6b78;--line:#d5dce2;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa7b3;--line:#34414c;--paper:#12181e}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:960px;margin:2rem auto;
padding:0 1rem}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
"""
HEADS = ("Method", "Accuracy", "Gain", "Tokens", "Tokens saved", "CPU saved", "Wall saved", "Left", "Risk", "Harm")


def fit_page(fitted: Fitted, proofs: Sequence[dict[str, Any]]) -> str:
    """What was fitted, what is promised, and whether it holds."""
    manifest = fitted.artifact.manifest
    facts = [
        f"{manifest.model}, effort {manifest.effort}; fitted on {manifest.n_fit} trajectories, calibrated on "
        f"{manifest.n_calibration} others, {manifest.created}.",
        "At cues not seen in fitting: " + ", ".join(f"{k} {v}" for k, v in manifest.metrics.items() if k != "at") + ".",
        "Loss `wrong`: left early and answered wrongly. `harm`: and the whole thought would have been right.",
        *fitted.not_certified,
    ]
    promises = [
        [
            f"{at['delta']:g}, {at['form']}, {at['loss']}", f"{one.threshold:.4f}", f"{at['left']:.1%}",
            f"{at['saved']:.1%}", f"{at['accuracy']:.1%}", f"{at['risk']:.4f}",
        ]
        for one, at in zip(manifest.certified, manifest.metrics["at"], strict=True)
    ]  # fmt: skip
    held = [
        [f"{one['delta']:g}, {one['form']}", f"{one['mean_risk']:.4f}", f"{one['held']:.1%}", f"{one['left']:.1%}"]
        for one in proofs
    ]
    return _page(
        f"Exits of {manifest.model}",
        facts,
        [
            ("Promises", ("Delta, form, loss", "Threshold", "Left", "Tokens saved", "Accuracy", "Risk here"), promises),
            ("Do they hold? Random halves, loss `wrong`", ("Delta, form", "Mean risk", "Held", "Left"), held),
        ],
    )


def compare_page(title: str, rows: Sequence[Row]) -> str:
    """Methods side by side."""
    return _page(title, ["Intervals: 95%, over questions."], [("Beside whole thoughts", HEADS, list(cells(rows)))])


def cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A row of `HEADS` for each method."""
    for row in rows:
        yield [
            row.name,
            _spread(row.accuracy),
            _spread(row.gain, "+"),
            f"{row.tokens:.1f}",
            *(f"{share:.1%}" for share in (row.tokens_saved, row.cpu_saved, row.wall_saved, row.left)),
            *(f"{share:.4f}" for share in (row.risk, row.harm)),
        ]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The same for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        yield "  ".join([first.ljust(widths[0]), *(cell.rjust(at) for cell, at in zip(rest, widths[1:], strict=True))])


def _spread(found: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = found
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _page(
    title: str, facts: Sequence[str], tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
) -> str:
    head = (
        "<head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    for heading, heads, rows in tables:
        body.append(f"<h2>{html.escape(heading)}</h2><div class='scroll'><table>")
        body.append("<tr>" + "".join(f"<th>{html.escape(one)}</th>" for one in heads) + "</tr>")
        body += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        body.append("</table></div>")
    return f"<!doctype html><html lang='en'>{head}<body>{''.join(body)}</body></html>\n"
