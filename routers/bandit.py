"""A contextual bandit over the candidates of a route: what it has learned, and what it tries.

The context is the query's clusters, or its likeliest domains; the table (`State.arms`) holds what each arm has earned
in each of them. An arm is what runs: a model, a model at one effort (`local+high`), a cascade (`local>strong`). Its
means stand in for p_success where no probe speaks of a candidate, so every objective works with them. A capped share of
requests is answered by another candidate than the best, drawn by `method`:

    thompson   by its chance of being the best one: Thompson sampling, with each arm's mean taken as normal around
               its Beta posterior, and the chance integrated on a grid instead of sampled, so that it is known
    softmax    by exp(mean / temperature)
    uniform    each alike

The propensity of every draw is exactly the probability with which it is drawn: logged, it makes other policies'
results computable (inverse propensity scores, doubly robust estimates).
"""

import math
from collections.abc import Mapping, Sequence
from zlib import crc32

from msgspec.structs import replace

from probes.types import Estimate
from routers.aims import Explore
from routers.seeds import EXPLORE, EXPLORED_ARM, draw
from routers.types import Arm, Signals, State

EVERYWHERE = ((-1, 1.0),)
"""The one cluster of all queries, where nothing tells them apart."""
SOURCE = "bandit"
_PRIOR = Arm(2.0, 1.0)
"""As if each arm had been tried twice in each cluster, and been right once: Beta(1, 1)."""
_GRID = 48
_NO_ARM = Arm(0.0, 0.0)


def context_of(domain: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """The likeliest domains as clusters, three at most, with weights of sum 1; empty where nothing is known."""
    likeliest = sorted(((p, name) for name, p in domain.items() if p > 0), reverse=True)[:3]
    total = sum(p for p, _ in likeliest)
    return tuple([(crc32(name.encode()), p / total) for p, name in likeliest])


def belief(arms: Mapping[tuple[int, str], Arm], clusters: Sequence[tuple[int, float]], name: str) -> Arm:
    """What is known of an arm for a query: what it earned in the query's clusters, by weight, with the prior."""
    pulls, reward = _PRIOR.pulls, _PRIOR.reward
    for cluster, weight in clusters or EVERYWHERE:
        arm = arms.get((cluster, name), _NO_ARM)
        pulls += weight * arm.pulls
        reward += weight * arm.reward
    return Arm(pulls, reward)


def updated(
    arms: Mapping[tuple[int, str], Arm],
    clusters: Sequence[tuple[int, float]],
    name: str,
    reward: float,
    keep: float = 1.0,
) -> dict[tuple[int, str], Arm]:
    """The table after one answer with feedback; `keep` below 1 forgets: older answers count so much less each time.

    Raises ValueError for a reward outside 0 to 1.
    """
    if not 0 <= reward <= 1:
        raise ValueError(f"reward: {reward!r} is not between 0 and 1")
    table = dict(arms)
    for cluster, weight in clusters or EVERYWHERE:
        arm = table.get((cluster, name), _NO_ARM)
        table[cluster, name] = Arm(keep * arm.pulls + weight, keep * arm.reward + weight * reward)
    return table


def learned(signals: Signals, state: State, runs: Mapping[str, str]) -> Signals:
    """The signals with the bandit's mean, and the 95% interval around it, for each candidate that no probe speaks of.

    `runs`: candidate → the arm that it is for this query.
    """
    p = dict(signals.p_success)
    for candidate, name in runs.items():
        if candidate in p:
            continue
        arm = belief(state.arms, signals.clusters, name)
        if arm.pulls > _PRIOR.pulls:
            mean, sd = _posterior(arm)
            p[candidate] = Estimate(mean, f"{SOURCE}/{name}", max(mean - 1.96 * sd, 0.0), min(mean + 1.96 * sd, 1.0))
    return replace(signals, p_success=p)


def explore(
    explore: Explore, best: str, eligible: Sequence[str], signals: Signals, state: State, seed: int
) -> tuple[str, float]:
    """(the arm to run, the probability over seeds with which it is run).

    `best` with probability 1 - share, else one of the others, drawn by the method. Without others: `best`, for sure.
    """
    others = [name for name in eligible if name != best]
    if not others:
        return best, 1.0
    if draw(seed, EXPLORE) >= explore.share:
        return best, 1.0 - explore.share
    chances = probabilities(explore, others, signals, state)
    left = draw(seed, EXPLORED_ARM)
    for name, chance in zip(others, chances, strict=True):
        left -= chance
        if left < 0:
            return name, explore.share * chance
    return others[-1], explore.share * chances[-1]


def probabilities(explore: Explore, names: Sequence[str], signals: Signals, state: State) -> list[float]:
    """With which each of the arms is drawn where one of them is; positive, and of sum 1."""
    if explore.method == "uniform":
        return [1 / len(names)] * len(names)
    beliefs = [_posterior(belief(state.arms, signals.clusters, name)) for name in names]
    if explore.method == "softmax":
        highest = max(mean for mean, _ in beliefs)
        weights = [math.exp((mean - highest) / explore.temperature) for mean, _ in beliefs]
    else:
        weights = _chances_of_best(beliefs)
    floor = 1e-3 / len(names)  # no arm is ever out of reach: a propensity of zero could not be weighed
    total = sum(weights)
    return [floor + (1 - 1e-3) * weight / total for weight in weights]


def _posterior(arm: Arm) -> tuple[float, float]:
    """Mean and standard deviation of Beta(reward, pulls - reward)."""
    mean = arm.reward / arm.pulls
    return mean, math.sqrt(mean * (1 - mean) / (arm.pulls + 1))


def _chances_of_best(beliefs: Sequence[tuple[float, float]]) -> list[float]:
    """Of each, the chance that its draw is the highest of all: density times the others' CDFs, summed over a grid."""
    low = min(mean - 4 * sd for mean, sd in beliefs)
    high = max(mean + 4 * sd for mean, sd in beliefs)
    step = (high - low) / _GRID
    chances = [0.0] * len(beliefs)
    before = [0.0] * len(beliefs)
    for index in range(1, _GRID + 1):
        edge = low + index * step
        at = [0.5 * (1 + math.erf((edge - mean) / (sd * math.sqrt(2)))) for mean, sd in beliefs]
        whole = math.prod((a + b) / 2 for a, b in zip(at, before, strict=True))
        for arm, (now, then) in enumerate(zip(at, before, strict=True)):
            middle = (now + then) / 2
            if middle > 0:
                chances[arm] += (now - then) * whole / middle
        before = at
    return chances
