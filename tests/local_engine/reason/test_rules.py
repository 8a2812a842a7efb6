"""The rules over thoughts made by hand: no model."""

import math
from dataclasses import dataclass

import pytest

from local_engine.plan_types import Exit
from local_engine.reason.artifact import Certified, ExitArtifact, ExitManifest, ExitProbe
from local_engine.reason.convergence import Convergence
from local_engine.reason.exits import ProbeExit, make_rule
from local_engine.reason.momentum import Momentum
from local_engine.reason.redundancy import Redundancy
from local_engine.reason.thought import FEATURES, Kind, Moment, Rule, Verdict, features
from local_engine.reason.watch import Notice, Watch

PASSES = ["2 + 2 = 5", "\n\n", "Wait", ",", " 2 + 2 = 4", "\n\n", "Wait", ",", " yes: ", "4", "\n\n", "Hmm", ".", " "]


def probe(**weights: float) -> ExitProbe:
    size = len(FEATURES)
    weight = tuple(weights.get(name, 0.0) for name in FEATURES)
    return ExitProbe((0.0,) * size, (1.0,) * size, weight, weights.get("bias", 0.0))


def artifact(*certified: Certified, **weights: float) -> ExitArtifact:
    manifest = ExitManifest(
        model="m", weights_sha256="", features=FEATURES, layers=(), certified=certified, budget_base=4.0,
        budget_per_prompt_token=0.5, n_fit=10, n_calibration=10, data_sha256="", created="2026-01-01", metrics={},
    )  # fmt: skip
    return ExitArtifact(manifest, probe(**weights))


def notices(rule: Rule, texts: list[str], logprobs: list[float] | None = None, most: int | None = None) -> list[Notice]:
    watch = Watch(rule, "rule", 10, max_tokens=most)
    found: list[Notice] = []
    for text, logprob in zip(texts, logprobs or [-0.1] * len(texts), strict=True):
        notice = watch.push(text, logprob, 0.2)
        if notice is not None:
            found.append(notice)
            if notice.verdict is Verdict.EXIT:
                break
    return found


def test_a_thought_is_cut_before_its_cue() -> None:
    (notice,) = notices(make_rule(Exit(rule="cue"), None, 10), PASSES)
    assert (notice.verdict, notice.moment.cut, notice.why) == (Verdict.EXIT, 2, "rule")


def test_redundancy_leaves_where_two_passes_come_to_the_same() -> None:
    (notice,) = notices(Redundancy(), PASSES)
    assert notice.moment.cut == 11, "5, then 4, then 4"
    assert notices(Redundancy(agree=3), PASSES) == []


def test_redundancy_gives_up_on_thoughts_that_never_agree() -> None:
    texts = [piece for n in range(6) for piece in (str(n), " ", "Wait", ",")]
    (notice,) = notices(Redundancy(most_parts=4), texts)
    assert notice.moment.cut == 14


def test_convergence_leaves_after_k_answers_in_a_row_that_agree() -> None:
    rule = Convergence(agree=2)
    moment = notices(rule, PASSES)[0].moment
    said = [rule.heard(moment, answer) for answer in ("It is 4.", "5", "", "", "It is 5.", "5.0")]
    assert said == [Verdict.GO_ON] * 5 + [Verdict.EXIT]


def test_momentum_goes_on_only_where_a_step_stood_out() -> None:
    steps = ["1", "\n\n", "2", "\n\n", "3", "\n\n", "Wait", ","]
    calm = [-0.01] * len(steps)
    (notice,) = notices(Momentum(), steps, calm)
    assert notice.verdict is Verdict.EXIT
    doubtful = [*calm[:2], -2.0, *calm[3:]]
    assert notices(Momentum(), steps, doubtful) == []
    (notice,) = notices(Momentum(gamma=0.2), steps, doubtful)
    assert notice.verdict is Verdict.EXIT, "a smaller gamma asks for more"


def test_a_budget_ends_at_the_first_step_end_past_it() -> None:
    texts = ["1", "\n\n", "2", "2", "\n\n", "3", "\n\n"]
    (notice,) = notices(make_rule(Exit(rule="budget", budget=3), None, 10), texts)
    assert notice.moment.cut == 5
    (notice,) = notices(make_rule(Exit(rule="budget"), artifact(), 4), texts)
    assert notice.moment.cut == 7, "4 + 0.5 for each of 4 prompt tokens"


def test_the_probe_leaves_above_its_threshold_only() -> None:
    logprobs = [-0.1] * len(PASSES)
    logprobs[4] = -3.0
    logprobs[6:11] = [-0.05] * 5
    surprised = probe(pass_min_logprob=1.0, bias=1.0)
    first, second = (1 / (1 + math.exp(-z)) for z in (0.9, -2.0))
    rule = ProbeExit(surprised, threshold=first)
    assert [notice.moment.cut for notice in notices(rule, PASSES, logprobs)] == [11], "calm again after the second cue"
    assert notices(ProbeExit(surprised, threshold=second), PASSES, logprobs)[0].moment.cut == 2


def test_features_are_read_up_to_the_cut_and_per_pass() -> None:
    @dataclass
    class Reader:
        kinds: frozenset[Kind] = frozenset({"cue"})
        measures: bool = True

        def look(self, moment: Moment) -> Verdict:
            read.append(dict(zip(FEATURES, features(moment), strict=True)))
            return Verdict.GO_ON

        def heard(self, moment: Moment, answer: str) -> Verdict:
            return Verdict.GO_ON

    read: list[dict[str, float]] = []
    logprobs = [-0.5, -0.1, -9.0, -9.0, -0.2, -0.1, *[-7.0] * 2, -0.3, -0.1, -0.1, *[-9.0] * 3]
    notices(Reader(), PASSES, logprobs)
    assert [one["cue"] for one in read] == [1.0, 2.0, 3.0]
    assert [one["pass_min_logprob"] for one in read] == [-0.5, -9.0, -7.0], "a pass begins with its cue"
    assert [one["agrees"] for one in read] == [0.0, 0.0, 1.0]
    assert read[0]["log_tokens"] == math.log1p(2)
    assert read[0]["pass_mean_logprob"] == pytest.approx(-0.3)


def test_limits_hold_whatever_the_rule() -> None:
    never = Exit(rule="none")
    (notice,) = notices(make_rule(never, None, 10), PASSES, most=5)
    assert (notice.why, notice.moment.cut) == ("limit", 5)
    endless = ["Wait", ", "] * 100
    (notice,) = notices(make_rule(never, None, 10), endless)
    assert notice.why == "loop"
    assert notice.moment.cut <= 64


def test_an_unread_measure_is_no_measure() -> None:
    (notice,) = notices(ProbeExit(probe(bias=9.0), 0.5), PASSES, [math.nan] * len(PASSES))
    assert notice.moment.cut == 2


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (Exit(agree=1), "plan.agree must be from 2"),
        (Exit(rule="momentum", gamma=0), "plan.gamma must be over 0"),
        (Exit(rule="budget", budget=0), "plan.budget must be at least 1"),
        (Exit(), "needs a fitted artifact"),
        (Exit(rule="budget"), "needs a fitted artifact"),
    ],
)
def test_a_rule_that_cannot_be_had_names_its_field(asked: Exit, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_rule(asked, None, 10)


def test_the_threshold_is_that_of_the_largest_delta_within_the_one_asked_for() -> None:
    fitted = artifact(
        Certified(0.1, "expected", "wrong", 0.5, 100),
        Certified(0.05, "expected", "wrong", 0.7, 100),
        Certified(0.05, "high_probability", "wrong", 0.8, 100),
    )
    assert fitted.manifest.threshold(0.07, "expected", "wrong") == 0.7
    assert fitted.manifest.threshold(0.05, "high_probability", "wrong") == 0.8
    with pytest.raises(ValueError, match=r"plan.delta 0.01 is not certified .* certified: 0.05, 0.1"):
        fitted.manifest.threshold(0.01, "expected", "wrong")
    with pytest.raises(ValueError, match="certified: no delta"):
        fitted.manifest.threshold(0.05, "expected", "harm")
    with pytest.raises(ValueError, match="between 0 and 1"):
        fitted.manifest.threshold(1.5, "expected", "wrong")
