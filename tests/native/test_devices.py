"""The devices of this machine, and the threads that a container's quota leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from localmix.native.devices import _cgroup_quota, default_threads, devices


def test_there_is_a_processor_with_this_machines_memory() -> None:
    processors = [device for device in devices() if device.kind == "cpu"]
    assert len(processors) == 1
    assert processors[0].name == "CPU" and processors[0].description
    assert processors[0].total <= psutil.virtual_memory().total * 1.01


def test_default_threads_are_at_most_the_cores() -> None:
    assert 1 <= default_threads() <= (psutil.cpu_count(logical=False) or 1)


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [({}, None), ({"": "max 100000"}, None), ({"a/b": "250000 100000"}, 2), ({"a": "50000 100000"}, 1)],
)
def test_the_tightest_quota_of_all_ancestors_counts(
    tmp_path: Path, quotas: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "fs" / "a" / "b").mkdir(parents=True)
    for folder, text in quotas.items():
        (tmp_path / "fs" / folder / "cpu.max").write_text(text + "\n")
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=old:/x\n0::/a/b\n")
    assert _cgroup_quota(membership, tmp_path / "fs") == expected
    assert _cgroup_quota(tmp_path / "missing", tmp_path / "fs") is None
