"""What a policy that loads holds."""

import re
from dataclasses import replace

import pytest

from routers.load import parse
from routers.policy import Breaker, Hedge, Listing, Policy, Price, Provider, Route, Threshold
from routers.types import Query
from routers.units import Budget, Rate
from tests.routers.policies import BASE, ENV, LOCAL, PRIVATE, URL, WEAK_PRICE, changed, problems


def test_what_a_policy_holds() -> None:
    policy = parse(BASE)
    assert policy.aliases == ("auto",)
    assert policy.providers["openai"] == Provider("openai", None, URL, "OPENAI_API_KEY", 60_000, 2)
    assert policy.models["weak"].price == Price(250_000_000, 250_000_000, 250_000_000, 2_000_000_000, 2_000_000_000)
    assert (policy.models["local"].tools, policy.models["weak"].tools) == (False, True)
    assert policy.routes[1].rule == "cheapest with p_success >= 0.9"
    assert policy.limits[0].budget == Budget(50_000_000_000, "month")


def test_prices_come_from_the_list_where_the_policy_gives_none() -> None:
    listed = Listing(Price(1, 1, 1, 2, 2), context=400_000, max_output=128_000)
    asked: list[tuple[str, str]] = []

    def prices(provider: Provider, model: str) -> Listing | None:
        asked.append((provider.name, model))
        return listed if model == "gpt-5-mini" else None

    policy = parse(changed(f", price: {WEAK_PRICE}", ""), prices=prices)
    weak = policy.models["weak"]
    assert (weak.price, weak.context, weak.max_output) == (listed.price, 400_000, 128_000)
    assert ("openai", "gpt-5-mini") in asked
    strong = policy.models["strong"].price
    assert strong is not None
    assert strong.output == 10_000_000_000, "the policy goes before the list"
    unpriced = parse(changed(f"price: {WEAK_PRICE}", "price: unpriced"), prices=prices).models["weak"]
    assert (unpriced.price, unpriced.context) == (None, 400_000), "the policy goes before the list"


def test_the_version_is_of_the_content() -> None:
    version = parse(BASE).version_hash
    assert re.fullmatch(r"[0-9a-f]{12}", version)
    assert parse("# a comment\n" + BASE).version_hash == version
    assert parse(changed(LOCAL, "local: {context: 1024, provider: home, model: bundled/base}")).version_hash == version
    assert parse(changed("$2/Mtok", "$2.00/Mtok")).version_hash == version
    assert parse(changed("$2/Mtok", "$2.01/Mtok")).version_hash != version
    assert parse(changed(">= 0.90", ">= 0.91")).version_hash != version
    assert parse(changed("default,", "other,")).version_hash != version


def test_the_version_covers_every_field() -> None:
    additions = [
        (ENV, ", connect_timeout: 1s"),
        (ENV, ", first_byte_timeout: 1s"),
        (ENV, ", idle_timeout: 1s"),
        (ENV, ", breaker: off"),
        (ENV, ", breaker: {failures: 6}"),
        (ENV, ", breaker: {window: 1s}"),
        (ENV, ", breaker: {open: 1s}"),
        ("model: gpt-5-mini", ", prefix: true"),
        ("context: 1024", ", price: unpriced"),
        ("context: 1024", ", price: {input: $1/Mtok, output: $1/Mtok}"),
        ("probe: default", ", encoder: ./mine"),
        (PRIVATE, "\n    on_failure: [weak]"),
        (PRIVATE, "\n    on_failure: {rate_limit: [weak]}"),
        (PRIVATE, "\n    on_failure: {rate_limit: []}"),
        (PRIVATE, "\n    deadline: 1s"),
        (PRIVATE, "\n    hedge: {after: 1s}"),
        (PRIVATE, "\n    hedge: {after: 1s, max_extra: 6%}"),
        (PRIVATE, "\n    on_stream_failure: resume"),
        ("[local, weak, strong]", "\n    guarantee: {loss: weak_wrong_strong_right, at_most: 0.1}"),
        ("[local, weak, strong]", "\n    guarantee: {loss: weak_wrong_strong_right, at_most: 0.1, confidence: 95%}"),
        *(
            ("tag: private", f", {condition}")
            for condition in (
                "key: a",
                "key: b",
                "team: a",
                "endpoint: embeddings",
                "needs: tools",
                'input_tokens: ">= 1"',
                'input_tokens: "<= 1"',
                "share: 5%",
                "share: 6%",
                "not: {tag: x}",
                "not: {team: x}",
                "schedule: {days: mon}",
                "schedule: {hours: 01:00-02:00}",
                "schedule: {zone: Europe/Rome}",
            )
        ),
        ("600/min", ", tokens: 1/s"),
        ("600/min", ", concurrency: 1"),
        ("600/min", ", at: {80%: cheaper}"),
        ("600/min", ", at: {80%: local}"),
        ("600/min", ", at: {81%: local}"),
    ]
    texts = [BASE, *(changed(old, old + more) for old, more in additions)]
    assert len({parse(text).version_hash for text in texts}) == len(texts)


def test_words_of_yaml_1_1_are_words() -> None:
    policy = parse(changed("tag: private", "tag: [off, no, 12:30]"))
    assert policy.routes[0].when.tags == {"off", "no", "12:30"}


def test_caching_by_route() -> None:
    text = changed("use: [local]", "use: [local]\n    cache: off").replace(
        "    subject_to", "    cache: {ttl: 2d}\n    subject_to"
    )
    policy = parse(text)
    private = policy.route_for(Query("auto", "t", 1, None, tags=frozenset({"private"})))
    plain = policy.route_for(Query("auto", "t", 1, None))
    assert private is not None
    assert plain is not None
    assert (private.cache_ttl_ms, plain.cache_ttl_ms) == (None, 2 * 86_400_000)


def test_timeouts_and_the_breaker() -> None:
    home, openai = parse(BASE).providers.values()
    assert (openai.connect_timeout_ms, openai.first_byte_timeout_ms, openai.idle_timeout_ms) == (10_000, None, None)
    assert home.breaker == openai.breaker == Breaker(5, 30_000, 15_000)
    short = parse(changed(ENV, f"{ENV}, timeout: 5s, breaker: off")).providers["openai"]
    assert (short.connect_timeout_ms, short.breaker) == (5_000, None)
    lines = "connect_timeout: 2s, first_byte_timeout: 1min, idle_timeout: 9s, breaker: {failures: 2, open: 1s}"
    set_all = parse(changed(ENV, f"{ENV}, {lines}")).providers["openai"]
    assert (set_all.connect_timeout_ms, set_all.first_byte_timeout_ms, set_all.idle_timeout_ms) == (2000, 60000, 9000)
    assert set_all.breaker == Breaker(2, 30_000, 1_000)


def test_engines_of_leadline_take_no_raw_prompt_unless_it_is_said() -> None:
    def completes(server: str, more: str = "") -> bool:
        provider = f'p: {{{server}base_url: "http://127.0.0.1:1/v1"}}'
        model = f"m: {{provider: p, model: x, price: free{more}}}"
        return parse(f"version: 1\nproviders: {{{provider}}}\nmodels: {{{model}}}\n").models["m"].completes

    assert [completes(f"server: {server}, ") for server in ("vllm", "leadline")] == [True, False]
    assert completes("server: leadline, ", ", completes: true")
    assert [model.completes for model in parse(BASE).models.values()] == [False, True, True]


def test_a_model_that_drafts_is_named_by_its_name_or_its_source() -> None:
    small = "  small: {provider: home, model: bundled/nano}\n"

    def read(*hows: str) -> Policy:
        names = "".join(
            f'  m{number}: {{provider: home, model: bundled/base, speculation: "{how}"}}\n'
            for number, how in enumerate(hows)
        )
        return parse(f"version: 1\nproviders: {{home: {{engine: embedded}}}}\nmodels:\n{names}{small}")

    policy = read("auto+draft:small", "auto+draft:bundled/nano")
    assert {model.speculation for model in policy.models.values()} == {"auto+draft:bundled/nano", "auto"}
    assert read("draft:small").version_hash == read("draft:bundled/nano").version_hash
    assert read("draft:./small").models["m0"].speculation == "draft:./small"


def test_fallbacks_by_cause() -> None:
    def read(lines: str) -> Route:
        return parse(changed("use: [local]", f"use: [local]\n    {lines}")).routes[0]

    assert (read("on_failure: [weak, strong]").on_failure, read("cache: off").on_cause) == (("weak", "strong"), {})
    assert read("on_failure: {error: [weak]}") == read("on_failure: [weak]")
    by_cause = read("on_failure: {error: [weak, strong], rate_limit: [strong], content_filter: []}")
    assert by_cause.on_failure == ("weak", "strong")
    assert by_cause.on_cause == {"rate_limit": ("strong",), "content_filter": ()}
    assert read("on_failure: {context_length: [strong]}").on_failure == ()


def test_deadlines_hedges_and_broken_streams() -> None:
    plain, auto = parse(BASE).routes
    assert (plain.deadline_ms, plain.hedge, plain.on_stream_failure) == (None, None, "error")
    lines = "deadline: 30s\n    hedge: {after: 800ms, max_extra: 2.5%}\n    on_stream_failure: resume"
    route = parse(changed("use: [local]", f"use: [local]\n    {lines}")).routes[0]
    assert (route.deadline_ms, route.hedge, route.on_stream_failure) == (30_000, Hedge(800, 0.025), "resume")
    hedged = parse(changed("use: [local]", "use: [local]\n    hedge: {after: 1s}")).routes[0]
    assert hedged.hedge == Hedge(1000, 0.05)
    assert auto.hedge is None


def test_a_broken_stream_needs_somebody_to_go_on() -> None:
    resume = changed("[local, weak, strong]", "[weak, strong]\n    on_stream_failure: resume")
    assert [(p.line, p.field) for p in problems(resume)] == [(18, "routes[1].on_stream_failure")]
    assert problems(resume.replace("resume", "resume\n    on_failure: {rate_limit: [local]}"))
    policy = parse(resume.replace("model: gpt-5, ", "model: gpt-5, prefix: true, "))
    assert [(model.name, model.prefix) for model in policy.models.values()] == [
        ("local", "leadline"),
        ("weak", None),
        ("strong", "deepseek"),
    ]
    assert problems(
        resume.replace("1024}", "1024, prefix: false}").replace("resume", "resume\n    on_failure: [local]")
    )


def test_what_each_limit_holds() -> None:
    text = BASE + (
        "  - {team: red, tokens: 100000/min, concurrency: 10}\n"
        '  - {run: "*", budget: $2/total, at: {95%: local, 80%: cheaper}}\n'
    )
    team, run = parse(text).limits[1:]
    assert (team.scope, team.name, team.tokens, team.concurrency) == ("team", "red", Rate(100_000, 60), 10)
    assert (run.scope, run.name, run.budget) == ("run", "*", Budget(2_000_000_000, "total"))
    assert run.at == (Threshold(80, "cheaper"), Threshold(95, "local"))
    assert parse(BASE.replace("rate: 600/min", "at: {100%: local}")).limits[0].at == (Threshold(100, "local"),)


LIMITS = """\
limits:
  - {key: "*", budget: $1/day, at: {50%: cheaper}, rate: 1/s}
  - {key: "*", budget: $2/month, tokens: 2/s, concurrency: 2}
  - {key: ci, budget: $3/hour}
  - {key: fast, rate: 4/s, concurrency: 4}
  - {key: big, tokens: 5/s, concurrency: 5}
  - {team: "*", rate: 6/s}
  - {team: red, rate: 7/s}
  - {tenant: acme, concurrency: 8}
  - {run: "*", budget: $9/total}
"""


@pytest.mark.parametrize(
    ("key", "team", "tenant", "expected"),
    [
        ("x", None, "t", ["0 budget rate", "1 budget tokens concurrency", "8 budget"]),
        ("ci", None, "t", ["0 rate", "1 tokens concurrency", "2 budget", "8 budget"]),
        ("fast", None, "t", ["0 budget", "1 budget tokens", "3 rate concurrency", "8 budget"]),
        ("big", None, "t", ["0 budget rate", "1 budget", "4 tokens concurrency", "8 budget"]),
        ("ci", "red", "acme", ["0 rate", "1 tokens concurrency", "2 budget", "6 rate", "7 concurrency", "8 budget"]),
        ("ci", "blue", "t", ["0 rate", "1 tokens concurrency", "2 budget", "5 rate", "8 budget"]),
    ],
)
def test_own_limits_replace_the_general_ones_kind_by_kind(
    key: str, team: str | None, tenant: str, expected: list[str]
) -> None:
    policy = parse(BASE[: BASE.index("limits:")] + LIMITS)
    wanted = []
    for line in expected:
        index, *kinds = line.split()
        limit = policy.limits[int(index)]
        wanted.append(
            replace(
                limit,
                budget=limit.budget if "budget" in kinds else None,
                at=limit.at if "budget" in kinds else (),
                rate=limit.rate if "rate" in kinds else None,
                tokens=limit.tokens if "tokens" in kinds else None,
                concurrency=limit.concurrency if "concurrency" in kinds else None,
            )
        )
    assert list(policy.limits_for(key=key, team=team, tenant=tenant)) == wanted


def test_limits_of_a_name_replace_the_general_ones() -> None:
    policy = parse(BASE + "  - {key: ci, rate: 10/s}\n  - {tenant: '*', budget: $9/day}\n")
    ci = policy.limits_for(key="ci", tenant="t")
    assert [(limit.name, limit.budget, limit.rate) for limit in ci] == [
        ("*", Budget(50_000_000_000, "month"), None),
        ("ci", None, Rate(10, 1)),
        ("*", Budget(9_000_000_000, "day"), None),
    ]
    assert policy.limits_for(key="other", tenant="t")[0] == policy.limits[0]
