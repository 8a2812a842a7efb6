"""What routing is worth on other people's data: `make bench-routing` (or `python benchmarks/bench_routing.py DATA`).

Every table has all baselines; whatever learns does so on the other four of five folds; intervals are 95% of paired
bootstrap resamples of the queries. Hidden states are kept in .bench/routing. Writes benchmarks/results/routing.json.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from results_file import Row, stored, write
from rich.console import Console
from rich.table import Table
from routing_affinity import affinity_rows
from routing_agreement import ALWAYS, NEVER, Answered, agreement_rows, recorded, wrong_agree
from routing_attacks import attack_rows
from routing_data import PAIRS, Outcomes, hidden, llmrouter, routellm, zeroeval
from routing_latency import latency_rows, worker_rows
from routing_pool import best_of_many, cheapest_at_equal_accuracy
from routing_rivals import (
    Splits,
    best_single,
    cluster_table,
    group_prior,
    neighbours,
    probe,
    prompt_length,
    unit,
    words,
)

from probes.calibrate import Array
from probes.certify import ALPHAS, resplit, route_losses
from probes.evaluate import apgr, baselines, folds, interval, resamples, routing_rows
from probes.extract import Encoder, FloatArray

DATA = Path(os.environ.get("LEADLINE_DATA") or Path(__file__).parents[2] / "shared" / "data")
TIMES, SEED = 500, 0
LIBRARIES = ("numpy", "scikit-learn", "torch", "transformers")
PROBE = "probe"
TOLD = "probe and task prior, mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="folder with the tables of shared/data")
    parser.add_argument("--section", action="append", help="measure only this one; the others' stored rows stay")
    args = parser.parse_args()
    if not (args.data / "routellm_mmlu.parquet").exists():
        print(f"no routing data in {args.data}: name its folder as the argument, or in LEADLINE_DATA; nothing measured")
        return
    torch.set_num_threads(1)
    encoder = Encoder.load()
    rows: list[Row] = []
    sections: tuple[tuple[str, Callable[[Path, Encoder], list[Row]]], ...] = (
        ("RouteLLM", routellm_rows),
        ("ZeroEval", zeroeval_rows),
        ("llmrouter, nine models", llmrouter_rows),
        ("ZeroEval pool", pool_rows),
        ("MMLU, perturbed and hostile", lambda data, model: attack_rows(routellm(data, "mmlu"), model)),
        ("tau-bench, affinity", lambda data, _: affinity_rows(data)),
        ("encoder probe", latency_rows),
        ("in the worker", worker_rows),
    )
    for title, section in sections:
        if args.section and title not in args.section:
            rows += [row for row in stored("routing") if row.name.startswith(f"{title} | ")]
            continue
        start = time.perf_counter()
        found = [replace(row, name=f"{title} | {row.name}") for row in section(args.data, encoder)]
        show(f"{title} ({time.perf_counter() - start:.0f} s)", found)
        rows += found
    print(write("routing", "make bench-routing", LIBRARIES, rows, encoder=encoder.sha256[:12]))


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("name", "metric"):
        table.add_column(heading)
    for heading in ("value", "95% interval"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for row in rows:
        spread = "" if row.low is None or row.high is None else f"{row.low:.4f} to {row.high:.4f}"
        table.add_row(row.name, row.metric, f"{row.value:.4f}", spread, row.unit)
    Console(width=150).print(table)


def routellm_rows(data: Path, encoder: Encoder) -> list[Row]:
    """Both benchmarks in domain, MMLU with domains held out, and one probe for both, which is what is shipped."""
    mmlu, gsm8k = routellm(data, "mmlu"), routellm(data, "gsm8k")
    states = {"mmlu": hidden(encoder, mmlu.prompts), "gsm8k": hidden(encoder, gsm8k.prompts)}
    random, apart = folds(len(mmlu.prompts), SEED), folds(len(mmlu.prompts), SEED, mmlu.groups)
    alone = probe(states["mmlu"], mmlu.scores, random)
    rows = pair_rows("MMLU", mmlu, states["mmlu"], random, {PROBE: alone})
    rows += certificate_rows(alone, mmlu.scores)
    held_out = probe(states["mmlu"], mmlu.scores, apart)
    rows += pair_rows("MMLU, domains held out", mmlu, states["mmlu"], apart, {PROBE: held_out})

    own = folds(len(gsm8k.prompts), SEED)
    alone = probe(states["gsm8k"], gsm8k.scores, own)
    known = (states["mmlu"], mmlu.scores)
    ours = {
        PROBE: alone,
        "probe, MMLU in training too, experts": probe(states["gsm8k"], gsm8k.scores, own, known, experts=True),
        "probe, MMLU in training too": probe(states["gsm8k"], gsm8k.scores, own, known),
    }
    rows += pair_rows("GSM8K", gsm8k, states["gsm8k"], own, ours)
    return rows


def pair_rows(title: str, table: Outcomes, states: FloatArray, splits: Splits, ours: Mapping[str, Array]) -> list[Row]:
    """APGR and CPT of our probes [n, (weak, strong)] and of every rival, and our first's lead over each."""
    weak, strong = table.scores.T
    routers = {name: p[:, 1] - p[:, 0] for name, p in ours.items()} | rivals(table, states, splits)
    found = routing_rows(routers, weak, strong, reference=PROBE, times=TIMES, seed=SEED)
    return [Row(f"{title} | {row.name}", row.metric, row.value, row.low, row.high, row.unit) for row in found]


def rivals(table: Outcomes, states: FloatArray, splits: Splits) -> dict[str, Array]:
    """Gap scores of a pair's baselines. "Best single" is always strong, which has no curve."""
    weak, strong = table.scores.T
    known = baselines(table.prompts, weak, strong, splits, groups=table.groups, seed=SEED)
    embedded = unit(states)
    for name, predicted in {
        "k-means cluster table": cluster_table(embedded, table.scores, splits),
        "kNN": neighbours(embedded, table.scores, splits),
    }.items():
        known[name] = predicted[:, 1] - predicted[:, 0]
    return known


def certificate_rows(p: Array, scores: Array) -> list[Row]:
    """Realised risk on 200 random halves, each routed by the threshold that the other half proves."""
    rows = []
    for alpha in ALPHAS:
        for method in ("crc", "ltt"):
            risks = resplit(lambda r: route_losses(p[r], scores[r]), len(p), alpha, method, seed=SEED)
            low, high = np.quantile(risks, [0.025, 0.975])
            name = f"MMLU certificate, {method}, alpha {alpha:g}"
            rows.append(Row(name, "mean realised risk", float(risks.mean()), float(low), float(high), "share"))
            rows.append(Row(name, "resplits within alpha", float((risks <= alpha).mean()), unit="share"))
    return rows


def zeroeval_rows(data: Path, encoder: Encoder) -> list[Row]:
    """Each pair's APGR, and the mean over pairs, whose interval resamples the queries once for all pairs."""
    table = zeroeval(data)
    models, labels = table.models, table.scores
    states, splits = hidden(encoder, table.prompts), folds(len(table.prompts), SEED)
    p = probe(states, labels, splits)
    scores: list[dict[str, Array]] = []
    truth: list[tuple[Array, Array]] = []
    for pair in PAIRS:
        weak, strong = map(models.index, pair)
        two = Outcomes(table.prompts, table.groups, ("weak", "strong"), labels[:, [weak, strong]])
        scores.append({PROBE: p[:, strong] - p[:, weak]} | rivals(two, states, splits))
        truth.append((labels[:, weak], labels[:, strong]))
    names = list(scores[0])
    draws = {name: np.empty((TIMES, len(PAIRS))) for name in names}
    for t, i in enumerate(resamples(len(labels), TIMES, SEED)):
        for at, ((weak, strong), routers) in enumerate(zip(truth, scores, strict=True)):
            for name in names:
                draws[name][t, at] = apgr(routers[name][i], weak[i], strong[i])
    rows = []
    for at, (weak, strong) in enumerate(PAIRS):
        for name in names:
            value = apgr(scores[at][name], *truth[at])
            rows.append(Row(f"{weak} to {strong} | {name}", "APGR", value, *interval(list(draws[name][:, at]))))
    whole = {name: float(np.mean([apgr(s[name], *t) for s, t in zip(scores, truth, strict=True)])) for name in names}
    for name in names:
        rows.append(Row(f"mean of pairs | {name}", "APGR", whole[name], *interval(list(draws[name].mean(1)))))
        if name != PROBE:
            lead = list((draws[PROBE] - draws[name]).mean(1))
            rows.append(
                Row(f"mean of pairs | {PROBE} − {name}", "APGR difference", whole[PROBE] - whole[name], *interval(lead))
            )
    return rows


def llmrouter_rows(data: Path, encoder: Encoder) -> list[Row]:
    table = llmrouter(data)
    return best_of_many(table, predictions(table, encoder, recognise=True), PROBE, TIMES, SEED)


def pool_rows(data: Path, encoder: Encoder) -> list[Row]:
    """What a query will cost is foretold by its neighbours, for every router alike."""
    rows = []
    for title, table in (
        ("verified prices", zeroeval(data, priced=True)),
        ("all prices, o1 without its hidden tokens", zeroeval(data)),
    ):
        if table.cost is None:
            continue
        splits = folds(len(table.prompts), SEED)
        expected = neighbours(unit(hidden(encoder, table.prompts)), table.cost, splits)
        predicted = predictions(table, encoder)
        found = cheapest_at_equal_accuracy(table, predicted, expected, TIMES, SEED)
        if title == "verified prices":
            found += cascade_rows(data, table, predicted[TOLD])
        rows += [Row(f"{title} | {row.name}", row.metric, row.value, row.low, row.high, row.unit) for row in found]
    return rows


def cascade_rows(data: Path, table: Outcomes, predicted: Array) -> list[Row]:
    """Agreement of two cheap models: all models by what is known of their answers, six on GSM8K by what they said."""
    if table.cost is None:
        return []
    known = recorded(data, table)
    said = wrong_agree(known, table.models[int(table.scores.mean(0).argmax())])
    rows = [
        Row("two wrong answers of six models on GSM8K agree, strong right", "chance", said[0]),
        Row("two wrong answers of six models on GSM8K agree, strong wrong", "chance", said[1]),
    ]
    cases = {"wrong ones agree as recorded": said, "never": NEVER, "always": ALWAYS}
    chosen_for = ("wrong ones agree as recorded", "always")
    rows += agreement_rows(Answered(table, table.cost), predicted, cases, chosen_for, TIMES, SEED)
    columns = [table.models.index(model) for model in known.table.models]
    six = predicted[np.flatnonzero(table.groups == "gsm")][:, columns]
    found = agreement_rows(known, six, {"recorded answers": NEVER}, ["recorded answers"], TIMES, SEED)
    return rows + [replace(row, name=f"GSM8K, six models | {row.name}") for row in found]


def predictions(table: Outcomes, encoder: Encoder, *, recognise: bool = False) -> dict[str, Array]:
    """Out-of-fold predicted scores [n, models] of every router for many models.

    With `recognise` our probe learns to recognise the table's groups; only the task prior is ever told them.
    """
    states, splits = hidden(encoder, table.prompts), folds(len(table.prompts), SEED)
    embedded = unit(states)
    ours = probe(states, table.scores, splits, groups=table.groups if recognise else None)
    return {
        PROBE: ours,
        "best single model": best_single(table, splits),
        "prompt length": prompt_length(table, splits),
        "task prior": (told := group_prior(table, splits)),
        TOLD: (ours + told) / 2,
        "TF-IDF + ridge": words(table.prompts, table.scores, splits),
        "k-means cluster table": cluster_table(embedded, table.scores, splits),
        "kNN": neighbours(embedded, table.scores, splits),
    }


if __name__ == "__main__":
    main()
