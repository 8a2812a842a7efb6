"""All that is wrong with a policy is told: where, what, and what to write instead."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.errors import PolicyError
from routers.load import parse
from routers.policy import Policy
from tests.routers.policies import BASE, ENV, HEADS, LIMIT, LOCAL, P90, PRIVATE, URL, WEAK_PRICE, changed, problems


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
    case(
        "embedded}",
        "embedded, priority_scheduling: true}",
        3,
        "providers.home.priority_scheduling",
        "vLLM",
        "remove it",
    ),
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
    case("context: 1024", "completes: true", 6, "models.local.completes", "takes conversations only", "remove it"),
    case("context: 1024", 'speculation: "draft:local"', 6, "models.local.speculation", "the model itself", "smaller"),
    case(
        LOCAL,
        f"{LOCAL}\n  same: {{provider: home, model: bundled/base, speculation: auto+draft:local}}",
        7,
        "models.same.speculation",
        "`local` is the model itself",
        "same tokenizer",
    ),
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
