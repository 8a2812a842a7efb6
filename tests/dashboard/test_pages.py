"""The pages without a browser: who may see what, what is escaped, and that every number is the ledger's."""

import csv
import io
import re
import time

import httpx2
import msgspec
import pytest
from sqlalchemy import text

from gateway.dashboard import session
from routers.explain import to_dict
from routers.types import Accept, Cascade, Single
from tests.dashboard.conftest import FORMULA, XSS, Running, decision, row

PAGES = ["/dashboard", "/dashboard/requests", "/dashboard/requests.csv", "/dashboard/requests/req_x"]
RANGES = {"24h": 24, "7d": 168, "30d": 720, "all": 24 * 366 * 50}


def tile(page: str, name: str) -> int:
    """The exact number of a tile."""
    found = re.search(rf'id="{name}"[^>]*>\s*<data[^>]* value="(-?\d+)"', page)
    assert found, name
    return int(found[1])


def exported(client: httpx2.Client, query: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(client.get(f"/dashboard/requests.csv{query}").text)))


def sql(running: Running, query: str, **values: object) -> int:
    with running.app.state.lifecycle.ledger.engine.connect() as connection:
        return int(connection.execute(text(query), values).scalar() or 0)


# who may see what


@pytest.mark.parametrize("page", PAGES)
def test_a_page_asks_a_stranger_to_sign_in_and_takes_them_there_after(running: Running, page: str) -> None:
    with running.client() as client:
        answer = client.get(f"{page}?range=7d", follow_redirects=False)
        assert answer.status_code == 303
        login = client.get(answer.headers["location"])
        assert f'name="next" value="{page}?range=7d"' in login.text


@pytest.mark.parametrize("key", ["", "nonsense", "sk-ll-0123456789ab-wrong", "x" * 10_000])
def test_a_wrong_key_is_refused_and_not_repeated(running: Running, key: str) -> None:
    with running.client() as client:
        answer = client.post("/dashboard/login", data={"key": key})
        assert answer.status_code == 401
        assert session.COOKIE not in client.cookies
        assert "not one of this gateway" in answer.text
        assert not key or key not in answer.text


def test_the_cookie_is_kept_from_scripts_and_other_sites(running: Running) -> None:
    with running.client() as client:
        answer = client.post("/dashboard/login", data={"key": running.keys["user"]}, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/dashboard", "Max-Age=43200"))
    assert running.keys["user"].rpartition("-")[2] not in cookie


def test_a_cookie_that_was_tampered_with_is_refused(running: Running) -> None:
    with running.client("user") as user, running.client("admin") as admin:
        of_user, of_admin = user.cookies[session.COOKIE], admin.cookies[session.COOKIE]
    key_id, expires, signature = of_user.split(".")
    forged = [
        f"{of_admin.split('.')[0]}.{expires}.{signature}",
        f"{key_id}.{int(expires) + 1}.{signature}",
        f"{key_id}.{expires}.{signature[:-1]}{'0' if signature[-1] != '0' else '1'}",
        f"{key_id}.{expires}.",
        f"{key_id}.{expires}",
        "..",
        "",
        "é.é.é",
    ]
    for cookie in forged:
        headers = {b"cookie": f"{session.COOKIE}={cookie}".encode()}
        assert httpx2.get(f"{running.url}/dashboard", headers=headers).status_code == 303, cookie


def test_a_session_ends_by_time_and_with_its_key(running: Running) -> None:
    keys, pepper = running.app.state.lifecycle.keys, running.app.state.pepper
    principal = keys.authenticate(keys.create("short-lived"))
    now_s = int(time.time())
    cookie = session.sign(principal, pepper, now_s=now_s)
    assert session.read(cookie, keys, pepper, now_s=now_s + session.LIFETIME_S - 1) == principal
    assert session.read(cookie, keys, pepper, now_s=now_s + session.LIFETIME_S) is None
    assert session.read(cookie, keys, b"another pepper", now_s=now_s) is None
    keys.revoke(principal.key_id)
    assert session.read(cookie, keys, pepper, now_s=now_s) is None


def test_signing_out_forgets_the_cookie(running: Running) -> None:
    with running.client("user") as client:
        client.post("/dashboard/logout")
        assert session.COOKIE not in client.cookies


def test_another_site_cannot_sign_a_visitor_out(running: Running) -> None:
    with running.client("user") as client:
        client.post("/dashboard/logout", headers={"sec-fetch-site": "cross-site"})
        assert session.COOKIE in client.cookies


def test_another_site_cannot_sign_a_visitor_in(running: Running) -> None:
    with running.client() as client:
        form = {"key": running.keys["user"]}
        answer = client.post("/dashboard/login", data=form, headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 403
        assert session.COOKIE not in client.cookies


@pytest.mark.parametrize("elsewhere", ["https://evil.example/", "//evil.example", "/dashboardx", "/dashboard\r\nx: y"])
def test_signing_in_leads_nowhere_else(running: Running, elsewhere: str) -> None:
    with running.client() as client:
        form = {"key": running.keys["user"], "next": elsewhere}
        answer = client.post("/dashboard/login", data=form, follow_redirects=False)
        assert answer.headers["location"] == "/dashboard"


def test_a_tenant_sees_its_own_requests_only(running: Running) -> None:
    theirs, own = row(age_s=5, tenant="default"), row(age_s=5, tenant="acme")
    running.record(theirs, own)
    with running.client("acme") as client:
        assert client.get(f"/dashboard/requests/{own[0].id}").status_code == 200
        assert client.get(f"/dashboard/requests/{theirs[0].id}").status_code == 404
        assert client.get("/dashboard/requests/req_none").status_code == 404
        for query in ("?range=all", "?range=all&tenant=default"):
            assert {found["tenant"] for found in exported(client, query)} == {"acme"}
        overview = client.get("/dashboard?range=all").text
        assert tile(overview, "requests") == sql(running, "SELECT count(*) FROM request WHERE tenant = 'acme'")
        assert theirs[0].id not in client.get("/dashboard/requests?range=all").text
    with running.client("admin") as client:
        assert client.get(f"/dashboard/requests/{own[0].id}").status_code == 200
        assert {found["tenant"] for found in exported(client, "?range=all&tenant=acme")} == {"acme"}


def test_the_page_of_a_request_says_what_its_plan_did(running: Running) -> None:
    request, attempts = row(age_s=5)
    verified = msgspec.structs.replace(attempts[0], id=f"{request.id}-1", seq=1, kind="verify")
    drafted = msgspec.structs.replace(attempts[0], id=f"{request.id}-2", seq=2, kind="draft", cost_nanousd=None)
    request.plan = '{"kind":"speculate","accepted_steps":3,"escalated_steps":1,"accepted_tokens":4321,"p_correct":0.87}'
    plain = row(age_s=5)
    bearer = {"authorization": f"Bearer {running.keys['admin']}"}
    running.record((request, [attempts[0], verified, drafted]), plain)
    with running.client("admin") as client:
        page = client.get(f"/dashboard/requests/{request.id}").text
        receipt = client.get(f"/leadline/v1/requests/{request.id}", headers=bearer).json()
        without = client.get(f"/dashboard/requests/{plain[0].id}").text
    assert "Plan: speculate" in page
    told = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert (told["Steps accepted"], told["Steps escalated"]) == ("3", "1")
    assert told["Tokens saved: written by the draft, and kept"] == "4,321"
    kinds = re.findall(r'<tr><th scope="row">([a-z]+)</th><td class="n">(\d+)</td>', page)
    assert kinds == [("first", "1"), ("verify", "1"), ("draft", "1")]
    assert receipt["plan"]["escalated_steps"] == 1
    assert "Plan:" not in without


def test_the_page_of_a_cascade_blames_nobody(running: Running) -> None:
    request, attempts = row(age_s=5)
    decided = decision("cheap")
    stages = tuple(Single(name) for name in ("cheap", str(request.model_served)))
    request.decision = msgspec.json.encode(
        to_dict(msgspec.structs.replace(decided, plan=Cascade(stages, Accept(agree=2))))
    ).decode()
    first = msgspec.structs.replace(attempts[0], id=f"{request.id}-1", seq=1, outcome="not_accepted")
    running.record((request, [first, *attempts]))
    with running.client("admin") as client:
        page = client.get(f"/dashboard/requests/{request.id}").text
    assert f"{request.model_served}</strong> of the cascade" in page
    assert "which failed" not in page
    assert '<span class="tag quiet">not_accepted</span>' in page


# what a page may do


@pytest.mark.parametrize("page", [*PAGES, "/dashboard/login", "/dashboard/static/style.css"])
def test_every_answer_is_locked_down(running: Running, page: str) -> None:
    with running.client("admin") as client:
        headers = client.get(page).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == ("public, max-age=31536000, immutable" if "static" in page else "no-store")


def test_what_callers_wrote_is_text(running: Running) -> None:
    with running.client("admin") as client:
        pages = [
            client.get(page).text for page in ("/dashboard", "/dashboard/requests", "/dashboard/requests?model=%3Cb")
        ]
        hostile = next(found for found in exported(client, "") if found["model_requested"] == XSS)
        pages.append(client.get(f"/dashboard/requests/{hostile['id']}").text)
        pages.append(client.get('/dashboard/login?next=/dashboard?"><script>').text)
    for page in pages:
        assert "<script" not in page
        assert "<b" not in page.replace("<body", "").replace("<button", "").replace("<br>", "")
        assert " style=" not in page
    assert all("&lt;script&gt;alert" in page for page in (pages[0], pages[1], pages[3]))


def test_a_cell_of_the_export_is_no_formula(running: Running) -> None:
    with running.client("admin") as client:
        rows = exported(client, "?tenant=acme")
    assert f"'{FORMULA}" in {found["model_requested"] for found in rows}
    assert not any(cell.startswith(("=", "+", "-", "@")) for found in rows for cell in found.values())


# every number is the ledger's


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("key", ["admin", "user", "acme"])
def test_tile_rows_api_export_and_ledger_agree(running: Running, range_: str, key: str) -> None:
    with running.client(key) as client:
        page = client.get(f"/dashboard?range={range_}").text
        rows = exported(client, f"?range={range_}")
        api = client.get(
            "/leadline/v1/spend",
            params={"hours": RANGES[range_]},
            headers={"authorization": f"Bearer {running.keys[key]}"},
        ).json()
    of_tenant = "" if key == "admin" else f" AND tenant = '{'acme' if key == 'acme' else 'default'}'"
    where = f"FROM request WHERE created_at_ms >= :since{of_tenant}"
    since = int((time.time() - RANGES[range_] * 3600) * 1000)
    spend = sql(running, f"SELECT sum(cost_nanousd) {where}", since=since)
    count = sql(running, f"SELECT count(*) {where}", since=since)
    assert tile(page, "spend") == api["cost_nanousd"] == sum(int(r["cost_nanousd"] or 0) for r in rows) == spend
    assert tile(page, "requests") == api["requests"] == len(rows) == count
    assert tile(page, "cache-hits") == api["cache_hits"] == sum(r["cache"] == "hit" for r in rows)
    assert tile(page, "unpriced") == api["unpriced"] == sum(r["cost_nanousd"] == "" for r in rows)
    assert tile(page, "estimated") == api["estimated"] == sum(r["cost_estimated"] == "true" for r in rows)
    assert tile(page, "failed") + tile(page, "cancelled") == api["not_ok"] == sum(r["outcome"] != "ok" for r in rows)
    savings = sum(
        int(r["baseline_nanousd"]) - int(r["cost_nanousd"]) for r in rows if r["baseline_nanousd"] and r["cost_nanousd"]
    )
    assert tile(page, "savings") == api["savings_nanousd"] == savings
    models = re.search(r'<table id="models">.*?</table>', page, re.DOTALL)
    assert models
    assert sum(map(int, re.findall(r'class="money" value="(\d+)"', models[0]))) == spend


@pytest.mark.parametrize(
    ("query", "condition"),
    [
        ("model=large", "model_served = 'large'"),
        ("outcome=refused", "outcome = 'refused'"),
        ("cache=hit", "cache = 'hit'"),
        ("stream=yes", "stream"),
        ("stream=no&cache=miss", "NOT stream AND cache = 'miss'"),
        ("tenant=acme", "tenant = 'acme'"),
        ("model=no-such-model", "model_served = 'no-such-model'"),
    ],
)
def test_a_filter_is_the_same_on_screen_and_in_the_export(running: Running, query: str, condition: str) -> None:
    with running.client("admin") as client:
        page = client.get(f"/dashboard/requests?range=all&{query}").text
        rows = exported(client, f"?range=all&{query}")
    shown = re.findall(r'data-request="(\w+)"', page)
    assert tile(page, "sum") == len(rows) == sql(running, f"SELECT count(*) FROM request WHERE {condition}")
    assert shown == [found["id"] for found in rows[:50]]


def test_paging_back_shows_every_request_once(running: Running) -> None:
    same_moment = [row(age_s=7 * 86400 + 1, tenant="pager") for _ in range(60)]
    moment = same_moment[0][0].created_at_ms
    for request, _ in same_moment:
        request.created_at_ms = moment
    running.record(*same_moment)
    seen: list[str] = []
    with running.client("admin") as client:
        url = "/dashboard/requests?range=30d&tenant=pager"
        while url:
            page = client.get(url).text
            seen += re.findall(r'data-request="(\w+)"', page)
            older = re.search(r'rel="next" href="([^"]+)"', page)
            url = older[1].replace("&amp;", "&") if older else ""
    assert sorted(seen) == sorted(request.id for request, _ in same_moment)


@pytest.mark.parametrize(
    "query",
    ["range=nonsense", "before=x", "before=99999999999999999999.x", "stream=maybe", "model=%00", "tenant=%ff", "x=1"],
)
def test_a_mistyped_query_is_not_an_error(running: Running, query: str) -> None:
    with running.client("admin") as client:
        assert client.get(f"/dashboard/requests?{query}").status_code == 200
        assert client.get(f"/dashboard?{query}").status_code == 200


def test_an_id_that_no_row_can_have_is_not_found(running: Running) -> None:
    with running.client("admin") as client:
        assert client.get("/dashboard/requests/%00").status_code == 404


@pytest.mark.parametrize(
    ("hours", "status"),
    [("inf", 400), ("-inf", 400), ("nan", 400), ("1e300", 400), ("-1", 400), ("0", 200), ("1e6", 200)],
)
def test_hours_that_are_no_span_of_time_are_refused(running: Running, hours: str, status: int) -> None:
    bearer = {"authorization": f"Bearer {running.keys['admin']}"}
    answer = httpx2.get(f"{running.url}/leadline/v1/spend?hours={hours}", headers=bearer)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["param"] == "hours"


def test_an_empty_ledger_has_a_page(running: Running) -> None:
    token = running.app.state.lifecycle.keys.create("empty2", tenant="nobody")
    with running.client() as client:
        client.post("/dashboard/login", data={"key": token})
        for range_ in RANGES:
            page = client.get(f"/dashboard?range={range_}")
            assert page.status_code == 200
            assert tile(page.text, "spend") == 0


def test_a_decision_of_another_version_is_not_an_error(running: Running) -> None:
    odd = row(age_s=5)
    odd[0].decision = '{"plan": {"kind": "of the future"}}'
    running.record(odd)
    with running.client("admin") as client:
        assert "another version" in client.get(f"/dashboard/requests/{odd[0].id}").text
