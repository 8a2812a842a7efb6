"""`make demo`: real questions through a running gateway, with a proof of every nano-dollar.

GSM8K test questions go through `leadline serve` to an upstream that replays what GPT-4-1106 and Mixtral-8x7B really
answered to them; arithmetic questions are answered by the local engine. Four ways to answer are compared: always the
weak model, always the strong one, random at Leadline's share, and Leadline's choice. At the end ledger, upstream and
client must agree on every call, or the demo fails.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date
from json import dumps
from pathlib import Path

from demo_client import Call, Task, drive
from demo_money import prove, read_ledger, read_truth
from demo_report import Arm, Paired, Row, measured, results, table
from demo_servers import DemoError, Gateway, fit_probe, gateway, recorded_upstream, write_policy
from recorded_upstream import RECORDINGS
from rich.console import Console

from local_engine.arithmetic import LEVELS, problems

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
GOLD = "gsm8k.parquet"
SOUNDED = 300
"""GSM8K training questions, without labels, that the constraint is set by."""
GAP_WITHOUT_DATA = 0.10
"""The constraint where there is nothing to set it by."""
STRONG_SHARE = 0.5
CACHED = 20
"""Questions asked twice to show the cache."""
CANDIDATES = ("local", "weak", "strong")


@dataclass
class Demo:
    """What one run is about, and what it has gathered so far."""

    console: Console
    folder: Path
    upstream: str
    concurrency: int
    probe: str
    calls: list[Call] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    gains: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """One state folder, thus one ledger, for every gateway of the run."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return home

    def say(self, sentence: str) -> None:
        """Something the reader of the numbers must know."""
        self.notes.append(sentence)
        self.console.print(sentence, highlight=False, soft_wrap=True)

    def serve(
        self, name: str, gap: float, *, probe: str, candidates: tuple[str, ...] = CANDIDATES
    ) -> AbstractContextManager[Gateway]:
        policy = write_policy(
            self.folder / f"{name}.yaml", upstream=self.upstream, probe=probe, candidates=candidates, gap=gap
        )
        return gateway(self.home, policy)

    def drive(self, to: Gateway, arm: str, model: str, tasks: Sequence[Task], *, store: bool = False) -> list[Call]:
        started = time.monotonic()
        calls = drive(to.base_url, to.key, arm, model, tasks, concurrency=self.concurrency, store=store)
        self.console.print(f"  {arm}: {len(calls):,} calls in {time.monotonic() - started:.1f} s", highlight=False)
        self.calls += calls
        return calls


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end with the demo
    console = Console() if sys.stdout.isatty() else Console(width=120)
    data = Path(os.environ.get("LEADLINE_DATA") or ROOT.parent / "shared" / "data")
    folder = Path(tempfile.mkdtemp(prefix="leadline-demo-"))
    truth = folder / "truth.jsonl"
    truth.touch()
    started = time.monotonic()
    try:
        with recorded_upstream(data, truth) as upstream:
            demo = Demo(console, folder, upstream, args.concurrency, args.probe)
            agreed = _run(demo, args, data, truth)
            demo.console.print(f"took {time.monotonic() - started:.0f} s", highlight=False)
    except DemoError as error:
        console.print(str(error), highlight=False, markup=False)
        return 1
    finally:
        shutil.rmtree(folder)
    return 0 if agreed else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=_positive, help="at most this many GSM8K and as many arithmetic questions")
    parser.add_argument("--seed", type=int, default=0, help="of order, arithmetic and halves")
    parser.add_argument("--concurrency", type=_positive, default=4, help="callers at a time")
    parser.add_argument("--probe", default="default", help="`default`, or a folder that `leadline probe fit` wrote")
    parser.add_argument("--skip-fitted", action="store_true", help="leave out the probes fitted on recorded answers")
    parser.add_argument("--keep", action="store_true", help="leave the gateway running at the end, until Ctrl-C")
    parser.add_argument("--out", type=Path, help=f"results file; a full run writes {RESULTS.relative_to(ROOT)}")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _run(demo: Demo, args: argparse.Namespace, data: Path, truth: Path) -> bool:
    """All parts, the table, the proof; whether the books agreed."""
    arithmetic = arithmetic_tasks(args.seed, args.limit)
    missing = [name for name in (RECORDINGS, GOLD) if not (data / name).is_file()]
    if missing:
        demo.say(
            f"No {' and no '.join(missing)} in ../shared/data (or $LEADLINE_DATA): without the recorded answers only "
            f"the arithmetic part runs. The constraint is p_success_gap <= {GAP_WITHOUT_DATA:g}, set by nothing."
        )
        gsm8k, gap = [], GAP_WITHOUT_DATA
    else:
        gsm8k, gap = read_tasks(data, args.seed, args.limit), _sounded_gap(demo, data, args.seed, probe=demo.probe)
    fitted = [] if args.skip_fitted or not gsm8k else _fitted_part(demo, data, gsm8k, args.seed)
    with demo.serve("leadline", gap, probe=demo.probe) as to:
        sections = _main_part(demo, to, gsm8k, arithmetic, fitted, args.seed)
        if gsm8k:
            _cache_part(demo, to, gsm8k[:CACHED])
        _show(demo, sections)
        agreed = _prove(demo, to, truth)
        partial = args.limit or args.skip_fitted or args.probe != "default" or missing
        out = args.out or (None if partial else RESULTS)
        if out is not None:
            _write(demo, out)
        if args.keep:
            _wait(demo.console, to)
    return agreed


def arithmetic_tasks(seed: int, limit: int | None) -> list[Task]:
    """Problems that the bundled model was not trained on, every level alike."""
    each = 50 if limit is None else -(-limit // len(LEVELS))
    drawn = [p for level in LEVELS for p in problems(seed, level, each)]
    return [Task("arithmetic", p.question, str(p.answer), level=p.level) for p in drawn]


def read_tasks(data: Path, seed: int, limit: int | None) -> list[Task]:
    """Uncontaminated GSM8K test questions with their gold answers and recorded outcomes, in a seeded order."""
    import pandas as pd

    frame = pd.read_parquet(data / RECORDINGS)
    frame = frame[~frame["contaminated"]]
    gold = pd.read_parquet(data / GOLD).set_index("question")["final"]
    columns = zip(frame["prompt"], frame["mixtral_8x7b_correct"], frame["gpt4_1106_correct"], strict=True)
    tasks = [Task("gsm8k", prompt, gold[prompt], (bool(weak), bool(strong))) for prompt, weak, strong in columns]
    random.Random(seed).shuffle(tasks)
    return tasks[:limit]


def training_questions(data: Path, seed: int) -> list[str]:
    """GSM8K training questions; their answers are not read."""
    import pandas as pd

    frame = pd.read_parquet(data / GOLD, columns=["split", "question"])
    questions: list[str] = frame.loc[frame["split"] == "train", "question"].tolist()
    return random.Random(seed).sample(questions, SOUNDED)


def _sounded_gap(demo: Demo, data: Path, seed: int, *, probe: str, candidates: tuple[str, ...] = CANDIDATES) -> float:
    """The constraint that would send STRONG_SHARE of unlabelled training questions to strong: a quantile of gaps."""
    with demo.serve("sounding", 1.0, probe=probe, candidates=candidates) as sounding:
        gaps = sorted(_gap(sounding, question) for question in training_questions(data, seed))
    gap = gaps[round(len(gaps) * (1 - STRONG_SHARE)) - 1]
    name = "the shipped probe" if probe == "default" else f"probe {Path(probe).name}"
    demo.say(
        f"Constraint for {name}: p_success_gap <= {gap:.4f}, so that {STRONG_SHARE:.0%} of {SOUNDED} GSM8K training "
        "questions, whose answers are not read, would go to strong."
    )
    return gap


def _gap(to: Gateway, question: str) -> float:
    """How far weak's chance is below the best candidate's, by the gateway's own explanation."""
    body = {"model": "auto", "messages": [{"role": "user", "content": question}]}
    decision = to.api("/leadline/v1/explain", body)["decision"]
    chances = {c["model"]: c["p_success"] for c in decision["candidates"]}
    if None in chances.values():
        raise DemoError(f"the probe {decision['probe_version']} does not know all candidates: {chances}")
    return float(max(chances.values()) - chances["weak"])


def _main_part(
    demo: Demo, to: Gateway, gsm8k: list[Task], arithmetic: list[Task], fitted: list[Call], seed: int
) -> list[Sequence[Arm]]:
    """Leadline on the shipped probe, weak and strong by name. The sections of the table, arithmetic last."""
    mixed = [*gsm8k, *arithmetic]
    random.Random(seed).shuffle(mixed)
    routed = demo.drive(to, "Leadline, shipped probe", "auto", mixed)
    _tell_degraded(demo, [*routed, *fitted])
    if gsm8k and demo.probe == "default":
        demo.say("The shipped probe has learnt from these questions: its row flatters it; the other half's does not.")
    sections: list[Sequence[Arm]] = []
    if gsm8k:
        on_gsm8k = [call for call in routed if call.task.kind == "gsm8k"]
        weak, strong = (demo.drive(to, f"always {name}", name, gsm8k) for name in ("weak", "strong"))
        _tell_gsm8k(demo, on_gsm8k, [*weak, *strong])
        sections += [
            (measured("always weak: Mixtral-8x7B", weak), measured("always strong: GPT-4-1106", strong)),
            _beside_baselines(demo, "Leadline, shipped probe", on_gsm8k, weak, strong),
        ]
        if fitted:
            sections.append(_beside_baselines(demo, "Leadline, probe of the other half", fitted, weak, strong))
    local = _tell_arithmetic(demo, [call for call in routed if call.task.kind == "arithmetic"])
    return [*sections, (measured("arithmetic, answered locally", local),)] if local else sections


def _beside_baselines(
    demo: Demo, name: str, routed: Sequence[Call], weak: Sequence[Call], strong: Sequence[Call]
) -> Sequence[Arm]:
    """Routed calls below what a lot and the prompts' length make of the same share of strong calls."""
    paired = Paired.of(routed, weak, strong)
    longest = paired.longest()
    share = f"{paired.strong_used.mean():.1%} to strong"
    demo.gains += [paired.gain(name), longest.gain(f"longest prompts, {share}")]
    return (
        paired.at_random(f"random, {share}"),
        longest.computed(f"longest prompts, {share}"),
        measured(name, routed),
    )


def _tell_degraded(demo: Demo, calls: Sequence[Call]) -> None:
    degraded = sum(bool(call.degraded) for call in calls)
    demo.rows.append(Row("Leadline", "decisions_without_probe", degraded, unit="calls"))
    if degraded:
        demo.say(f"{degraded} of {len(calls)} decisions were degraded (the probe's answer was late or missing).")


def _tell_gsm8k(demo: Demo, routed: Sequence[Call], named: Sequence[Call]) -> None:
    local = sum(call.model == "local" for call in routed)
    differ = [call for call in named if call.graded != call.correct]
    harsh = sum(call.graded for call in differ)
    demo.rows += [
        Row("GSM8K", "answered_locally", local, unit="questions"),
        Row("GSM8K", "recorded_label_differs_from_text", len(differ), unit="answers"),
    ]
    demo.say(
        f"GSM8K: {local} of {len(routed)} questions went to the local model. In {len(differ)} of {len(named)} recorded "
        f"answers the recorded label differs from our reading of the text (in {harsh} of them the number is the gold "
        "one, as in $20.00 for 20, and the label says wrong); the table judges by the recorded label."
    )


def _tell_arithmetic(demo: Demo, calls: Sequence[Call]) -> list[Call]:
    """Says where the arithmetic went; the calls that the local engine answered."""
    local = [call for call in calls if call.model == "local"]
    right = sum(call.correct for call in local)
    demo.rows += [
        Row("arithmetic", "answered_locally", len(local), unit="questions"),
        Row("arithmetic", "right_of_those_answered_locally", right, unit="questions"),
    ]
    away = len(calls) - len(local)
    levels = ", ".join(
        f"{level}: {sum(c.correct for c in local if c.task.level == level)}/{sum(c.task.level == level for c in local)}"
        for level in LEVELS
    )
    demo.say(
        f"Arithmetic: {len(local)} of {len(calls)} questions were answered by the local engine, {right} of them right, "
        f"for $0 (right by level: {levels})."
        + (f" {away} were routed to a remote model, which has no recording of them: 404, $0." if away else "")
    )
    return local


def _cache_part(demo: Demo, to: Gateway, tasks: Sequence[Task]) -> None:
    """The same questions twice, the cache allowed: the second answers are hits, free, and the same."""
    first, second = (demo.drive(to, "cache", "weak", tasks, store=True) for _ in range(2))
    hits = [b for a, b in zip(first, second, strict=True) if b.cache == "hit" and b.text == a.text]
    saved = sum(call.cost_nanousd or 0 for call in first) - sum(call.cost_nanousd or 0 for call in second)
    p50 = [statistics.median(call.latency_ms for call in calls) for calls in (first, second)]
    demo.rows += [
        Row("cache, asked again", "hits_with_the_same_text", len(hits), unit="calls"),
        Row("cache, asked again", "saved", saved / 1e9, unit="USD"),
    ]
    demo.say(
        f"Cache (all else above and below runs with no-store): {len(tasks)} questions asked again, {len(hits)} "
        f"answered from the cache with the same text, for $0; p50 {p50[0]:.1f} ms before, {p50[1]:.1f} ms after."
    )


def _fitted_part(demo: Demo, data: Path, tasks: Sequence[Task], seed: int) -> list[Call]:
    """What a user with labels gets: a probe fitted on one half decides about the other half, and the reverse."""
    routed: list[Call] = []
    for half in (0, 1):
        asked = [task for task in tasks if _half(task.question, seed) == half]
        probe = str(_fit_on_the_others(demo.folder, data, seed, half))
        gap = _sounded_gap(demo, data, seed, probe=probe, candidates=CANDIDATES[1:])
        with demo.serve(f"fitted-{half}", gap, probe=probe, candidates=CANDIDATES[1:]) as fitted:
            routed += demo.drive(fitted, f"Leadline, probe fitted on half {1 - half}", "auto", asked)
    return routed


def _fit_on_the_others(folder: Path, data: Path, seed: int, half: int) -> Path:
    """A probe fitted on the other half's recorded outcomes."""
    import pandas as pd

    frame = pd.read_parquet(data / RECORDINGS)
    frame = frame[~frame["contaminated"]]
    table_path, out = folder / f"half-{1 - half}.parquet", folder / f"half-{1 - half}"
    frame[[_half(prompt, seed) != half for prompt in frame["prompt"]]].to_parquet(table_path)
    fit_probe(table_path, out)
    return out


def _half(question: str, seed: int) -> int:
    """0 or 1, by the text alone, so that a limit changes nothing."""
    return random.Random(f"{seed}/{question}").getrandbits(1)


def _show(demo: Demo, sections: Sequence[Sequence[Arm]]) -> None:
    arms = [arm for section in sections for arm in section]
    strong_usd = next((arm.cost_usd for arm in arms if arm.name.startswith("always strong")), None)
    title = f"{demo.concurrency} callers at a time; latency is the gateway's and the replay's, not the providers'"
    demo.console.print(table(title, sections, strong_usd))
    for gain in demo.gains:
        demo.say(
            f"{gain.name}: {gain.value:+.3f} accuracy over random at equal share, "
            f"95% [{gain.low:+.3f}, {gain.high:+.3f}] (paired bootstrap over the questions)."
        )
    demo.rows[:0] = [row for arm in arms for row in arm.rows()] + demo.gains


def _prove(demo: Demo, to: Gateway, truth: Path) -> bool:
    spent = to.api("/leadline/v1/spend")["cost_nanousd"]
    proof = prove(demo.calls, *read_ledger(demo.home), read_truth(truth), spent)
    demo.rows += [
        Row("proof", "calls_joined", proof.calls, unit="calls"),
        Row("proof", "spent", proof.nanousd, unit="nano-dollars"),
        Row("proof", "differences", len(proof.differences), unit="calls"),
    ]
    demo.say(str(proof))
    return not proof.differences


def _write(demo: Demo, out: Path) -> None:
    command = " ".join(["python benchmarks/demo.py", *sys.argv[1:]])
    content = results(command, date.today().isoformat(), demo.notes, demo.rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _wait(console: Console, to: Gateway) -> None:
    """Until Ctrl-C."""
    console.print(f"\nDashboard  {to.base_url.removesuffix('/v1')}/dashboard\nKey        {to.key}\nCtrl-C ends it.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("ended")


if __name__ == "__main__":
    sys.exit(main())
