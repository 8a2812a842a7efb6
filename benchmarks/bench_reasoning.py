"""Ways to spend compute inside an answer, side by side: `make bench-reasoning`. Synthetic arithmetic.

Sections: steps (a small model writes, the base judges), cascade (a small model answers first), exits (a thought is left
early), samples (answers vote). Every section has the row "leave it off". The text of every answer is checked against
the problem's own; where a row counts its problems, accuracy has a 95 % Wilson interval. CPU time is the process's, so
that another program on the machine does not count; wall time is given beside it.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Final

import reasoning_cascade
import reasoning_exits
import reasoning_samples
import reasoning_steps
from measured import Measured, show
from results_file import Row, write

PACKAGES: Final = ("torch", "transformers", "scikit-learn", "numpy")
SECTIONS: Final = {
    "steps": reasoning_steps.measure,
    "cascade": reasoning_cascade.measure,
    "exits": reasoning_exits.measure,
    "samples": reasoning_samples.measure,
}
TABLES: Final = {
    "steps": {
        "accuracy": "right", "points_over_off": "points over off", "cpu_speedup": "× CPU", "wall_speedup": "× wall",
        "bound": "bound", "of_the_bound": "of the bound", "cost": "cost", "cost_base_10x": "cost, base × 10",
    },
    "steps, tokens": {
        "text_tokens": "tokens", "base_written": "base wrote", "base_computed": "base computed",
        "draft_written": "draft wrote", "draft_accepted": "accepted", "steps_accepted": "steps kept",
    },
    "cascade": {
        "accuracy": "right", "points_over_off": "points over off", "accepted": "accepted", "risk": "risk",
        "auc": "AUC", "curve": "mean over thresholds", "cost": "cost", "cost_base_10x": "cost, base × 10",
        "not_generated": "tokens not generated",
    },
    "exits": reasoning_exits.COLUMNS,
    "exits, promises": reasoning_exits.PROOF_COLUMNS,
    "samples": reasoning_samples.COLUMNS,
}  # fmt: skip


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
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="answers at a time")
    parser.add_argument("--seed", type=int, default=1, help="another one draws fresh problems")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[Row] = []
    for section in options.section or SECTIONS:
        into = Measured()
        SECTIONS[section](options.seed, options.levels, options.problems, options.batch, into)
        found = with_intervals(into.rows())
        for title, columns in TABLES.items():
            if title.partition(",")[0] == section:
                show(found, f"synthetic arithmetic: {title}", columns)
        rows += found
    if not options.no_write:
        print(write("reasoning", "make bench-reasoning", PACKAGES, rows, problems=options.problems, seed=options.seed))


if __name__ == "__main__":
    main()
