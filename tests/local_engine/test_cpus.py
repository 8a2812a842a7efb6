"""Threads of an engine's own accord are no more than the CPUs that it may use."""

import os
from pathlib import Path

import pytest

from local_engine import config
from local_engine.cpus import usable_cpus


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process bound to eight CPUs, two control groups deep."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pods/mine\n")
    (tmp_path / "sys/fs/cgroup/pods/mine").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "around", "expected"),
    [
        ("max 100000", "max 100000", 8),
        ("200000 100000", "max 100000", 2),
        ("250000 100000", "max 100000", 2),
        ("max 100000", "300000 100000", 3),
        ("400000 100000", "50000 100000", 1),
        ("1600000 100000", "max 100000", 8),
        (None, None, 8),
        ("what else", "max 100000", 8),
    ],
)
def test_limits_of_the_control_groups_count(system: Path, own: str | None, around: str | None, expected: int) -> None:
    for folder, limit in (("pods/mine", own), ("pods", around)):
        if limit is not None:
            (system / "sys/fs/cgroup" / folder / "cpu.max").write_text(f"{limit}\n")
    assert usable_cpus(system) == expected


def test_a_container_is_its_own_top(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("12:cpu:/x\n0::/\n")
    (system / "sys/fs/cgroup/cpu.max").write_text("350000 100000\n")
    assert usable_cpus(system) == 3


def test_a_system_without_control_groups_has_those_it_is_bound_to(system: Path) -> None:
    (system / "proc/self/cgroup").unlink()
    assert usable_cpus(system) == 8


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (5, 4)])
def test_one_is_left_to_the_gateway(cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "usable_cpus", lambda: cpus)
    assert config.default_threads() == threads
