"""The report of a probe as one HTML file: what routing by it buys, whether its numbers are true, what is certified."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from probes.calibrate import Array, brier, ece, reliability
from probes.certify import Losses
from probes.evaluate import Row, error_interval, resamples
from probes.manifest import Certificate, Manifest
from probes.svg import COLOURS, STYLE, Axis, Rule, Series, chart

_STYLE = (
    """
:root{color-scheme:light dark;--ink:#17212b;--soft:#55636f;--line:#dfe5ea;--paper:#fff;--card:#f6f8fa;
--c0:#0b62c4;--c1:#c2410c;--c2:#0f766e;--c3:#86198f;--c4:#a16207;--c5:#475569;--c6:#be123c}
@media (prefers-color-scheme:dark){:root{--ink:#e8eef4;--soft:#9fadba;--line:#2b3742;--paper:#0f151b;--card:#161e26;
--c0:#62a8ff;--c1:#fb923c;--c2:#2dd4bf;--c3:#e879f9;--c4:#facc15;--c5:#94a3b8;--c6:#fb7185}}
*{box-sizing:border-box}body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1060px;margin:2.2rem auto;padding:0 1.2rem}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.4rem 0 .3rem}
p{color:var(--soft);margin:.3rem 0;max-width:75ch}.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem 1rem;min-width:11rem;flex:1}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.86rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem;overflow-x:auto}
h2+figure{max-width:46rem}
figcaption{font-weight:600;margin-bottom:.4rem}figcaption small{font-weight:400;color:var(--soft);display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{text-align:right;padding:.28rem .7rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem}
td small{color:var(--soft)}code{font:.82rem ui-monospace,monospace;overflow-wrap:anywhere;white-space:normal}
.facts{table-layout:fixed}.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{color:var(--soft);width:8rem;min-width:0}
@media print{body{margin:0}figure,.tile{break-inside:avoid}}
"""
    + STYLE
)
POINTS = 120
"""Of a drawn curve."""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole file: nothing in it is fetched from anywhere."""
    name = f"<meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{name}<style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1><p>{escape(lead)}</p>{''.join(sections)}</main></body></html>\n"
    )


def tiles(rows: Sequence[Row]) -> str:
    """The few numbers to see first."""
    out = []
    for row in rows:
        spread = "" if row.low is None or row.high is None else f"<br>95%: {row.low:.3f} to {row.high:.3f}"
        out.append(f"<div class='tile'><span>{escape(row.name)}: {escape(row.metric)}</span><b>{row.value:.3f}</b>")
        out.append(f"<span>{escape(row.unit)}{spread}</span></div>")
    return f"<div class='tiles'>{''.join(out)}</div>" if out else ""


def routing_section(routers: Mapping[str, Array], weak: Array, strong: Array, *, seed: int = 0) -> str:
    """Accuracy against the share of strong calls, for the first router (ours, with an interval) and all others."""
    names = list(routers)
    lines = [Series(name, _curve(routers[name], weak, strong), (i + 1) % COLOURS) for i, name in enumerate(names[1:])]
    ours = routers[names[0]]
    draws = np.array([[y for _, y in _curve(ours[i], weak[i], strong[i])] for i in resamples(len(weak), 200, seed)])
    line = _curve(ours, weak, strong)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    band = [(x, float(a), float(b)) for (x, _), a, b in zip(line, low, high, strict=True)]
    every = [*lines, Series(names[0], line, 0, heavy=True, band=band)]
    ys = [y for one in every for _, y in one.points]
    said = f"{names[0]}: " + ", ".join(f"{y:.1%} right at {x:.0%} strong calls" for x, y in line[:: POINTS // 4])
    drawn = chart(
        said,
        Axis("queries that go to the strong model", 0.0, 1.0),
        Axis("answers that are right", *_around(ys)),
        every[::-1],
        rules=[Rule(float(weak.mean()), "always weak"), Rule(float(strong.mean()), "always strong", at_left=True)],
    )
    caption = (
        f"<figcaption>Quality against cost<small>{len(weak):,} queries; band: 95% by bootstrap</small></figcaption>"
    )
    return f"<h2>What routing buys</h2><figure>{caption}{drawn}</figure>"


def _curve(scores: Array, weak: Array, strong: Array) -> list[tuple[float, float]]:
    """(share of strong calls, accuracy) as the threshold falls; straight across equal scores."""
    order = np.argsort(-scores, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((strong - weak)[order])]) / len(order)
    ends = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0, [True]]))
    share = np.linspace(0.0, 1.0, POINTS + 1)
    accuracy = float(weak.mean()) + np.interp(share, ends / len(order), gain[ends])
    return list(zip(share.tolist(), accuracy.tolist(), strict=True))


def calibration_section(heads: Mapping[str, tuple[Array, Array]]) -> str:
    """For each head, (probabilities, labels): how often what it calls likely comes true, in bins of equal count."""
    figures = []
    for name, (p, y) in heads.items():
        bins = reliability(p, y)
        points = [(one.mean, one.share) for one in bins]
        bars = [(one.mean, one.share_low, one.share_high) for one in bins]
        said = f"{name}: " + ", ".join(f"said {one.mean:.0%}, right {one.share:.0%} of {one.n}" for one in bins)
        drawn = chart(
            said,
            Axis("what the probe says", 0.0, 1.0),
            Axis("answers that are right", 0.0, 1.0),
            [Series("", points, 0, heavy=True, line=False, band=bars)],
            diagonal=True,
        )
        values = np.array([ece(p[i], y[i]) for i in resamples(len(y), 200, 0)])
        error = ece(p, y)
        low, high = error_interval(error, list(values))
        worth = f"ECE {error:.3f} ({low:.3f} to {high:.3f}), Brier {brier(p, y):.3f} of a constant's "
        worth += f"{y.mean() * (1 - y.mean()):.3f}, {len(y):,} labels"
        figures.append(f"<figure><figcaption>{escape(name)}<small>{worth}</small></figcaption>{drawn}</figure>")
    note = "Bins of equal count; bars are 95% intervals of the share. On the dotted line what is said comes true."
    return f"<h2>Whether its numbers are true</h2><p>{note}</p><div class='charts'>{''.join(figures)}</div>"


def risk_section(losses: Losses, scores: Array, certificates: Sequence[Certificate]) -> str:
    """The loss on these rows against the share that the cheaper head keeps, and what of it is certified.

    `scores` [n]: a row is kept at threshold t iff its score is above t.
    """
    thresholds = np.unique(np.quantile(scores, np.linspace(0.0, 1.0, POINTS + 1)))[::-1]
    line = [(float((scores > t).mean()), losses.risk(float(t))) for t in thresholds]
    every = losses.risk(-np.inf)
    line = [*line, (1.0, every)]
    reach = [1.96 * float(np.sqrt(risk * (1 - risk) / losses.n)) for _, risk in line]
    band = [(x, max(0.0, risk - half), risk + half) for (x, risk), half in zip(line, reach, strict=True)]
    marks = [
        Series(
            {"ltt": "certified with confidence", "crc": "certified on average"}[method],
            [(float((scores > one.threshold).mean()), one.risk) for one in certificates if one.method == method],
            colour,
            heavy=True,
            line=False,
        )
        for method, colour in (("ltt", 2), ("crc", 1))
        if any(one.method == method for one in certificates)
    ]
    alphas = sorted({one.alpha for one in certificates})
    top = max([every, *alphas]) * 1.12 or 0.1
    said = "; ".join(f"{one}: keeps {one.shares[one.heads[0]]:.0%}, loses {one.risk:.1%}" for one in certificates)
    drawn = chart(
        said,
        Axis(f"queries kept by {certificates[0].heads[0]}", 0.0, 1.0),
        Axis("loss", 0.0, top),
        [Series("loss on these rows", line, 0, heavy=True, band=band), *marks],
        rules=[Rule(alpha, f"{alpha:.0%}") for alpha in alphas],
    )
    caption = f"<figcaption>Loss against what is kept<small>{losses.n:,} rows; band: 95%</small></figcaption>"
    return f"<h2>What is certified</h2><figure>{caption}{drawn}</figure>{certificate_table(certificates)}"


def certificate_table(certificates: Sequence[Certificate]) -> str:
    heads = ["promise", "threshold", "loss on the rows", *(f"to {head}" for head in certificates[0].shares)]
    body = [
        [
            escape(str(one)),
            f"{one.threshold:+.4f}",
            f"{one.risk:.2%}",
            *(f"{share:.1%}" for share in one.shares.values()),
        ]
        for one in certificates
    ]
    return _table(heads, body)


def numbers_section(rows: Sequence[Row]) -> str:
    """Every measured row; names that were measured alike share a table."""
    measured: dict[str, list[Row]] = {}
    for row in rows:
        measured.setdefault(row.name, []).append(row)
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for name, found in measured.items():
        line = [escape(name), *map(_cell, found)]
        tables.setdefault(tuple(f"{row.metric}, {row.unit}" if row.unit else row.metric for row in found), []).append(
            line
        )
    body = (_table(["", *metrics], lines) for metrics, lines in tables.items())
    return f"<h2>Numbers</h2><p>Small: 95% intervals, by paired bootstrap.</p>{'<br>'.join(body)}"


def _cell(row: Row) -> str:
    value = f"{row.value:,.0f}" if row.metric == "n" else f"{row.value:.4f}"
    if row.low is None or row.high is None:
        return value
    return f"{value}<br><small>{row.low:.3f} to {row.high:.3f}</small>"


def identity_section(manifest: Manifest, version: str, table: Mapping[str, str]) -> str:
    """What was measured on what, by digests."""
    facts = {
        "artifact": f"<code>{escape(version)}</code>",
        "tensors": f"<code>{manifest.tensors_sha256}</code>",
        "encoder": f"{escape(manifest.encoder)} <code>{manifest.encoder_sha256}</code>",
        "fitted on": f"{manifest.n:,} prompts <code>{manifest.data_sha256}</code>, {escape(manifest.created)}",
        **{name: escape(value) for name, value in table.items()},
        "libraries": escape(", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    }
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in facts.items())
    return f"<h2>What this is about</h2><table class='facts'>{rows}</table>"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, row: Sequence[str]) -> Iterator[str]:
        return (f"<{tag}>{cell}</{tag}>" for cell in row)

    lines = "".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in body)
    head = "".join(cells("th", list(map(escape, heads))))
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _around(values: Sequence[float]) -> tuple[float, float]:
    """An axis with a little room on either side."""
    low, high = min(values), max(values)
    room = (high - low) * 0.07 or 0.05
    return max(0.0, low - room), min(1.0, high + room)
