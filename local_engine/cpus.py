"""How many CPUs this process may use."""

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Those that it is bound to, and no more than its control group (Linux, version 2) gives it time for.

    In a container that is given two CPUs of a host's 64, two: threads beyond them would wait for each other.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.floor, _shares(root))]))


def _shares(root: Path) -> list[float]:
    """The CPUs that each control group around this process has, where it is limited."""
    try:
        (line,) = (line for line in (root / "proc/self/cgroup").read_text().splitlines() if line.startswith("0::/"))
    except (OSError, ValueError):
        return []
    top = root / "sys/fs/cgroup"
    own = top / line.removeprefix("0::/")
    found = []
    for group in (own, *own.parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass  # the top one has no limit, and "max" is none
        if group == top:
            break
    return found
