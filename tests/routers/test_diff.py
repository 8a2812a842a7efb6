"""What changed between two policies: their fields in words, and which requests they decide otherwise."""

import pytest

from routers.diff import changes, sample_changes
from routers.load import parse
from routers.policy import Policy

PROMPT = "input $0.25/Mtok, cached_input $0.25/Mtok, cache_write $0.25/Mtok"
BASE = """\
version: 1
providers:
  home:   {engine: embedded}
  remote: {base_url: https://h/v1, timeout: 30s}
models:
  local:  {provider: home, model: bundled/base, context: 1024}
  weak:   {provider: remote, model: w, context: 32000, price: {input: $0.25/Mtok, output: $2/Mtok}}
  strong: {provider: remote, model: s, context: 64000, price: {input: $1.25/Mtok, output: $10/Mtok}}
signals:
  difficulty: {probe: default, heads: {weak: weak, strong: strong}}
routes:
  - {name: private, when: {tag: private}, use: [local]}
  - name: auto
    when: {model: auto}
    candidates: [weak, strong]
    subject_to: {p_success: ">= 0.90"}
limits:
  - {key: "*", budget: $50/month}
"""


def changed(*pairs: tuple[str, str]) -> Policy:
    text = BASE
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return parse(text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("# nothing", "", []),
        ("timeout: 30s", "timeout: 1min", ["~ providers.remote.timeout: 30s -> 1min"]),
        ("model: w,", "model: w2,", ["~ models.weak.upstream: w -> w2"]),
        (
            "$2/Mtok",
            "$3/Mtok",
            [
                f"~ models.weak.price: {PROMPT}, output $2/Mtok, reasoning $2/Mtok -> {PROMPT}, output $3/Mtok, "
                "reasoning $3/Mtok"
            ],
        ),
        (">= 0.90", ">= 0.95", ["~ routes.auto.constraints: p_success 0.9 -> p_success 0.95"]),
        ("tag: private", "tag: [private, secret]", ["~ routes.private.when: tags private -> tags private, secret"]),
        (
            "when: {tag: private}",
            "when: {tag: private, schedule: {days: mon-fri, hours: 09:00-17:00, zone: Europe/Berlin}}",
            [
                "~ routes.private.when: tags private -> tags private, schedule mon, tue, wed, thu, fri 09:00-17:00 "
                "Europe/Berlin"
            ],
        ),
        (
            "  - {name: private, when: {tag: private}, use: [local]}\n",
            "",
            ["- routes.private: when tags private, cache_ttl 1h, rule first available of local"],
        ),
        ("$50/month", "$60/month", ["- limits.key *: budget $50/month", "+ limits.key *: budget $60/month"]),
        ("heads: {weak: weak, ", "timeout: 1s, heads: {weak: weak, ", ["~ signals.difficulty.timeout: 250ms -> 1s"]),
    ],
)
def test_each_change_is_told_in_words(old: str, new: str, expected: list[str]) -> None:
    before = parse(BASE + "# nothing\n")
    assert [str(change) for change in changes(before, parse((BASE + "# nothing\n").replace(old, new)))] == expected


def test_the_order_of_routes_has_a_meaning() -> None:
    lines = BASE.splitlines(keepends=True)
    private = lines.pop(11)
    swapped = "".join(lines).replace("limits:", private + "limits:")
    assert [str(c) for c in changes(parse(BASE), parse(swapped))] == ["~ routes: order: private, auto -> auto, private"]


def test_sample_requests_show_what_a_change_does() -> None:
    before = parse(BASE)
    assert sample_changes(before, before)[0] == []
    moved, asked = sample_changes(before, changed((">= 0.90", ">= 0.95")))
    assert asked > 40
    assert {(one.query, one.before, one.after) for one in moved} == {
        ("auto, fairly easy", "weak", "strong"),
        ("auto, long, fairly easy", "weak", "strong"),
    }
    moved, _ = sample_changes(before, changed(("tag: private", "tag: [private, secret]")))
    assert {one.query for one in moved if one.query.startswith("auto, tag secret")}
    assert {(one.before, one.after) for one in moved if one.query == "weak, tag secret"} == {
        ("weak", "refused (not_allowed)")
    }


def test_a_schedule_is_sampled_on_both_sides() -> None:
    night = changed(("when: {tag: private}", "when: {model: auto, schedule: {days: sat-sun}}"))
    moved, _ = sample_changes(
        parse(BASE.replace("  - {name: private, when: {tag: private}, use: [local]}\n", "")), night
    )
    assert {one.after for one in moved if "at the weekend" in one.query and one.query.startswith("auto")} == {"local"}
    assert not [one for one in moved if one.query == "auto"]


CASCADE = "[weak>strong]\n    accept: {mean_logprob: 2, bias: 1, at_least: 0.8, keeps_right: 0.9, keeps_wrong: 0.1}"


def test_another_accept_rule_is_told_and_a_plans_own_name_is_not() -> None:
    before = changed(("[weak, strong]", CASCADE))
    after = changed(("[weak, strong]", CASCADE.replace("0.8", "0.7")))
    words = "mean_logprob 2, bias 1, at_least 0.8, keeps_right 0.9, keeps_wrong 0.1, unaccepted send"
    assert [str(change) for change in changes(before, after)] == [
        f"~ routes.auto.accept: {words} -> {words.replace('0.8', '0.7')}"
    ]
    agreed = changed(("[weak, strong]", '[weak, "weak&local>strong"]\n    accept: agree'))
    (_, rule) = changes(before, agreed)
    assert rule.after == "agree 2, unaccepted send"
    assert [change.field for change in changes(changed(), after)] == ["routes.auto.candidates", "routes.auto.accept"]


def test_what_is_explored_by_chance_is_no_change() -> None:
    """Both hold `weak` for best; a share of either goes to `strong`."""
    before, after = (
        changed(("[weak, strong]", f"[weak, strong]\n    explore: {{share: {share}}}")) for share in ("90%", "1%")
    )
    assert sample_changes(before, after)[0] == []
