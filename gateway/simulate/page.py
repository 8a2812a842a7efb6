"""The report of a simulation as one HTML file: no script, no request to anywhere, light and dark."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from gateway.simulate.compare import Measured
from gateway.simulate.run import Simulation
from probes.page import page as whole_page
from probes.svg import ticks

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52
OURS, THEIRS = 0, 4
"""Colours of the page's style."""


def page(title: str, found: Simulation) -> str:
    """The whole file."""
    measured = found.measured
    sections = [f"<p>{escape(fact)}</p>" for fact in found.facts[1:]]
    if measured[0].cost is not None:
        caption = "Cost and quality<small>The line: what the policy's signals reach at other prices of a mistake. "
        plot = _plot(measured, found.curve)
        sections.append(f"<figure><figcaption>{caption}Bars: 95% intervals.</small></figcaption>{plot}</figure>")
    sections.append("<h2>Beside every baseline</h2>")
    sections.append("<p>Baselines with a dial spend exactly what the policy does; what learns does so out of fold. ")
    sections.append("Gain and saving are the policy's against that row, on the same resamples.</p>")
    sections += _table(measured)
    sections.append("<h2>What decided</h2><div class='scroll'><table><tr><th>Rule</th><th>Queries</th></tr>")
    sections += [f"<tr><td>{escape(rule)}</td><td>{count}</td></tr>" for rule, count in found.rules]
    sections.append("</table></div>")
    return whole_page(title, found.facts[0], sections)


def _table(measured: Sequence[Measured]) -> Iterator[str]:
    models = list(measured[0].share)
    heads = ["Router", "Accuracy", "$ per 1,000", *models, "Policy gains", "Policy saves"]
    yield f"<div class='scroll'><table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"
    for index, found in enumerate(measured):
        cells = [
            escape(found.name) if index else f"<b>{escape(found.name)}</b>",
            _spread(found.accuracy, "{:.1%}"),
            _spread(found.cost, "{:.4g}"),
            *(f"{found.share[model]:.0%}" for model in models),
            _spread(found.gain, "{:+.1%}"),
            _spread(found.saving, "{:.0%}"),
        ]
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _spread(found: tuple[float, float, float] | None, form: str) -> str:
    if found is None:
        return "–"
    value, low, high = (form.format(number) if math.isfinite(number) else "–" for number in found)
    return f"{value}<br><small>{low} to {high}</small>"


def _plot(measured: Sequence[Measured], curve: Sequence[tuple[float, float]]) -> str:
    """Each router where it stands, by name."""
    points = [(m, m.cost, m.accuracy) for m in measured if m.cost is not None]
    xs = [x for _, (x, _, _), _ in points] + [x for x, _ in curve]
    ys = [y for _, _, spread in points for y in spread] + [y for _, y in curve]
    x_high = max(xs) or 1.0
    margin = (max(ys) - min(ys)) * 0.06 or 0.05
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def x_at(value: float) -> float:
        return LEFT + value / x_high * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    said = "; ".join(f"{m.name}: {cost[0]:.4g} dollars per 1,000, accuracy {a[0]:.1%}" for m, cost, a in points)
    out = [f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(said, quote=True)}'>"]
    for tick in ticks(y_low, y_high):
        out.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y_at(tick):.1f}' y2='{y_at(tick):.1f}'/>")
        out.append(f"<text x='{LEFT - 8}' y='{y_at(tick) + 4:.1f}' text-anchor='end'>{tick * 100:g}%</text>")
    out += [
        f"<text x='{x_at(tick):.1f}' y='{HEIGHT - 30}' text-anchor='middle'>{tick:g}</text>"
        for tick in ticks(0.0, x_high)
    ]
    out.append(f"<text x='{WIDTH / 2}' y='{HEIGHT - 8}' text-anchor='middle'>US dollars per 1,000 queries</text>")
    if curve:
        line = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in curve)
        out.append(f"<polyline class='c{OURS}' stroke-width='2' points='{line}'/>")
    taken: list[tuple[float, float]] = []
    for found, cost, (value, low, high) in sorted(points, key=lambda point: -point[2][0]):
        x, y = x_at(cost[0]), y_at(value)
        colour, radius = (OURS, 6) if found is measured[0] else (THEIRS, 4)
        out.append(f"<line class='c{colour}' x1='{x:.1f}' x2='{x:.1f}' y1='{y_at(low):.1f}' y2='{y_at(high):.1f}'/>")
        out.append(f"<circle class='f{colour}' cx='{x:.1f}' cy='{y:.1f}' r='{radius}'/>")
        label = y + 4
        while any(abs(label - other) < 13 and abs(x - beside) < 170 for beside, other in taken):
            label += 13
        taken.append((x, label))
        anchor, shift = ("end", -9) if x > WIDTH * 0.55 else ("start", 9)
        place = f"x='{x + shift:.1f}' y='{label:.1f}' text-anchor='{anchor}'"
        out.append(f"<text class='strong' {place}>{escape(found.name)}</text>")
    return "".join([*out, "</svg>"])
