"""The dashboard in a real Chromium: signing in, reading, opening a request, with keys alone and without scripts."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.dashboard.conftest import XSS, Running, row
from tests.dashboard.test_pages import exported, sql

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For this module alone: while it is open, playwright's loop occupies the thread that async tests need."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not on PATH; Debian's package `chromium` has it")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"], timeout=100_000)
        yield chromium
        chromium.close()


@dataclass
class Watch:
    """What a page did that nobody sees."""

    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


Visit = Callable[..., tuple[Page, Watch]]


@pytest.fixture
def visit(browser: Browser, running: Running) -> Iterator[Visit]:
    """Opens a page in a context of its own; at the end, nothing may have complained or gone elsewhere."""
    opened: list[tuple[BrowserContext, Watch]] = []

    def open_page(key: str | None = "admin", **options: Any) -> tuple[Page, Watch]:
        context = browser.new_context(base_url=running.url, **options)
        context.set_default_timeout(60_000)  # on a busy machine
        page, watch = context.new_page(), Watch()
        opened.append((context, watch))
        page.on("console", lambda message: watch.complaints.append(message.text))
        page.on("pageerror", lambda error: watch.complaints.append(str(error)))
        page.on("request", lambda request: watch.urls.append(request.url))
        page.goto("/dashboard")
        if key is not None:
            page.get_by_label("One of this gateway's keys").fill(running.keys[key])
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url("**/dashboard")
        return page, watch

    yield open_page
    for context, watch in opened:
        context.close()
        assert watch.complaints == []
        assert [url for url in watch.urls if not url.startswith((f"{running.url}/", "data:"))] == []


def tile(page: Page, name: str) -> int:
    return int(page.locator(f"#{name} data").first.get_attribute("value") or "")


def test_the_numbers_on_screen_are_those_of_api_export_and_ledger(visit: Visit, running: Running) -> None:
    page, _ = visit()
    page.get_by_role("link", name="All time").click()
    page.wait_for_url("**/dashboard?range=all")
    spend, requests = tile(page, "spend"), tile(page, "requests")
    bearer = {"authorization": f"Bearer {running.keys['admin']}"}
    api = httpx2.get(f"{running.url}/leadline/v1/spend?hours=1e6", headers=bearer).json()
    with running.client("admin") as client:
        rows = exported(client, "?range=all")
    assert spend == api["cost_nanousd"] == sum(int(found["cost_nanousd"] or 0) for found in rows)
    assert spend == sql(running, "SELECT sum(cost_nanousd) FROM request")
    assert requests == api["requests"] == len(rows) == sql(running, "SELECT count(*) FROM request")
    dollars = f"${spend // 10**9}.{spend % 10**9:09d}".rstrip("0")
    assert page.get_by_text(f"exactly {dollars}").is_visible()
    assert (
        page.locator("#models tbody td.n:nth-child(2) data").evaluate_all(
            "cells => cells.reduce((sum, cell) => sum + Number(cell.value), 0)"
        )
        == requests
    )
    assert page.get_by_text("not an estimate of what would have happened").is_visible()


def test_a_request_opens_to_its_decision(visit: Visit, running: Running) -> None:
    wanted = row(age_s=1)
    wanted[0].team, wanted[0].degraded = "research", "redis"
    running.record(wanted)
    page, _ = visit()
    page.locator(f"tr[data-request={wanted[0].id}] a").click()
    page.wait_for_url(f"**/requests/{wanted[0].id}")
    assert page.get_by_role("heading", level=1).inner_text() == wanted[0].id
    assert int(page.locator("#cost data").get_attribute("value") or "") == wanted[0].cost_nanousd
    candidates = page.locator("#candidates tbody tr")
    assert candidates.count() == 2
    assert re.search(r"small\s+0\.93 0\.88 to 0\.97\s+\$0\.0007\s+\$0\.002\s+chosen", candidates.nth(0).inner_text())
    assert "dearer than the cheapest that will do" in candidates.nth(1).inner_text()
    assert page.get_by_text("cheapest with p_success >= 0.9").first.is_visible()
    assert page.get_by_text("test-probe-1").is_visible()
    assert page.locator("#attempts tbody tr").count() == 1
    assert page.locator("#attempts tbody tr td").first.inner_text() == "first"
    assert page.locator("#tokens tbody tr").inner_text().split() == ["1", "120", "30", "0", "58", "0"]
    facts = page.locator(".facts").inner_text()
    assert re.search(r"Team\s+research\s", facts)
    assert re.search(r"Degraded\s+redis\s", facts)


def test_a_request_is_on_screen_as_soon_as_it_ended(visit: Visit, running: Running) -> None:
    page, _ = visit()
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    bearer = {"authorization": f"Bearer {running.keys['admin']}"}
    answer = httpx2.post(f"{running.url}/v1/chat/completions", json=body, headers=bearer, timeout=20)
    assert answer.status_code == 502
    page.reload()
    request_id = answer.headers["x-request-id"]
    failed = page.locator(f"tr[data-request={request_id}]")
    assert "error" in failed.inner_text()
    failed.get_by_role("link").click()
    page.wait_for_url(f"**/requests/{request_id}")
    assert page.locator("#attempts .tag.bad").count() >= 1
    assert "was the last one called" in page.locator(".verdict").inner_text()


def test_a_wrong_key_is_told_and_a_right_one_goes_on(visit: Visit, running: Running) -> None:
    page, watch = visit(key=None)
    page.get_by_label("One of this gateway's keys").fill("sk-ll-wrong")
    page.keyboard.press("Enter")
    assert "not one of this gateway's keys" in page.get_by_role("alert").inner_text()
    assert all("401" in complaint for complaint in watch.complaints)
    watch.complaints.clear()
    page.get_by_label("One of this gateway's keys").fill(running.keys["user"])
    page.keyboard.press("Enter")
    page.get_by_text("tenant default").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/dashboard/login")
    page.goto("/dashboard/requests")
    assert "/dashboard/login" in page.url


def test_filters_work_without_scripts(visit: Visit) -> None:
    page, _ = visit(java_script_enabled=False)
    page.get_by_role("link", name="Requests", exact=True).click()
    page.wait_for_url("**/dashboard/requests")
    page.get_by_label("Model").select_option("large")
    page.get_by_label("Streamed").select_option("yes")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url("**model=large**")
    served = page.locator("table.requests tbody td:nth-child(4)").all_inner_texts()
    assert served
    assert set(served) == {"large"}
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as CSV").click()
    assert len(download.value.path().read_text().splitlines()) == len(served) + 1


def test_what_a_caller_wrote_does_not_run(visit: Visit) -> None:
    page, _ = visit()
    page.on("dialog", lambda dialog: pytest.fail("a caller's text ran"))
    assert page.get_by_text(XSS).first.is_visible()


def test_keys_alone_reach_everything(visit: Visit) -> None:
    page, _ = visit()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return [e.innerText || e.getAttribute('aria-label') || '', s.outlineStyle, parseFloat(s.outlineWidth)] }"
        )
        reached.append(focused[0].strip())
        if len(reached) > 1 and page.evaluate("document.activeElement === document.body"):
            break  # once around
        assert focused[1] == "solid", f"no focus ring on {focused[0]!r}"
        assert focused[2] >= 2
    assert reached[0] == "Skip to content"
    for name in ("Overview", "Requests", "Sign out", "7 days", "what this means", "As a table", "large"):
        assert name in reached
    assert any(re.match(r"\d+ \w+ \d\d:\d\d:\d\d", text) for text in reached), "no request can be opened"


def test_a_screen_reader_finds_its_way(visit: Visit) -> None:
    page, _ = visit()
    for path in ("/dashboard", "/dashboard/requests"):
        page.goto(path)
        assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.locator("nav a[aria-current=page]").count() == 1
        assert page.locator("table").count() == page.locator("table > caption").count()
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("html[lang=en]").count() == 1
        assert page.locator("input:not([type=hidden]):not([hidden]), select").evaluate_all(
            "fields => fields.every(field => field.labels.length > 0)"
        )
    page.goto("/dashboard")
    assert page.get_by_role("img", name="Spend per hour").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(visit: Visit, scheme: Any, width: int) -> None:
    page, _ = visit(color_scheme=scheme, viewport={"width": width, "height": 800})
    for path in ("/dashboard", "/dashboard/requests"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("h1", ".quiet", "a", ".tag.good", ".tag.bad", ".tag.warn", "button"):
            assert contrast(page, selector) >= 4.5, f"{selector} on {path} in {scheme}"


def contrast(page: Page, selector: str) -> float:
    """The least contrast (WCAG 2) of what the selector finds with the first opaque colour behind it."""
    found = page.locator(selector).evaluate_all("""elements => elements.map(element => {
        const light = colour => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        let behind = element;
        const clear = e => ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(e).backgroundColor);
        while (clear(behind)) behind = behind.parentElement;
        const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    })""")
    assert found, selector
    return float(min(found))


@pytest.mark.parametrize("width", [1440, 1200, 1024, 800, 390])
def test_the_tiles_leave_no_empty_band(visit: Visit, width: int) -> None:
    page, _ = visit(viewport={"width": width, "height": 900})
    for count in (6, 7):  # the seventh is there once answers are rated
        tiles: list[dict[str, float]] = page.evaluate(
            """count => {
                const all = document.querySelector(".tiles");
                while (all.children.length < count) all.append(all.lastElementChild.cloneNode(true));
                return [...all.children, all].map(one => one.getBoundingClientRect().toJSON());
            }""",
            count,
        )
        *tiles, whole = tiles
        assert len(tiles) == count
        rows: dict[float, list[dict[str, float]]] = {}
        for tile in tiles:
            rows.setdefault(tile["top"], []).append(tile)
        assert all(abs(max(tile["right"] for tile in row) - whole["right"]) <= 2 for row in rows.values()), (
            count,
            rows,
        )
        assert all(tile["left"] >= 0 and tile["right"] <= width for tile in tiles)
