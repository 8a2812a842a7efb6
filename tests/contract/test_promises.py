"""docs/guarantees.md names its tests: each of them must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 10
    for row in rows:
        promise, _, tests = row.strip("| ").rpartition("|")
        named = re.findall(r"`([^`]+)`", tests)
        assert named, promise
        file = ""
        for name in named:
            path, _, function = name.partition("::")
            if path in ("make demo", "make judges"):
                continue
            file = path or file
            found = [p for p in (ROOT / file, ROOT / "tests" / "gateway" / file) if file and p.exists()]
            assert found, name
            if function:
                assert f"def {function}(" in found[0].read_text(), name
