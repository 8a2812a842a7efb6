"""The report of a simulation as one HTML file: no script, no request to anywhere, light and dark."""

import html
import math
from collections.abc import Iterator, Sequence

from gateway.simulate.compare import Measured
from gateway.simulate.run import Simulation

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52
_STYLE = """
:root{color-scheme:light dark;--ink:#1b2733;--soft:#5d6b78;--line:#d5dce2;--paper:#fff;--ours:#0b6bcb;--theirs:#8a5a00}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa7b3;--line:#34414c;--paper:#12181e;--ours:#58a6ff;
--theirs:#e3b341}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:960px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem}small{color:var(--soft)}
tr.ours td{font-weight:600;color:var(--ours)}.scroll{overflow-x:auto}
svg{width:100%;height:auto}svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}
.grid{stroke:var(--line)}.curve{fill:none;stroke:var(--ours);stroke-width:2}
.ours{fill:var(--ours)}.theirs{fill:var(--theirs)}.bar{stroke:var(--theirs)}.bar.us{stroke:var(--ours)}
"""


def page(title: str, found: Simulation) -> str:
    """The whole file."""
    measured = found.measured
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in found.facts)]
    if measured[0].cost is not None:
        caption = "The line: what the policy's signals reach at other prices of a mistake. Bars: 95% intervals."
        body += ["<h2>Cost and quality</h2>", _plot(measured, found.curve), f"<p>{caption}</p>"]
    body += ["<h2>Beside every baseline</h2>", *_table(measured)]
    body.append("<p>Baselines with a dial spend exactly what the policy does; what learns does so out of fold. ")
    body.append("Gain and saving are the policy's against that row, on the same resamples.</p>")
    body.append("<h2>What decided</h2><div class='scroll'><table><tr><th>Rule</th><th>Queries</th></tr>")
    body += [f"<tr><td>{html.escape(rule)}</td><td>{count}</td></tr>" for rule, count in found.rules]
    body.append("</table></div>")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}"
    head = f"<head>{head}</title><style>{_STYLE}</style></head>"
    return f"<!doctype html><html lang='en'>{head}<body>{''.join(body)}</body></html>\n"


def _table(measured: Sequence[Measured]) -> Iterator[str]:
    models = list(measured[0].share)
    heads = ["Router", "Accuracy", "$ per 1,000", *models, "Policy gains", "Policy saves"]
    yield f"<div class='scroll'><table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in heads)}</tr>"
    for index, found in enumerate(measured):
        cells = [
            html.escape(found.name),
            _spread(found.accuracy, "{:.1%}"),
            _spread(found.cost, "{:.4g}"),
            *(f"{found.share[model]:.0%}" for model in models),
            _spread(found.gain, "{:+.1%}"),
            _spread(found.saving, "{:.0%}"),
        ]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        yield f"<tr{' class=ours' if not index else ''}>{row}</tr>"
    yield "</table></div>"


def _spread(found: tuple[float, float, float] | None, form: str) -> str:
    if found is None:
        return "–"
    value, low, high = (form.format(number) if math.isfinite(number) else "–" for number in found)
    return f"{value}<br><small>{low} to {high}</small>"


def _plot(measured: Sequence[Measured], curve: Sequence[tuple[float, float]]) -> str:
    points = [(m, m.cost, m.accuracy) for m in measured if m.cost is not None]
    xs = [x for _, (x, _, _), _ in points] + [x for x, _ in curve]
    ys = [y for _, _, spread in points for y in spread] + [y for _, y in curve]
    x_low, x_high = min(0.0, *xs), max(xs) or 1.0
    y_low, y_high = min(ys), max(ys)
    margin = (y_high - y_low) * 0.06 or 0.05
    y_low, y_high = y_low - margin, y_high + margin

    def x_at(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    label = "; ".join(f"{m.name}: {cost[0]:.4g} dollars per 1,000, accuracy {a[0]:.1%}" for m, cost, a in points)
    out = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(label, quote=True)}'>"]
    for tick in _ticks(y_low, y_high):
        out.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y_at(tick):.1f}' y2='{y_at(tick):.1f}'/>")
        out.append(f"<text class='soft' x='{LEFT - 8}' y='{y_at(tick) + 4:.1f}' text-anchor='end'>{tick:.0%}</text>")
    out += [
        f"<text class='soft' x='{x_at(tick):.1f}' y='{HEIGHT - 30}' text-anchor='middle'>{tick:g}</text>"
        for tick in _ticks(x_low, x_high)
    ]
    middle = f"x='{WIDTH / 2}' y='{HEIGHT - 8}' text-anchor='middle'"
    out.append(f"<text class='soft' {middle}>US dollars per 1,000 queries</text>")
    if curve:
        line = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in curve)
        out.append(f"<polyline class='curve' points='{line}'/>")
    taken: list[tuple[float, float]] = []
    for found, cost, (value, low, high) in sorted(points, key=lambda point: -point[2][0]):
        x, y = x_at(cost[0]), y_at(value)
        us = found is measured[0]
        bar = f"x1='{x:.1f}' x2='{x:.1f}' y1='{y_at(low):.1f}' y2='{y_at(high):.1f}'"
        out.append(f"<line class='bar{' us' if us else ''}' {bar}/>")
        out.append(f"<circle class='{'ours' if us else 'theirs'}' cx='{x:.1f}' cy='{y:.1f}' r='{6 if us else 4}'/>")
        at = y + 4
        while any(abs(at - other) < 13 and abs(x - beside) < 170 for beside, other in taken):
            at += 13
        taken.append((x, at))
        anchor, shift = ("end", -9) if x > WIDTH * 0.55 else ("start", 9)
        out.append(f"<text x='{x + shift:.1f}' y='{at:.1f}' text-anchor='{anchor}'>{html.escape(found.name)}</text>")
    out.append("</svg>")
    return "".join(out)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(step * k, 12) for k in range(first, math.floor(high / step) + 1)]
