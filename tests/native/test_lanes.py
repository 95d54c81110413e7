from __future__ import annotations

import platform
import threading

import numpy as np
import pytest

from localmix.native import lanes
from localmix.native.kernels import quantize_rows
from localmix.tensor_types import TensorType

KERNELS = [
    (kind, weighted, name)
    for kind in TensorType
    for weighted in (False, True)
    for name in lanes.instruction_sets()
    if lanes.kernel(kind, weighted, name)
]
built = pytest.mark.skipif(not lanes.instruction_sets(), reason="the lane kernels were not built")


def weights(count: int = 40, columns: int = 1024) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, columns)).astype(np.float32)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="ggml's loops are fused on this processor"
)
@pytest.mark.parametrize(("kind", "weighted", "name"), KERNELS, ids=lambda value: getattr(value, "name", str(value)))
def test_lanes_write_ggmls_bytes(kind: TensorType, weighted: bool, name: str) -> None:
    rows = weights()
    importance = np.random.default_rng(8).random(rows.shape[1]).astype(np.float32) if weighted else None
    wanted = quantize_rows(kind, rows, importance, "ggml")
    assert np.array_equal(quantize_rows(kind, rows, importance, name), wanted)


@built
def test_ordinary_weights_never_go_back_to_ggml() -> None:
    before = lanes.reference_calls()
    rows = weights()
    for kind, weighted, name in KERNELS:
        quantize_rows(kind, rows, np.ones(rows.shape[1], np.float32) if weighted else None, name)
    assert lanes.reference_calls() == before


@built
def test_threads_quantize_at_once() -> None:
    rows = weights()
    wanted = quantize_rows(TensorType.Q4_K, rows, None)
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(quantize_rows(TensorType.Q4_K, rows, None))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(np.array_equal(one, wanted) for one in found)


@built
def test_the_widest_instruction_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lanes.SWITCH, raising=False)
    found = lanes.kernels()
    assert found.name == lanes.instruction_sets()[-1]
    assert found.reason == ""
    assert "Q4_K" in found.types
    assert "Q4_K" in found.description


@built
def test_the_environment_asks_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lanes.SWITCH, "baseline")
    assert lanes.kernels().name == "baseline"
    monkeypatch.setenv(lanes.SWITCH, "ggml")
    assert lanes.kernels() == lanes.Kernels("ggml", f"{lanes.SWITCH} asks for ggml", ())
    monkeypatch.setenv(lanes.SWITCH, "avx1024")
    assert lanes.chosen() == "ggml"


def test_without_the_library_ggml_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_library", lambda: None)
    monkeypatch.setattr(lanes, "LIBRARY", lanes.LIBRARY.with_name("missing.so"))
    monkeypatch.delenv(lanes.SWITCH, raising=False)
    lanes.instruction_sets.cache_clear()
    lanes.kernel.cache_clear()
    try:
        assert lanes.chosen() == "ggml"
        assert "no C++ compiler" in lanes.kernels().description
        assert lanes.reference_calls() == 0
        rows = weights()
        wanted = quantize_rows(TensorType.Q6_K, rows, None, "ggml")
        assert np.array_equal(quantize_rows(TensorType.Q6_K, rows, None), wanted)
    finally:
        lanes.instruction_sets.cache_clear()
        lanes.kernel.cache_clear()


def test_a_type_without_a_kernel_is_ggmls() -> None:
    rows = weights()
    assert lanes.kernel(TensorType.MXFP4, False, lanes.chosen()) is None
    assert quantize_rows(TensorType.MXFP4, rows, None).shape == (40, 1024 // 32 * 17)
