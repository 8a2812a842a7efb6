"""Ways to spend compute inside an answer, side by side: `make bench-reasoning`. Synthetic arithmetic.

Sections: steps (a small model writes, the base judges), cascade (a small model answers first), exits (a thought is left
early), samples (answers vote). Every section has the row "leave it off". Every answer is checked against the problem's
own; accuracy has a 95 % Wilson interval, points over another row the interval of the paired differences. Time is taken
on fewer questions, asked one at a time, the kinds in turns; CPU time is the process's, so that another program on the
machine does not count; wall time is given beside it.

What is asked is kept in .bench/reasoning until the section is whole: with --minutes a run stops in time, and the next
one goes on. A whole section is written to results/reasoning-SECTION.json. --fresh forgets what was kept, as one must
after a change of the code or of a shipped exit probe.
"""

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

import reasoning_cascade
import reasoning_exits
import reasoning_samples
import reasoning_steps
import torch
from measured import Measured, show
from reasoning_bench import Bench, Part
from reasoning_run import TimeIsUp, load
from results_file import Row, write

PACKAGES: Final = ("torch", "transformers", "scikit-learn", "numpy")
SECTIONS: Final = {
    "steps": reasoning_steps.measure,
    "cascade": reasoning_cascade.measure,
    "exits": reasoning_exits.measure,
    "samples": reasoning_samples.measure,
}
KEPT: Final = Path(__file__).parents[1] / ".bench" / "reasoning"
PARTS: Final[tuple[Part, ...]] = get_args(Part)
TABLES: Final = {
    "steps": reasoning_steps.COLUMNS,
    "steps, tokens": reasoning_steps.TOKEN_COLUMNS,
    "cascade": reasoning_cascade.COLUMNS,
    "cascade, rules": reasoning_cascade.RULE_COLUMNS,
    "exits": reasoning_exits.COLUMNS,
    "exits, promises": reasoning_exits.PROOF_COLUMNS,
    "samples": reasoning_samples.COLUMNS,
}


def with_intervals(rows: Sequence[Row]) -> list[Row]:
    """Accuracy gets its 95 % Wilson interval where the number of problems is known."""
    counts = {row.name: int(row.value) for row in rows if row.metric == "problems"}
    return [
        Row(row.name, row.metric, row.value, *wilson(row.value, counts[row.name]), row.unit)
        if row.metric == "accuracy" and row.name in counts
        else row
        for row in rows
    ]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    scale = 1 + z * z / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return round((middle - half) / scale, 4), round((middle + half) / scale, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="default: all")
    parser.add_argument("--problems", type=int, default=500, help="of each level; fewer for a look")
    parser.add_argument("--timed", type=int, default=40, help="of each level, asked one at a time")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--batch", type=int, default=16, help="answers at a time where no time is taken")
    parser.add_argument("--seed", type=int, default=1, help="another one draws fresh problems")
    parser.add_argument("--part", choices=["answers", "times"], help="only this one, for now")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, to be continued")
    parser.add_argument("--fresh", action="store_true", help="forget what was kept")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        shutil.rmtree(KEPT, ignore_errors=True)
    models = load()
    until = time.monotonic() + 60 * options.minutes
    for name in options.section or SECTIONS:
        parts = PARTS if options.part is None else (options.part,)
        counts = options.problems, options.timed, options.batch
        bench = Bench(models, options.levels, options.seed, *counts, KEPT, parts, until)
        into = Measured()
        try:
            SECTIONS[name](bench, into)
        except TimeIsUp:
            print(f"{name}: not whole yet; run the same command to go on")
            continue
        rows = with_intervals(into.rows())
        for title, columns in TABLES.items():
            if title.partition(",")[0] == name:
                show(rows, f"synthetic arithmetic: {title}", columns)
        if not options.no_write:
            more = {"problems": options.problems, "timed": options.timed, "seed": options.seed}
            print(write(f"reasoning-{name}", f"make bench-reasoning ({name})", PACKAGES, rows, **more))


if __name__ == "__main__":
    main()
