"""A policy loads whole, or says everything that is wrong with it: where, what, and what to write instead."""

import contextlib
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies import accept_numbers
from routers.aims import Guarantee
from routers.errors import PolicyError, Problem
from routers.load import load, parse, preset
from routers.policy import Breaker, Difficulty, Hedge, Listing, Policy, Price, Provider, Route, Threshold
from routers.schema import policy_schema
from routers.types import Query
from routers.units import Budget, Rate
from routers.yaml import read

POLICIES = Path(__file__).parents[2] / "policies"
RULES = partial(accept_numbers, POLICIES)

BASE = """\
version: 1
providers:
  home:   {engine: embedded}
  openai: {base_url: https://api.openai.com/v1, api_key: env:OPENAI_API_KEY}
models:
  local:  {provider: home, model: bundled/base, context: 1024}
  weak:   {provider: openai, model: gpt-5-mini, price: {input: $0.25/Mtok, output: $2/Mtok}}
  strong: {provider: openai, model: gpt-5, price: {input: $1.25/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: default, heads: {local: local, weak: weak, strong: strong}}
routes:
  - name: private
    when: {tag: private}
    use: [local]
  - name: auto
    when: {model: auto}
    candidates: [local, weak, strong]
    subject_to: {p_success: ">= 0.90"}
limits:
  - {key: "*", budget: $50/month, rate: 600/min}
"""


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(PolicyError) as caught:
        parse(text, file="p.yaml")
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new, 1)


def case(old: str, new: str, line: int, field: str, message: str, fix: str) -> object:
    return pytest.param(changed(old, new), line, field, message, fix, id=f"{field or 'file'}: {message}")


def on_route(lines: str, field: str, message: str, fix: str) -> object:
    """A problem on the last of these lines, which follow `use` in the first route."""
    return case("use: [local]", f"use: [local]\n    {lines}", 15 + lines.count("\n"), field, message, fix)


def when(conditions: str, field: str, message: str, fix: str) -> object:
    """A problem of the second route's conditions."""
    return case(
        "when: {model: auto}", f"when: {{{conditions}}}", 16, f"routes[1].when.{field}".rstrip("."), message, fix
    )


def guaranteed(guarantee: str, field: str, message: str, fix: str) -> object:
    """A problem of the second route's guarantee."""
    new = f"    guarantee: {guarantee}\n    subject_to"
    return case("    subject_to", new, 18, f"routes[1].guarantee{field}", message, fix)


LOCAL = "local:  {provider: home, model: bundled/base, context: 1024}"
WEAK_PRICE = "{input: $0.25/Mtok, output: $2/Mtok}"
ENV = "env:OPENAI_API_KEY"
LIMIT = '{key: "*", budget: $50/month, rate: 600/min}'
URL = "https://api.openai.com/v1"
P90 = '{p_success: ">= 0.90"}'
HEADS = "heads: {local: local, weak: weak, strong: strong}"
PRIVATE = "when: {tag: private}"

CASES = [
    # the file
    case("version: 1", "version: 2", 1, "version", "not a version", "version: 1"),
    case("version: 1", "version: 1.0", 1, "version", "not a version", "version: 1"),
    case("version: 1", 'version: "1"', 1, "version", "not a version", "version: 1"),
    case("version: 1\n", "", 1, "", "`version` is missing", "version: 1"),
    case("signals:", "signal:", 9, "signal", "unknown key", "did you mean `signals`?"),
    case("version: 1", "version: 1\nversion: 1", 2, "version", "given twice, first on line 1", "keep one"),
    case("limits:", "limits:\nroutes:", 20, "routes", "given twice, first on line 11", "keep one"),
    case(PRIVATE, "when: {tag: }", 13, "routes[0].when.tag", "there is no value", "remove the key"),
    case(PRIVATE, "when: {tag: [private]", 14, "", "not YAML", "correct"),
    case("embedded}", "&a embedded}", 3, "providers.home.engine", "anchors", "write the value out"),
    case("embedded}", "*a}", 3, "providers.home.engine", "anchors", "write the value out"),
    case("embedded}", "!!python/name:os.system x}", 3, "providers.home.engine", "tags are not read", "remove the tag"),
    case("limits:", "---\nlimits:", 19, "", "a second document", "one policy per file"),
    case("[local]", "[" * 20 + "]" * 20, 14, "", "nested deeper", "flatten"),
    case("limits:", "? [a]\n: b\nlimits:", 19, "", "a key must be a plain word", "key: value"),
    # providers
    case("embedded", "embeded", 3, "providers.home.engine", "not one of", "did you mean `embedded`?"),
    case("{engine: embedded}", "{timeout: 1s}", 3, "providers.home", "neither", "base_url"),
    case("{engine: embedded}", f"{{engine: embedded, base_url: {URL}}}", 3, "providers.home", "both", "engine"),
    case("embedded}", "embedded, api_key: env:X}", 3, "providers.home.api_key", "asks for no key", "remove it"),
    case(ENV, "OPENAI_API_KEY", 4, "providers.openai.api_key", "not the name", "env:OPENAI_API_KEY"),
    case(URL, "ftp://host", 4, "providers.openai.base_url", "not an http", "https://api.openai.com/v1"),
    case(URL, "https://", 4, "providers.openai.base_url", "not an http", "https://api.openai.com/v1"),
    case(URL, "https://h:port/v1", 4, "providers.openai.base_url", "not an address", "https://"),
    case(URL, "https://u:p@h/v1", 4, "providers.openai.base_url", "a user or a password", "env:NAME"),
    case(URL, '"https://h/v1?key=x"', 4, "providers.openai.base_url", "a query", "end the address"),
    case(ENV, f"{ENV}, timeout: 60", 4, "providers.openai.timeout", "without its unit", "250ms"),
    case(ENV, f"{ENV}, timeout: 0s", 4, "providers.openai.timeout", "zero", "longer"),
    case(ENV, f"{ENV}, retries: 99", 4, "providers.openai.retries", "too large", "10 or less"),
    case(ENV, f"{ENV}, retries: two", 4, "providers.openai.retries", "not a whole number", "whole number"),
    case(ENV, f"{ENV}, retrys: 2", 4, "providers.openai.retrys", "unknown key", "did you mean `retries`?"),
    case("providers:", "providers: {}\nx:", 2, "providers", "empty", "one named entry per line"),
    case("providers:", "providers: []\nx:", 2, "providers", "not a mapping", "one named entry per line"),
    case("limits:", "limits: 7\nx:", 19, "limits", "not a list", "dash"),
    case(
        ENV, f"{ENV}, connect_timeout: 61s", 4, "providers.openai.connect_timeout", "longer than `timeout`", "most 1min"
    ),
    case(ENV, f"{ENV}, first_byte_timeout: 2min", 4, "providers.openai.first_byte_timeout", "longer", "a longer `time"),
    case(ENV, f"{ENV}, timeout: 5s, idle_timeout: 6s", 4, "providers.openai.idle_timeout", "longer", "at most 5s"),
    case(
        "embedded}", "embedded, connect_timeout: 1s}", 3, "providers.home.connect_timeout", "in this machine", "remove"
    ),
    case(ENV, f"{ENV}, breaker: on", 4, "providers.openai.breaker", "not a mapping", "key: value"),
    case(ENV, f"{ENV}, breaker: {{failures: 0}}", 4, "providers.openai.breaker.failures", "too small", "1 or more"),
    case(ENV, f"{ENV}, breaker: {{opens: 1s}}", 4, "providers.openai.breaker.opens", "unknown key", "mean `open`"),
    # models
    case("{provider: home,", "{provider: hom,", 6, "models.local.provider", "no provider", "did you mean `home`?"),
    case("{provider: home, ", "{", 6, "models.local.provider", "missing", "add `provider:`"),
    case(LOCAL, "a+b: {provider: home, model: x}", 6, "models.a+b", "cannot be used", "letters, digits"),
    case(LOCAL, "local: bundled/base", 6, "models.local", "not a mapping", "key: value"),
    case("context: 1024", "context: 0", 6, "models.local.context", "too small", "1 or more"),
    case("context: 1024", "context: true", 6, "models.local.context", "not a whole number", "whole number"),
    case("context: 1024", "context: 9, max_output: 10", 6, "models.local.max_output", "longer than the context", "9"),
    case("context: 1024", "speculation: fast", 6, "models.local.speculation", "not a way to draft", "`auto`"),
    case(
        "model: gpt-5-mini", "model: m, speculation: auto", 7, "models.weak.speculation", "only the local", "remove it"
    ),
    case("context: 1024", "tools: off", 6, "models.local.tools", "neither true nor false", "true or false"),
    case("model: gpt-5-mini", "model: 5", 7, "models.weak.model", "not text", "in quotes"),
    case(f", price: {WEAK_PRICE}", "", 7, "models.weak", "missing price", "price: {input:"),
    case(f", price: {WEAK_PRICE}", "", 7, "models.weak", "missing price", "or say `price: unpriced`"),
    case(WEAK_PRICE, "cheap", 7, "models.weak.price", "not a price", "write free, unpriced, or"),
    case("$0.25/Mtok", "0.25", 7, "models.weak.price.input", "without its unit", "$0.25/Mtok"),
    case("$0.25/Mtok", "$0.25", 7, "models.weak.price.input", "not a price", "$0.25/Mtok"),
    case("$0.25/Mtok", "$0.0000000001/Mtok", 7, "models.weak.price.input", "finer than", "nine decimals"),
    case("output: $2/Mtok", "outputs: $2/Mtok", 7, "models.weak.price.outputs", "unknown key", "`output`?"),
    # signals
    case("{local: local,", "{lokal: local,", 10, "signals.difficulty.heads.lokal", "no model", "did you mean `local`?"),
    case(HEADS, "heads: {}", 10, "signals.difficulty.heads", "empty", "at least one"),
    case("difficulty:", "dificulty:", 10, "signals.dificulty", "unknown key", "did you mean `difficulty`?"),
    # routes
    case("use: [local]", "use: [locl]", 14, "routes[0].use[0]", "no model of this name", "did you mean `local`?"),
    case("use: [local]", "use: []", 14, "routes[0].use", "empty", "at least one"),
    case("use: [local]", "use: local", 14, "routes[0].use", "not a list", "[a, b]"),
    case("use: [local]", "use: [local, local]", 14, "routes[0].use[1]", "listed twice", "keep one"),
    case(
        "use: [local]",
        "use: [local+think]",
        14,
        "routes[0].use[0]",
        "stand among `candidates` only",
        "the model alone, `local`",
    ),
    case("[local, weak,", "[local>weak,", 17, "routes[1].candidates", "which answers are good enough", "add `accept"),
    case("use: [local]", "on_failure: [local]", 12, "routes[0]", "neither use nor candidates", "use: […]"),
    case("use: [local]", "use: [local]\n    candidates: [weak]", 12, "routes[0]", "both", "use: […]"),
    case("use: [local]", "use: [local]\n    objective: best", 15, "routes[0].objective", "no meaning", "candidates"),
    case("[local, weak, strong]", "[local]\n    objective: worst", 18, "routes[1].objective", "not one of", "write"),
    case(P90, '{p_success: ">= 1.5"}', 18, "routes[1].subject_to.p_success", "nothing can satisfy", "between 0 and 1"),
    case(P90, '{p_success: "<= 0.9"}', 18, "routes[1].subject_to.p_success", "not a bound", '">= 0.90"'),
    case(P90, "{p_success: >= 0.9}", 18, "", "not YAML", "needs quotes"),
    case(P90, "\n      p_success: >= 0.9", 19, "", "not YAML", "needs quotes"),
    case('key: "*"', "key: *", 20, "", "not YAML", "needs quotes"),
    case(P90, "{p_success: 0.9}", 18, "routes[1].subject_to.p_success", "not a bound", '">= 0.90"'),
    case(P90, '{p_success: ">= 90%"}', 18, "routes[1].subject_to.p_success", "not a probability", "between 0 and 1"),
    case(P90, '{p_success_gap: "<= 2"}', 18, "routes[1].subject_to.p_success_gap", "always satisfied", "0.10"),
    case(P90, '{cost: "<= 1"}', 18, "routes[1].subject_to.cost", "not an amount", "$0.01"),
    case(P90, '{pace: "<= 1s"}', 18, "routes[1].subject_to.pace", "unknown key", "p_success, p_success_gap, cost"),
    case(f"    subject_to: {P90}", "    otherwise: refuse", 18, "routes[1].otherwise", "no `subject_to`", "remove"),
    case("name: auto", "name: private", 15, "routes[1].name", "the name of routes[0]", "of its own"),
    case("name: auto", 'name: "a b"', 15, "routes[1].name", "this name cannot be used", "letters, digits"),
    case("name: auto", "name: named", 15, "routes[1].name", "reserved", "of its own"),
    case(
        "when: {model: auto}",
        PRIVATE,
        16,
        "routes[1].when",
        "unreachable: all of this is already taken by `private`",
        "move it before",
    ),
    case("    when: {tag: private}\n", "", 12, "routes[0]", "unreachable", "move this route to the end"),
    case("{model: auto}", "{model: weak}", 16, "routes[1].when.model", "goes straight to it", "another alias"),
    case("{model: auto}", "{model: [auto, weak]}", 16, "routes[1].when.model[1]", "goes straight", "use: [weak]"),
    case("{model: auto}", "{model: auto, hour: 9}", 16, "routes[1].when.hour", "unknown key", "tag, model, tenant"),
    when("model: auto, schedule: {days: monday}", "schedule.days[0]", "neither a day", "mon-fri"),
    when("model: auto, schedule: {days: []}", "schedule.days", "empty", "at least one"),
    when("model: auto, schedule: {hours: 9-17}", "schedule.hours[0]", "not a span of hours", "09:00-18:00"),
    when("model: auto, schedule: {hours: 25:00-26:00}", "schedule.hours[0]", "not a span of hours", "09:00-18:00"),
    when("model: auto, schedule: {hours: 08:00-08:00}", "schedule.hours[0]", "starts where it ends", "00:00-24:00"),
    when("model: auto, schedule: {zone: Europe/Berlino}", "schedule.zone", "no time zone", "Europe/Berlin"),
    when("model: auto, schedule: {day: mon}", "schedule.day", "unknown key", "did you mean `days`?"),
    when("model: auto, share: 0.1", "share", "a share without its unit", "5%"),
    when("model: auto, share: 0%", "share", "not between", "more than 0%"),
    when("model: auto, endpoint: chat", "endpoint[0]", "not one of the choices", "chat.completions"),
    when("model: auto, needs: [tool]", "needs[0]", "not one of the choices", "did you mean `tools`?"),
    when("model: auto, input_tokens: 1000", "input_tokens", "a range without its sign", '">= 1000"'),
    when('model: auto, input_tokens: "> 9"', "input_tokens", "not a range of tokens", '">= 1000"'),
    when('model: auto, input_tokens: ">= 9 and <= 8"', "input_tokens", "an empty range", "lower bound first"),
    when("model: auto, not: {tags: x}", "not.tags", "unknown key", "did you mean `tag`?"),
    when("model: auto, not: {share: 5%}", "not.share", "unknown key", "write one of"),
    when("model: auto, not: {}", "not", "empty", "at least one condition"),
    when("model: auto, not: {model: auto}", "", "unreachable: these conditions never hold together", "remove one"),
    when("model: auto, keys: ci", "keys", "unknown key", "did you mean `key`?"),
    case("use: [local]", "use: [local]\n    cache: on", 15, "routes[0].cache", "not a mapping", "key: value"),
    case("use: [local]", "use: [local]\n    cache: {ttl: 0s}", 15, "routes[0].cache.ttl", "zero", "longer"),
    on_route("on_failure: [wek]", "routes[0].on_failure[0]", "no model of this name", "did you mean `weak`?"),
    on_route("on_failure: [7]", "routes[0].on_failure[0]", "not text", "in quotes"),
    on_route("on_failure: []", "routes[0].on_failure", "empty", "at least one"),
    on_route("on_failure: {}", "routes[0].on_failure", "empty", "lists by cause"),
    on_route("on_failure: weak", "routes[0].on_failure", "not a mapping", "key: value"),
    on_route("on_failure: {error: []}", "routes[0].on_failure.error", "empty", "at least one"),
    on_route("on_failure: {rate_limit: [wek]}", "routes[0].on_failure.rate_limit[0]", "no model", "mean `weak`?"),
    on_route("on_failure: {timeout: [weak]}", "routes[0].on_failure.timeout", "unknown key", "error, rate_limit"),
    on_route("deadline: 30", "routes[0].deadline", "without its unit", "250ms"),
    on_route("hedge: {max_extra: 5%}", "routes[0].hedge.after", "missing", "add `after:`"),
    on_route("hedge: {after: 1s, max_extra: 5}", "routes[0].hedge.max_extra", "a share without its unit", "5%"),
    on_route("hedge: {after: 1s, max_extra: 0%}", "routes[0].hedge.max_extra", "not between", "at most 100%"),
    on_route("hedge: {after: 1s, max_extra: 101%}", "routes[0].hedge.max_extra", "not between", "at most 100%"),
    on_route("hedge: {after: 1s, max_extra: '5'}", "routes[0].hedge.max_extra", "not a percentage", "5%"),
    on_route(
        "deadline: 1s\n    hedge: {after: 1s}", "routes[0].hedge.after", "the deadline of 1s comes first", "shorter"
    ),
    on_route("on_stream_failure: again", "routes[0].on_stream_failure", "not one of the choices", "error, resume"),
    case("context: 1024", "draft: bundled/nano", 6, "models.local.draft", "unknown key", "speculation: draft:MODEL"),
    guaranteed("{loss: weak_wrong_strong_right, at_most: 5%}", ".at_most", "not a number", "without quotes"),
    guaranteed("{loss: weak_wrong_strong_right, at_most: 1}", ".at_most", "too large", "less than 1"),
    guaranteed("{loss: errors, at_most: 0.1}", ".loss", "not one of", "weak_wrong_strong_right"),
    guaranteed("{loss: accepted_wrong, at_most: 0.1, confidence: 100%}", ".confidence", "nothing is sure", "95%"),
    case(
        "[local, weak, strong]",
        "[local]\n    guarantee: {loss: accepted_wrong, at_most: 0.1}",
        18,
        "routes[1].guarantee",
        "one candidate",
        "name more",
    ),
    guaranteed("{loss: accepted_wrong}", ".at_most", "missing", "add `at_most:`"),
    # limits
    case('key: "*"', 'key: "*", tenant: a', 20, "limits[0]", "both key and tenant", "one of them"),
    case('key: "*", ', "", 20, "limits[0]", "neither key nor team", "one of them"),
    case(", budget: $50/month, rate: 600/min", "", 20, "limits[0]", "limits nothing", "add `budget"),
    case("$50/month", "$50/year", 20, "limits[0].budget", "not a budget", "month"),
    case("600/min", "0/min", 20, "limits[0].rate", "admits nobody", "at least 1"),
    case("600/min", "600", 20, "limits[0].rate", "without its unit", "600/min"),
    case(LIMIT, f"{LIMIT}\n  - {LIMIT}", 21, "limits[1].budget", "the same limit as in limits[0]", "keep one"),
    case('key: "*"', 'run: "a"', 20, "limits[0].run", "not one of the choices", "write one of: *"),
    case('key: "*"', 'team: "a b"', 20, "limits[0].team", "not a name", "the name of the team"),
    case('key: "*"', "team: a, tenant: b", 20, "limits[0]", "both team and tenant", "one of them"),
    case("600/min", "600/min, tokens: 9", 20, "limits[0].tokens", "without its unit", "tokens per s"),
    case("600/min", "600/min, tokens: x/min", 20, "limits[0].tokens", "not a rate", "100000/min"),
    case("600/min", "600/min, concurrency: 0", 20, "limits[0].concurrency", "too small", "1 or more"),
    case("budget: $50/month", "at: {80%: cheaper}", 20, "limits[0].at", "a share of no budget", "add `budget"),
    case("600/min", "600/min, at: {}", 20, "limits[0].at", "empty", "at least one"),
    case("600/min", "600/min, at: {80: local}", 20, "limits[0].at.80", "not a percentage", "5%"),
    case("600/min", "600/min, at: {0%: local}", 20, "limits[0].at.0%", "not between", "at most 100%"),
    case("600/min", "600/min, at: {7.5%: local}", 20, "limits[0].at.7.5%", "not a whole percentage", "80%"),
    case("600/min", "600/min, at: {80%: lokal}", 20, "limits[0].at.80%", "not one of", "did you mean `local`?"),
    case("600/min", "600/min, at: {100%: cheaper}", 20, "limits[0].at.100%", "nothing is left", "100%: local"),
    case("600/min", "600/min, at: {9%: local, 80%: cheaper}", 20, "limits[0].at.80%", "`local` holds from 9%", "first"),
    case("600/min", "600/min, at: {80%: local, 90%: local}", 20, "limits[0].at.90%", "changes nothing", "remove it"),
    case(LIMIT, '{key: "*", tokens: 1/s}\n  - {key: "*", tokens: 2/s}', 21, "limits[1].tokens", "the same", "keep one"),
    case('key: "*"', 'key: "a b"', 20, "limits[0].key", "not a name", "the name given to the key"),
]


@pytest.mark.parametrize(("text", "line", "field", "message", "fix"), CASES)
def test_each_problem_has_its_line_and_its_fix(text: str, line: int, field: str, message: str, fix: str) -> None:
    found = problems(text)
    matching = [p for p in found if message in p.message]
    assert matching, found
    problem = matching[0]
    assert (problem.line, problem.file) == (line, "p.yaml")
    assert field in problem.field
    assert fix in problem.fix
    assert str(problem).startswith(f"p.yaml:{line}: ")


def test_all_problems_are_told_at_once_in_line_order() -> None:
    text = changed("embedded", "embeded").replace("$2/Mtok", "2").replace("use: [local]", "use: [locl]")
    text = text.replace("600/min", "600").replace(">= 0.90", ">= 9")
    found = problems(text)
    assert [p.line for p in found] == [3, 7, 14, 18, 20]
    assert "Fix: did you mean `local`?" in str(found[2])


def test_one_mistake_does_not_hide_another_in_the_same_entry() -> None:
    text = changed("use: [local]", "uze: [local]\n    on_failure: [locl]").replace(
        "{provider: home,", "{provider: hom, x: 1,"
    )
    assert [p.field for p in problems(text)] == [
        "models.local.provider",
        "models.local.x",
        "routes[0].uze",
        "routes[0].on_failure[0]",
    ]


def test_a_broken_model_is_not_also_an_unknown_one() -> None:
    assert len(problems(changed("context: 1024", "context: many"))) == 1


def test_an_empty_value_is_told_once() -> None:
    assert len(problems(changed("model: bundled/base", "model:"))) == 1
    assert len(problems(changed("use: [local]", "use: [local, ~]"))) == 1


def test_bounds_on_p_success_need_heads() -> None:
    assert (
        "no candidate has a probe head"
        in problems(changed(HEADS, "heads: {local: x}").replace("[local, w", "[w"))[0].message
    )
    gap = changed(P90, '{p_success_gap: "<= 0.1"}').replace(HEADS, "heads: {weak: x}")
    assert "no probe head for local, strong" in problems(gap)[0].message
    without = re.sub(r"signals:\n.*\n", "", changed(f"subject_to: {P90}", "objective: best"))
    assert problems(without)[0].field == "routes[1].objective"


def test_a_cost_of_zero_needs_a_free_candidate() -> None:
    text = changed(P90, '{cost: "<= $0"}')
    parse(text)
    assert "the shortest call of the cheapest" in problems(text.replace("[local, weak,", "[weak,"))[0].message


def test_two_routes_together_can_make_a_third_unreachable() -> None:
    routes = """
  - {name: a, when: {tag: x}, use: [local]}
  - {name: b, when: {tag: y}, use: [local]}
  - {name: c, when: {tag: [x, y], model: auto}, use: [local]}
"""
    text = BASE[: BASE.index("routes:")] + "routes:" + routes
    assert "already taken by `a` and `b`" in problems(text)[0].message
    parse(text.replace("[x, y]", "[x, z]"))


SECRET = "sk-proj-Abc123Def456Ghi789"  # shaped like a key, and none


@pytest.mark.parametrize(
    "text",
    [
        changed(ENV, SECRET),
        changed(ENV, f"[{SECRET}]"),
        changed(ENV, f"{{value: {SECRET}}}"),
        changed(f"api_key: {ENV}", f"apikey: {SECRET}"),
        changed(URL, f"https://user:{SECRET}@h/v1"),
        changed(URL, f'"https://h/v1?key={SECRET}"'),
        changed(URL, f"https://h/v1?key={SECRET}"),
        changed("use: [local]", f"use: [{SECRET}>weak]"),
        changed(URL, SECRET),
        changed("model: gpt-5-mini", f"model: gpt, token: {SECRET}"),
        changed('key: "*"', f"key: {SECRET}"),
        changed("use: [local]", f"use: [{SECRET}]"),
        changed("engine: embedded", f"engine: {SECRET}"),
        changed("[local, weak, strong]", f"[{SECRET}]").replace('{p_success: ">= 0.90"}', '{p_success_gap: "<= 0.1"}'),
        changed(f", price: {WEAK_PRICE}", "").replace("gpt-5-mini", SECRET),
        changed("  home: ", f"  {SECRET}: 1\n  home: "),
        changed("  home: ", f"  home: {{{SECRET}: 1}}\n  home: "),
        changed(ENV, f"{ENV}, api_key: {SECRET}"),
        changed(ENV, f'"{SECRET}'),
        changed(ENV, f"*{SECRET}"),
        changed(ENV, f"!{SECRET} x"),
    ],
)
def test_a_secret_is_never_told(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert "Abc123" not in str(caught.value)
    assert "Abc123" not in repr(caught.value.problems)
    assert caught.value.__context__ is None or "Abc123" not in str(caught.value.__context__)


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert all(p.line >= 1 and p.fix for p in caught.value.problems)


@given(st.integers(min_value=0, max_value=len(BASE) - 1), st.sampled_from(list("{}[]:,'\"&*!|>%@-#?\t\n\0x1$ ")))
def test_a_damaged_policy_loads_or_raises_a_policy_error(position: int, character: str) -> None:
    text = BASE[:position] + character + BASE[position + 1 :]
    with contextlib.suppress(PolicyError):
        assert isinstance(parse(text), Policy)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: &x [1]\n" + "".join(f"b{i}: [*x, *x]\n" for i in range(99)), "a" * 300_000, "- 1\n" * 60_000],
    ids=["deep", "aliases", "long", "many"],
)
def test_hostile_files_are_refused_early(text: str) -> None:
    assert problems(text)


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
    assert policy.cache_ttl_ms_for(Query("auto", "t", 1, None, tags=frozenset({"private"}))) is None
    assert policy.cache_ttl_ms_for(Query("auto", "t", 1, None)) == 2 * 86_400_000
    assert policy.cache_ttl_ms_for(Query("weak", "t", 1, None)) == 3_600_000


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


@pytest.mark.parametrize("name", ["default", "openai"])
def test_presets_load(name: str) -> None:
    policy = parse(preset(name), file=name)  # type: ignore[arg-type]  # the names are what is tested
    assert policy.aliases == ("auto",)


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError, match="no preset `x`; there are default, openai"):
        preset("x")  # type: ignore[arg-type]  # the wrong name is the test


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_alone_and_say_when_to_choose_them(path: Path) -> None:
    assert load(path, rules=RULES).aliases == ("auto",)
    assert "# Choose this when" in path.read_text(encoding="utf-8")


def written_keys(schema: dict[str, Any], node: object, of: str, seen: set[str]) -> None:
    """Adds `Definition.key` for each key of `node`, read as an instance of that definition."""
    definition = schema["$defs"][of] if of else schema
    assert isinstance(node, dict)
    for key, value in node.items():
        seen.add(f"{of}.{key}")
        shape = definition["properties"][key]
        values = value if isinstance(value, list) else [value]
        if "additionalProperties" in shape or "patternProperties" in shape:  # named entries
            values = list(value.values())
        for inner in re.findall(r"#/\$defs/(\w+)", json.dumps(shape)):
            for part in values:
                if isinstance(part, dict):
                    written_keys(schema, part, inner, seen)


def test_the_reference_shows_every_field() -> None:
    schema, seen = policy_schema(), set[str]()
    written_keys(schema, read((POLICIES / "reference.yaml").read_text(encoding="utf-8"), "r").data, "", seen)
    fields = {f"{name}.{key}" for name, of in schema["$defs"].items() for key in of["properties"]}
    assert seen == fields | {f".{key}" for key in schema["properties"]}


def test_what_the_reference_calls_a_default_is_one() -> None:
    text = (POLICIES / "reference.yaml").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    bare = []
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        opens = index + 1 < len(lines) and len(lines[index + 1]) - len(lines[index + 1].lstrip()) > indent
        if not re.search(r"# default( |$|,|;)", line) or opens:
            bare.append(line)
    assert len(bare) < len(lines) - 12
    assert parse("".join(bare), rules=RULES).version_hash == parse(text, rules=RULES).version_hash


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"# mine\nversion: \xff")
    with pytest.raises(PolicyError, match=r"mine.yaml:2: not UTF-8"):
        load(path)


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((POLICIES / "schema.json").read_text(encoding="utf-8"))
    assert published == policy_schema(), "write policies/schema.json from routers.schema.policy_schema()"


def test_the_schema_knows_every_key_of_the_recipes() -> None:
    schema = json.dumps(policy_schema())
    for key in ("providers", "p_success_gap", "on_failure", "cached_input", "logprobs"):
        assert f'"{key}"' in schema


DESIGNED = """\
version: 1
providers:
  home:   {engine: embedded}
  openai: {base_url: https://api.openai.com/v1, api_key: env:OPENAI_API_KEY}
models:
  local:  {provider: home, model: bundled/base, draft: bundled/draft}
  strong: {provider: openai, model: gpt-5}
signals:
  difficulty: {probe: default}
routes:
  - name: private
    when: {tag: private}
    use: [local]
  - name: auto
    when: {model: auto}
    objective: cheapest
    subject_to: {p_success: ">= 0.90", ttft_p95: "<= 1.5s", cost: "<= $0.01"}
    candidates: [local, local+think, local>strong, strong]   # ">" is a cascade
    guarantee: {loss: weak_wrong_strong_right, at_most: 0.05}
    on_failure: [strong, local]
limits:
  - {key: "*", budget: $50/month, rate: 600/min}
  - {run: "*", budget: $2, at: {80%: cheaper, 100%: local}}
"""
"""The design's sketch of a policy."""
GPT_5 = Listing(Price(1_250_000_000, 125_000_000, 1_250_000_000, 10_000_000_000, 10_000_000_000), 400_000, 128_000)


def test_the_designs_sketch_loads_once_what_is_wrong_with_it_is_mended() -> None:
    with pytest.raises(PolicyError) as caught:
        parse(DESIGNED, prices=lambda provider, model: GPT_5)
    found = {(problem.line, problem.field): problem.fix for problem in caught.value.problems}
    assert found[6, "models.local.draft"] == "write `speculation: draft:MODEL`, with the model that drafts"
    assert found[19, "routes[1].guarantee"] == "remove the one or the other"  # a cascade
    assert (23, "limits[1].budget") not in found
    mended = DESIGNED.replace("draft: bundled/draft", "speculation: draft:bundled/draft").replace(
        "[local, local+think, local>strong, strong]", "[local, strong]"
    )
    policy = parse(mended, prices=lambda provider, model: GPT_5)
    auto = policy.routes[1]
    assert auto.candidates == ("local", "strong")
    assert auto.heads == {"local": "local", "strong": "strong"}
    assert auto.rule == "cheapest with p_success >= 0.9 and cost <= $0.01 and ttft_p95 <= 1500ms"
    assert auto.guarantee == Guarantee("weak_wrong_strong_right", 0.05)
    assert policy.limits[1].budget == Budget(2_000_000_000, "total")


def test_heads_are_those_of_the_models_names_where_none_are_named() -> None:
    assert parse(changed(HEADS, "timeout: 1s")).difficulty == Difficulty(
        ("default",), {"local": "local", "weak": "weak", "strong": "strong"}, 1000
    )
