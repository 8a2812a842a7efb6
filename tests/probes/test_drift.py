"""The alarm stays silent on what is calibrated, however long and however often one looks, and hears what is not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.drift import BETTORS, DriftAlarm

PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=60)


def pairs(seed: int, n: int, shift: float = 0.0, since: int = 0) -> list[tuple[float, float]]:
    """Probabilities, and outcomes that come true `shift` more often from observation `since` on."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        p = rng.betavariate(3, 1.5)
        chance = min(1.0, max(0.0, p + (shift if i >= since else 0.0)))
        found.append((p, float(rng.random() < chance)))
    return found


def alarmed_at(observed: list[tuple[float, float]], **options: float) -> int | None:
    alarm = DriftAlarm(**options)
    for p, outcome in observed:
        alarm.see(p, outcome)
    return alarm.alarmed_at


def test_false_alarms_over_a_life_are_rarer_than_delta() -> None:
    """At the border of the null (off by the whole tolerance), where bets are fair, and delta so large that it shows."""
    for shift in (0.0, 0.05, -0.05):
        false = sum(alarmed_at(pairs(seed, 600, shift), delta=0.2) is not None for seed in range(120))
        assert false <= 0.2 * 120
    # Without a tolerance the fair game is that of calibrated outcomes.
    assert sum(alarmed_at(pairs(seed, 600), delta=0.2, tolerance=0.0) is not None for seed in range(120)) <= 0.2 * 120


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1))
def test_no_bet_is_expected_to_win_while_calibration_holds(p: float, tolerance: float, where: float) -> None:
    chance = min(1.0, max(0.0, p + (2 * where - 1) * tolerance))
    for bettor in BETTORS:
        won, lost = bettor.factor(p, 1.0, tolerance), bettor.factor(p, 0.0, tolerance)
        assert min(won, lost) >= 0
        assert chance * won + (1 - chance) * lost <= 1 + 1e-12


@given(PAIRS)
def test_the_evidence_is_that_of_every_start_weighed(observed: list[tuple[float, float]]) -> None:
    """The recursion against its definition: the part 1/(t (t + 1)) of each bettor's money plays from t on."""
    alarm = DriftAlarm()
    for p, outcome in observed:
        alarm.see(p, outcome)
    total = 0.0
    for bettor in BETTORS:
        factors = [bettor.factor(p, outcome, alarm.tolerance) for p, outcome in observed]
        for start in range(len(factors)):
            wealth = 1 / ((start + 1) * (start + 2))
            for factor in factors[start:]:
                wealth *= factor
            total += wealth
    assert alarm.evidence == pytest.approx(total / len(BETTORS) + 1 / (len(observed) + 1), rel=1e-9)


@pytest.mark.parametrize(("shift", "within"), [(-0.3, 150), (-0.15, 900), (0.3, 700)])
def test_a_shift_is_heard(shift: float, within: int) -> None:
    found = [alarmed_at(pairs(seed, within, shift)) for seed in range(20)]
    assert sum(at is not None for at in found) >= 18


def test_a_shift_after_a_long_calm_is_heard_as_well() -> None:
    found = [alarmed_at(pairs(seed, 5400, -0.3, since=5000)) for seed in range(5)]
    assert all(at is not None and at > 5000 for at in found)


def test_opposite_errors_in_two_bands_do_not_hide_each_other() -> None:
    rng = random.Random(1)
    alarm = DriftAlarm()
    for _ in range(3000):
        alarm.see(0.9, float(rng.random() < 0.7))
        alarm.see(0.3, float(rng.random() < 0.5))
    assert alarm.alarmed_at is not None
    assert alarm.alarmed_at < 600
    assert alarm.cause in (
        "answers of P 0.8 to 1 are right less often than 0.05 around what it says",
        "answers of P 0 to 0.5 are right more often than 0.05 around what it says",
    )


def test_inputs_that_move_are_heard_without_labels() -> None:
    """The share that goes to the weak model, as the certificate has it, against what live queries do."""
    rng = random.Random(2)
    same, moved = DriftAlarm(), DriftAlarm()
    for _ in range(800):
        same.see(0.7, float(rng.random() < 0.68))
        moved.see(0.7, float(rng.random() < 0.4))
    assert (same.alarmed_at, moved.alarmed_at is None) == (None, False)


def test_it_alarms_once_and_stays_alarmed() -> None:
    alarm = DriftAlarm()
    raised = [alarm.see(0.95, 0.0) for _ in range(5000)]
    assert sum(raised) == 1
    assert alarm.alarmed_at == raised.index(True) + 1
    assert alarm.evidence < float("inf")


def test_what_is_no_probability_is_refused() -> None:
    alarm = DriftAlarm()
    for p, outcome in [(1.1, 1.0), (0.5, -0.1), (float("nan"), 0.0), (0.5, float("nan"))]:
        with pytest.raises(ValueError, match="must lie in"):
            alarm.see(p, outcome)
    assert alarm.n == 0
    with pytest.raises(ValueError, match="tolerance"):
        DriftAlarm(tolerance=1.0)
