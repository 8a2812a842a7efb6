"""The shape of every file in benchmarks/results: which machine, when, which versions, and rows with their spread."""

import datetime as dt
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    name: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""


def machine() -> dict[str, object]:
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "os": f"{platform.system()} {platform.release()}"}


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def stored(name: str) -> list[Row]:
    """The rows of results/NAME.json; none where it was never written."""
    path = RESULTS / f"{name}.json"
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write(name: str, command: str, packages: Iterable[str], rows: Sequence[Any], **more: object) -> Path:
    """Write results/NAME.json and return its path. `rows` are dataclasses with the fields of `Row`."""
    path = RESULTS / f"{name}.json"
    document = {
        "machine": machine(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": command,
        "versions": {**versions(packages), **{k: str(v) for k, v in more.items()}},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
