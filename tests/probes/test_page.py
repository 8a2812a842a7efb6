"""The report is one file that fetches nothing, is well formed, and draws what was measured."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

from probes.artifact import Artifact, sealed
from probes.calibrate import sigmoid
from probes.certify import ALPHAS, METHODS, issue
from probes.evaluate import Row
from probes.html import probe_report
from probes.page import _curve
from probes.svg import ticks
from probes.table import Table
from probes.train import table_rows

TITLE = "Probe <script>alert(1)</script> & more"
Numbers = tuple[Table, np.ndarray, list[Row]]
VOID = {"meta", "br", "line", "circle", "polyline", "polygon"}


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=400)
    p = sigmoid(np.column_stack([0.5 - hard, 2.0 - hard]))
    labels = (rng.random((400, 2)) < p).astype(float)
    labels[:20, 0] = np.nan
    prompts = [f"question {i} " + "word " * int(5 + 3 * abs(h)) for i, h in enumerate(hard)]
    table = Table(prompts, labels, ("weak", "strong"), ("a <b>", "c"), np.where(hard > 0, "x", "y").astype(object))
    return table, p, table_rows(table, {"probe": p})


@pytest.fixture
def page(artifact: Artifact, numbers: Numbers) -> str:
    table, p, rows = numbers
    probe = sealed(artifact)
    known = slice(20, None)
    certificates = [
        issue(
            p[known], table.labels[known], ("weak", "strong"), alpha=alpha, method=method,
            rows="held_out", data_sha256="0", manifest=probe.manifest,
        )
        for alpha in ALPHAS
        for method in METHODS
    ]  # fmt: skip
    return probe_report(TITLE, "What it is.", probe, "t.parquet", table, {"probe": p}, rows, certificates=certificates)


class Balance(HTMLParser):
    """Whether every element is closed where it should be, and what stands in attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.values += [value or "" for _, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_it_is_well_formed_and_fetches_nothing(page: str) -> None:
    found = Balance()
    found.feed(page)
    found.close()
    assert found.open == []
    assert not found.seen & {"script", "link", "img", "iframe", "object"}
    assert "alert(1)" in found.text
    assert not re.search(r"https?://|url\(|@import", page)


def test_it_tells_what_was_measured(page: str, numbers: Numbers, artifact: Artifact) -> None:
    found = Balance()
    found.feed(page)
    text = " ".join(found.text.split())
    table, _, rows = numbers
    apgr = next(row for row in rows if (row.name, row.metric) == ("probe", "APGR"))
    assert f"{apgr.value:.4f} {apgr.low:.3f} to {apgr.high:.3f}" in text
    for needed in (
        "always weak",
        "TF-IDF + LR (gap)",
        "group prior",
        "oracle",
        "at most 0.05 weak wrong, strong right",
    ):
        assert needed in text
    assert table.sha256() in text
    assert artifact.version in text
    assert sealed(artifact).manifest.tensors_sha256 in text
    # Who cannot see the plots is told what they show.
    told = [value for value in found.values if value.startswith("probe: ")]
    assert len(told) == 1
    assert "right at 50% strong calls" in told[0]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1, 0, 1])), min_size=1, max_size=40))
def test_the_curve_is_that_of_every_threshold(rows: list[tuple[int, int]]) -> None:
    scores, gap = np.array([score for score, _ in rows], float), np.array([gap for _, gap in rows], float)
    weak, strong = (gap < 0).astype(float), (gap > 0).astype(float)
    x, y = np.array(_curve(scores, weak, strong)).T
    for t in [*scores, np.inf]:
        routed = scores >= t
        # Points stand at every 1/120 of the share: between two of them, a straight line.
        assert np.interp(routed.mean(), x, y) == pytest.approx(np.where(routed, strong, weak).mean(), abs=2 / 120)


@given(st.floats(0, 1), st.floats(1e-3, 10))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= low + span + 1e-9 for tick in found)


@pytest.mark.browser
def test_a_browser_shows_it_in_light_dark_and_on_a_phone(page: str, tmp_path: Path) -> None:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not on PATH; Debian's package `chromium` has it")
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    seen: list[str] = []
    grounds = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 390)):
            view = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})  # type: ignore[arg-type]  # a Literal
            view.on("console", lambda message: seen.append(message.text))
            view.on("request", lambda request: seen.append(request.url))
            view.goto(file.as_uri())
            assert view.locator("svg.chart").count() == 4
            assert all(box.bounding_box() is not None for box in view.locator("svg.chart").all())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            grounds.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
            view.close()
        browser.close()
    assert seen == [file.as_uri()] * 3
    assert len(grounds) == 2
