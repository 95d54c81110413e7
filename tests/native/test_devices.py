"""The devices of this machine, and the threads that a container's quota leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from localmix.native.devices import _cgroup_quota, default_threads, devices, has_gpu_backend, has_rpc_backend


def test_there_is_a_processor_with_this_machines_memory() -> None:
    processors = [device for device in devices() if device.kind == "cpu"]
    assert len(processors) == 1
    assert processors[0].name == "CPU" and processors[0].description
    assert processors[0].total <= psutil.virtual_memory().total * 1.01


@pytest.mark.parametrize(
    ("names", "gpu", "rpc"),
    [
        (["libggml-base.so", "libggml-cpu.so.0", "libllama.so"], False, False),
        (["libggml-cpu.so", "libggml-rpc.so"], False, True),
        (["libggml-cuda.so", "libggml-rpc.so.0.1"], True, True),
        (["ggml-vulkan.dll", "ggml-rpc.dll"], True, True),
        (["libggml-metal.dylib", "libggml-blas.dylib"], True, False),
    ],
)
def test_other_machines_are_no_gpu_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], gpu: bool, rpc: bool
) -> None:
    library = tmp_path / "llama_cpp" / "lib"
    library.mkdir(parents=True)
    (library.parent / "__init__.py").touch()
    for name in names:
        (library / name).touch()
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (has_gpu_backend(), has_rpc_backend()) == (gpu, rpc)


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
