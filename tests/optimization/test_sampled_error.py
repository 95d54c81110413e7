from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from localmix.errors import InputError
from localmix.importance import Entry, Importance
from localmix.native.kernels import quantize_rows
from localmix.optimization.sampled_error import can_hold, relative_errors, sampled_rows
from localmix.sources.base import Source, TensorInfo
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType, widen
from tests.random_model import write_random_model

ALL = 1 << 40


def importance_of(source: Source, seed: int = 3) -> Importance:
    """A random importance row for every expert of every tensor of the blocks."""
    random = np.random.default_rng(seed)
    entries = {}
    for tensor in source.tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = random.lognormal(0, 2, (experts, tensor.columns)).astype(np.float32)
            entries[tensor.name] = Entry(sums, np.ones(experts, np.float32))
    return Importance(entries)


def test_the_error_of_all_rows_is_that_of_the_formula(random_model: Path) -> None:
    with open_source(random_model) as source:
        importance = importance_of(source)
        info = next(tensor for tensor in source.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
        found = relative_errors(source, [TensorType.IQ2_S, TensorType.Q4_K], importance, tensors=[info], weights=ALL)
        wide = widen(source.read(info, 0, info.rows), info.type).reshape(info.shape)
        rows = importance.rows(info)
    assert rows is not None
    for kind, error in found[info.name].items():
        lost = energy = 0.0
        for expert, row in zip(wide, rows, strict=True):
            # gguf-py decodes: a reference of its own
            decoded = dequantize(quantize_rows(kind, expert, row), gguf.GGMLQuantizationType(kind))
            lost += float((row * (decoded.astype(float) - expert) ** 2).sum())
            energy += float((row * expert.astype(float) ** 2).sum())
        assert error == pytest.approx(lost / energy, rel=1e-5)
    assert found[info.name][TensorType.Q4_K] < found[info.name][TensorType.IQ2_S] / 4


def test_few_rows_tell_nearly_what_all_do(tinymix_bf16: Path) -> None:
    kinds = [TensorType.Q2_K, TensorType.IQ3_S, TensorType.Q4_K, TensorType.Q6_K]
    with open_source(tinymix_bf16) as source:
        sampled = relative_errors(source, kinds, threads=1)
        full = relative_errors(source, kinds, weights=ALL, threads=1)
    ratios = [sampled[name][kind] / full[name][kind] for name in full for kind in full[name]]
    assert len(ratios) > 4 * 20
    assert 0.99 < np.median(ratios) < 1.01
    assert min(ratios) > 0.7 and max(ratios) < 1.4


def test_sampled_rows_are_spread_over_all_experts_and_the_same_each_time() -> None:
    stacked = TensorInfo("blk.0.ffn_up_exps.weight", (8, 14336, 4096), TensorType.BF16)
    places = sampled_rows(stacked)
    assert [len(rows) for rows in places] == [2] * 8
    assert all(0 <= row - part * 7168 < 7168 for rows in places for part, row in enumerate(rows))
    assert len({tuple(rows) for rows in places}) == 8
    assert places == sampled_rows(stacked)
    assert sampled_rows(TensorInfo("a.weight", (3, 256), TensorType.F32)) == [[0, 1, 2]]


class _Counting(Source):
    """A source that notes which rows are read."""

    def __init__(self, inner: Source) -> None:
        self.path, self.metadata, self.tensors, self.notes = inner.path, inner.metadata, inner.tensors, []
        self._inner = inner
        self.weights = 0

    def read(self, tensor: TensorInfo, start: int, stop: int) -> np.ndarray:
        self.weights += (stop - start) * tensor.columns
        return self._inner.read(tensor, start, stop)

    def files(self) -> list[Path]:
        return []


def test_no_more_than_the_sample_is_read(random_model: Path) -> None:
    with open_source(random_model) as source:
        counting = _Counting(source)
        info = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_up_exps.weight")
        relative_errors(counting, [TensorType.Q4_0], tensors=[info], weights=1 << 14)
    assert counting.weights == 1 << 14


def test_types_that_a_tensor_cannot_hold_are_left_out(tmp_path: Path) -> None:
    narrow = np.random.default_rng(1).standard_normal((2, 256, 96)).astype(np.float32)
    path = write_random_model(
        tmp_path / "narrow.gguf", layers=1, experts=2, change={"blk.0.ffn_down_exps.weight": narrow}
    )
    kinds = [TensorType.IQ1_S, TensorType.IQ3_XXS, TensorType.Q4_K, TensorType.IQ4_NL, TensorType.F16]
    with open_source(path) as source:
        found = relative_errors(source, kinds)
        assert set(found["blk.0.ffn_down_exps.weight"]) == {TensorType.IQ4_NL, TensorType.F16}
        assert set(found["blk.0.attn_q.weight"]) == {TensorType.Q4_K, TensorType.IQ4_NL, TensorType.F16}
        assert TensorType.IQ3_XXS in found["token_embd.weight"]
        assert TensorType.IQ1_S not in found["token_embd.weight"]
        with_importance = relative_errors(source, kinds, importance_of(source))
    assert TensorType.IQ1_S in with_importance["blk.0.attn_q.weight"]
    assert not any(name.endswith("_norm.weight") for name in found)


def test_what_llama_quantize_refuses_without_an_importance_row_is_not_held() -> None:
    tensor = TensorInfo("blk.0.attn_q.weight", (256, 256), TensorType.BF16)
    assert not can_hold(tensor, TensorType.IQ2_S, has_importance=False)
    assert can_hold(tensor, TensorType.IQ2_S, has_importance=True)
    assert can_hold(tensor, TensorType.IQ3_S, has_importance=False)


def test_a_type_that_is_the_own_one_loses_nothing_and_f16_can_overflow(tmp_path: Path) -> None:
    large = np.full((256, 256), 1e6, np.float32)
    path = write_random_model(tmp_path / "large.gguf", layers=1, change={"blk.0.attn_q.weight": large})
    with open_source(path) as source:
        found = relative_errors(source, [TensorType.F32, TensorType.F16, TensorType.BF16])
    assert found["blk.0.attn_k.weight"][TensorType.F32] == 0
    assert 0 < found["blk.0.attn_k.weight"][TensorType.F16] < found["blk.0.attn_k.weight"][TensorType.BF16] < 1e-4
    assert TensorType.F16 not in found["blk.0.attn_q.weight"]


def test_a_nan_in_a_sampled_row_is_named(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "nan.gguf", layers=1, poison="blk.0.attn_q.weight")
    with open_source(path) as source, pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight holds nan at row"):
        relative_errors(source, [TensorType.Q8_0], weights=ALL)


def test_progress_counts_weights(random_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_source(random_model) as source:
        relative_errors(
            source, [TensorType.Q8_0], weights=1, progress=lambda done, all_, name: seen.append((done, all_))
        )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
