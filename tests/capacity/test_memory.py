"""What this machine has: limits of cgroups, the 16 GB machine, and the two verdicts."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from localmix.capacity import memory
from localmix.capacity.memory import Available, Need, Verdict
from localmix.errors import UsageError
from localmix.sizes import GIB


def test_a_machine_sold_with_16_gb() -> None:
    assert 14 * GIB < memory.machine(memory.FLOOR_GB).bytes < 15.3 * GIB
    assert memory.machine(0.5).bytes == 0


def need(weights: int, beside: int, repacked: int = 0) -> Need:
    return Need(weights, repacked, beside, 0, 0, 0, 0)


def test_two_verdicts() -> None:
    room = Available(10, "a test")
    assert room.verdict(need(6, 4)) is Verdict.RUNS_WELL
    assert room.verdict(need(7, 4)) is Verdict.LOADS
    assert room.verdict(need(7, 10)) is Verdict.LOADS
    assert room.verdict(need(1, 11)) is Verdict.NO
    # reordered weights can be left in the order of the file
    assert room.verdict(need(20, 4, repacked=18)) is Verdict.LOADS


def make_group(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n")


def test_the_tightest_cgroup_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/user/app\n")
    make_group(root / "user" / "app", "max", 9, 0)
    make_group(root / "user", str(3 * GIB), 2 * GIB, GIB)
    make_group(root, str(8 * GIB), 2 * GIB, 0)
    found = memory._cgroup_headroom(groups, root)
    assert min(found) == (2 * GIB, "the 3.00 GiB limit of cgroup /user")
    assert len(found) == 2


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/not/visible/here\n")
    make_group(root, str(GIB), 0, 0)
    assert memory._cgroup_headroom(groups, root) == [(GIB, "the 1.00 GiB limit of cgroup /")]


def test_version_1_of_cgroups(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("7:cpu:/\n4:memory:/box\n0::/\n")
    folder = root / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(GIB))
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n")
    assert memory._cgroup_headroom(groups, root) == [(GIB + GIB // 2, "the 2.00 GiB limit of cgroup /box")]
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory._cgroup_headroom(groups, root) == []


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert memory._cgroup_headroom(tmp_path / "nothing", tmp_path) == []


def test_available_names_what_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = namedtuple("machine", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine(4 * GIB, 16 * GIB))
    monkeypatch.setattr(memory, "_cgroup_headroom", lambda: [])
    assert memory.available() == Available(4 * GIB, "what is free of this machine's 16.0 GiB")
    monkeypatch.setattr(memory, "_cgroup_headroom", lambda: [(9 * GIB, "loose"), (GIB, "tight")])
    assert memory.available() == Available(GIB, "tight")
    assert not memory.available().fits(need(GIB, 1))


@pytest.mark.parametrize(("words", "number"), [("16", 16), ("16GB", 16), ("12.5 GiB", 12.5), ("8g", 8)])
def test_sizes_of_memory(words: str, number: float) -> None:
    assert memory.parse_gigabytes(words) == number


@pytest.mark.parametrize("words", ["", "GB", "0", "-1", "16MB", "nan", "1e3", "16GBx"])
def test_what_is_no_size(words: str) -> None:
    with pytest.raises(UsageError):
        memory.parse_gigabytes(words)
