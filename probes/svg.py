"""A line chart as inline SVG: no script, no font, colours from the page's style so that it follows light and dark."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 48
COLOURS = 7
"""The page's style knows `--c0` to `--c6`; a dash pattern tells the same apart without colour."""
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 4", "5 2", "3 6")
STYLE = """
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}
svg .rule{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}svg .strong{fill:var(--ink)}
svg polyline{fill:none}svg .band{stroke:none;opacity:.16}
svg.chart{min-width:26rem}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;padding:0;margin:.35rem 0 0;font-size:.86rem}
.legend svg{display:inline-block;width:30px;height:10px;vertical-align:middle;margin-right:.35rem}
"""
STYLE += "".join(f"svg .c{i}{{stroke:var(--c{i})}}svg .f{i}{{fill:var(--c{i})}}" for i in range(COLOURS))

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A line through points, or the points alone."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    heavy: bool = False
    line: bool = True
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high): an interval; a band along a line, a bar at each point."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal line with a word at one end."""

    y: float
    label: str
    at_left: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    low: float
    high: float
    percent: bool = True


def chart(
    said: str, x: Axis, y: Axis, series: Sequence[Series], *, rules: Sequence[Rule] = (), diagonal: bool = False
) -> str:
    """The chart and its legend. `said` is what a screen reader reads in its place."""

    def at(point: Point) -> Point:
        across = (point[0] - x.low) / (x.high - x.low) * (WIDTH - LEFT - RIGHT)
        up = (min(max(point[1], y.low), y.high) - y.low) / (y.high - y.low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    out = [f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(said, quote=True)}'>"]
    out += _axes(x, y, at((x.low, y.low)), at((x.high, y.high)))
    if diagonal:
        out.append(_line("rule", at((max(x.low, y.low),) * 2), at((min(x.high, y.high),) * 2)))
    for rule in rules:
        left, right = at((x.low, rule.y)), at((x.high, rule.y))
        out.append(_line("rule", left, right))
        side = left[0] + 4 if rule.at_left else right[0] - 4
        place = f"x='{side:.1f}' y='{left[1] - 5:.1f}' text-anchor='{'start' if rule.at_left else 'end'}'"
        out.append(f"<text class='strong' {place}>{escape(rule.label)}</text>")
    for one in series:
        out += _draw(one, at)
    out.append("</svg>")
    return "".join(out) + _legend(series)


def _axes(x: Axis, y: Axis, low: Point, high: Point) -> Iterator[str]:
    for tick in ticks(y.low, y.high):
        height = low[1] - (tick - y.low) / (y.high - y.low) * (low[1] - high[1])
        yield _line("grid", (low[0], height), (high[0], height))
        yield f"<text x='{low[0] - 8}' y='{height + 4:.1f}' text-anchor='end'>{_number(tick, y)}</text>"
    for tick in ticks(x.low, x.high):
        across = low[0] + (tick - x.low) / (x.high - x.low) * (high[0] - low[0])
        yield _line("grid", (across, low[1]), (across, high[1]))
        yield f"<text x='{across:.1f}' y='{low[1] + 18:.1f}' text-anchor='middle'>{_number(tick, x)}</text>"
    yield _line("axis", low, (high[0], low[1]))
    yield f"<text x='{(low[0] + high[0]) / 2:.1f}' y='{HEIGHT - 8}' text-anchor='middle'>{escape(x.label)}</text>"
    middle = (low[1] + high[1]) / 2
    yield f"<text transform='translate(14 {middle:.1f}) rotate(-90)' text-anchor='middle'>{escape(y.label)}</text>"


def _draw(one: Series, at: Callable[[Point], Point]) -> Iterator[str]:
    if one.band and one.line:
        edge = [at((x, high)) for x, _, high in one.band] + [at((x, low)) for x, low, _ in reversed(one.band)]
        yield f"<polygon class='band f{one.colour}' points='{_points(edge)}'/>"
    if one.line:
        dash = f" stroke-dasharray='{DASHES[one.colour]}'" if DASHES[one.colour] else ""
        width = 3 if one.heavy else 1.6
        yield (
            f"<polyline class='c{one.colour}' stroke-width='{width}'{dash} "
            f"points='{_points([at(point) for point in one.points])}'/>"
        )
        return
    for x, low, high in one.band:
        yield _line(f"c{one.colour}", at((x, low)), at((x, high)))
    for point in one.points:
        x, y = at(point)
        yield f"<circle class='f{one.colour}' cx='{x:.1f}' cy='{y:.1f}' r='{5 if one.heavy else 4}'/>"


def _legend(series: Sequence[Series]) -> str:
    items = []
    for one in series:
        if not one.name:
            continue
        dash = f" stroke-dasharray='{DASHES[one.colour]}'" if DASHES[one.colour] else ""
        mark = (
            f"<line class='c{one.colour}' x1='0' x2='30' y1='5' y2='5' stroke-width='{3 if one.heavy else 2}'{dash}/>"
            if one.line
            else f"<circle class='f{one.colour}' cx='15' cy='5' r='4'/>"
        )
        items.append(f"<li><svg viewBox='0 0 30 10' aria-hidden='true'>{mark}</svg>{escape(one.name)}</li>")
    return f"<ul class='legend'>{''.join(items)}</ul>" if items else ""


def _line(kind: str, start: Point, end: Point) -> str:
    return f"<line class='{kind}' x1='{start[0]:.1f}' y1='{start[1]:.1f}' x2='{end[0]:.1f}' y2='{end[1]:.1f}'/>"


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _number(value: float, axis: Axis) -> str:
    if not axis.percent:
        return f"{value:g}"
    return f"{value * 100:g}%"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
