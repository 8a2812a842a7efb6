"""A simulation from policy and table to what the command prints, writes and draws."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from gateway.simulate.baselines import baselines
from gateway.simulate.compare import Measured, compare
from gateway.simulate.routed import Caller, costs, from_table, run_policy, sweep
from gateway.simulate.scores import probe_signals
from gateway.simulate.table import Outcomes
from routers.policy import Policy
from routers.types import Signals


@dataclass(frozen=True, slots=True)
class Simulation:
    """What was found."""

    measured: list[Measured]
    """The policy first."""
    rules: list[tuple[str, int]]
    """How often each rule decided, most often first."""
    facts: list[str]
    """What a reader has to know of the numbers."""
    curve: list[tuple[float, float]]
    """($ per 1,000, accuracy) that the policy's signals reach at other prices of a mistake; empty where some model of
    the table has no signal or no cost."""


def simulated(
    policy: Policy, folder: Path, table: Outcomes, caller: Caller, scores: Path, seed: int, *, progress: bool = True
) -> Simulation:
    """`folder` holds the policy file, `scores` what the probe says. Raises ProbeError."""
    spent, source = costs(policy, table)
    signals, said = _signals(policy, folder, table, scores, progress)
    run = run_policy(policy, table, spent, signals, caller=caller)
    rows = compare(run.routed, baselines(table, spent, run.routed, seed), table.models, seed=seed)
    left_out = f", {table.incomplete} left out as some model has no outcome there" if table.incomplete else ""
    facts = [f"{len(table.prompts)} queries{left_out}; costs from {source}", said]
    held = {name.partition("+")[0] for name in table.models}
    missing = [name for name in policy.models if name not in held]
    if missing:
        facts.append(f"not in the table, so never chosen: {', '.join(missing)}")
    if run.refused:
        facts.append(f"{run.refused} requests refused by the policy, counted as wrong and free")
    curve: list[tuple[float, float]] = []
    known = [[one.p_success.get(model) for model in table.models] for one in signals]
    if spent is not None and set(table.models) <= {model for one in signals for model in one.p_success}:
        quality = np.array([[0.0 if p is None else p.value for p in row] for row in known])
        curve = [(cost * 1e-6, accuracy) for cost, accuracy in sweep(quality, spent.mean(0), table, spent)]
    return Simulation(rows, sorted(run.rules.items(), key=lambda item: -item[1]), facts, curve)


def _signals(policy: Policy, folder: Path, table: Outcomes, scores: Path, progress: bool) -> tuple[list[Signals], str]:
    """(of each query, where they are from): the table's, or what the policy's probes say."""
    queries = len(table.prompts)
    if table.p_success:
        return from_table(table.p_success, queries), f"P(success) of {', '.join(table.p_success)} from the table"
    if policy.difficulty is None:
        return from_table({}, queries), "the policy measures nothing: it decides by price and order"
    from gateway.in_order import InOrder

    probe = InOrder.of(policy, folder)
    heads = {model: head for model, head in policy.difficulty.heads.items() if model in table.models}
    found = probe_signals(probe, heads, table.prompts, scores, progress=progress)
    by = Counter(version for one in found for version in {p.source.rpartition("/")[0] for p in one.p_success.values()})
    answered = ", ".join(f"{version} {count}" for version, count in by.most_common()) or "none"
    said = (
        f"P(success) of {', '.join(heads)} by the probe {probe.version}; where it was fitted on these queries, what "
        f"follows flatters it; queries by who answered: {answered}"
    )
    return found, said


MOST_SHARES = 3
"""Models that a terminal names for each router; the JSON and the page have all."""


def rendered(title: str, measured: Sequence[Measured]) -> Table:
    """For a terminal."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("router")
    for header in ("accuracy", "$ per 1,000", "policy gains", "policy saves"):
        shown.add_column(header, justify="right")
    shown.add_column("answered by")
    for found in measured:
        cells = [_told(found.accuracy, "{:.3f}"), _told(found.cost, "{:.4g}")]
        cells += [_told(found.gain, "{:+.3f}"), _told(found.saving, "{:.0%}")]
        by = sorted(found.share.items(), key=lambda item: -item[1])
        most = [f"{model} {share:.0%}" for model, share in by[:MOST_SHARES] if share >= 0.005]
        others = sum(share for _, share in by[MOST_SHARES:])
        shown.add_row(found.name, *cells, ", ".join([*most, *([f"others {others:.0%}"] if others >= 0.005 else [])]))
    return shown


def _told(found: tuple[float, float, float] | None, form: str) -> str:
    if found is None:
        return "–"
    value, low, high = map(form.format, found)
    return f"{value}\n({low} to {high})"


def as_json(policy: Policy, file: Path, table: Path, queries: int, found: Simulation) -> dict[str, Any]:
    """Everything, with stable keys."""
    return {
        "policy": {"file": file.name, "version": policy.version_hash},
        "table": table.name,
        "queries": queries,
        "facts": found.facts,
        "rules": dict(found.rules),
        "routers": [row.to_json() for row in found.measured],
    }
