"""Lanes against ggml_quantize_chunk: every type, instruction set, kind of row and kind of importance, byte for byte.

Elsewhere than on x86-64, compilers fuse products and sums in ggml's loops: there lanes are held against what ggml
wrote on x86-64.
"""

from __future__ import annotations

import functools
import json
import platform

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from localmix.native.kernels import quantize_rows, requires_importance
from localmix.native.lanes import instruction_sets, kernel
from localmix.tensor_types import BLOCKS, TensorType
from tests.conformance.record_lanes import FIXTURE, digest
from tests.lane_rows import ggml_takes, importances, rows

ALL = [
    (kind, name)
    for kind in TensorType
    for name in instruction_sets()
    if kernel(kind, False, name) or kernel(kind, True, name)
]
# more than the lanes of the widest, and no multiple of any
COUNT, COLUMNS = 19, 512

pytestmark = pytest.mark.skipif(not ALL, reason="the lane kernels were not built")
same_roundings = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="ggml's loops are fused on this processor"
)


@functools.cache
def expected(kind: TensorType) -> dict[tuple[str, str], np.ndarray]:
    return {
        (row_name, importance_name): quantize_rows(kind, values, importance, "ggml")
        for importance_name, importance in importances(COLUMNS)
        if importance is not None or not requires_importance(kind)
        for row_name, values in rows(COUNT, COLUMNS)
        if ggml_takes(kind, values, importance)
    }


@same_roundings
@pytest.mark.parametrize(("kind", "name"), ALL, ids=lambda value: getattr(value, "name", value))
def test_the_bytes_are_ggmls(kind: TensorType, name: str) -> None:
    inputs = dict(rows(COUNT, COLUMNS))
    weights = dict(importances(COLUMNS))
    wrong = []
    for (row_name, importance_name), wanted in expected(kind).items():
        importance = weights[importance_name]
        if kernel(kind, importance is not None, name):
            got = quantize_rows(kind, inputs[row_name], importance, name)
            if not np.array_equal(got, wanted):
                wrong.append(f"{row_name}, {importance_name}: {(got != wanted).any(1).sum()} of {COUNT} rows")
    assert not wrong


def floats(extreme: int) -> st.SearchStrategy[float]:
    """Finite float32 values; `extreme` is the largest power of ten."""
    most = float(np.float32(10.0**extreme))
    return st.floats(-most, most, width=32)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """One to three rows of 256, and their importance: few values drawn freely, spread by a pattern."""
    palette = draw(st.lists(floats(draw(st.sampled_from([0, 3, 18, 38]))), min_size=1, max_size=12))
    weights = draw(st.lists(st.floats(0, float(np.float32(1e12)), width=32), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 3))
    values = random.choice(np.array(palette, np.float32), (count, 256))
    if draw(st.booleans()):
        with np.errstate(over="ignore"):
            noisy = values * random.standard_normal(values.shape).astype(np.float32)
        values = np.where(np.isfinite(noisy), noisy, values)
    return values, random.choice(np.array(weights, np.float32), 256)


@same_roundings
@pytest.mark.parametrize("kind", dict(ALL), ids=lambda kind: kind.name)
@settings(max_examples=60, deadline=None)
@given(case=drawn(), weighted=st.booleans())
def test_drawn_rows_too(kind: TensorType, case: tuple[np.ndarray, np.ndarray], weighted: bool) -> None:
    values, weights = case
    importance = weights if weighted or requires_importance(kind) else None
    assume(ggml_takes(kind, values, importance))
    wanted = quantize_rows(kind, values, importance, "ggml")
    for name in instruction_sets():
        if kernel(kind, importance is not None, name):
            assert np.array_equal(quantize_rows(kind, values, importance, name), wanted), name


@same_roundings
@pytest.mark.parametrize(("kind", "name"), ALL, ids=lambda value: getattr(value, "name", value))
def test_any_number_of_blocks(kind: TensorType, name: str) -> None:
    random = np.random.default_rng(4)
    for count, columns in ((1, BLOCKS[kind][0]), (3, 256), (1, 4096), (16, 256), (17, 768), (33, 256)):
        values = random.standard_normal((count, columns)).astype(np.float32)
        for importance in (None, random.random(columns).astype(np.float32)):
            if kernel(kind, importance is not None, name):
                wanted = quantize_rows(kind, values, importance, "ggml")
                assert np.array_equal(quantize_rows(kind, values, importance, name), wanted)


@pytest.mark.parametrize(("kind", "name"), ALL, ids=lambda value: getattr(value, "name", value))
def test_the_bytes_are_those_of_ggml_on_x86(kind: TensorType, name: str) -> None:
    if kind in (TensorType.IQ1_S, TensorType.IQ1_M) and platform.libc_ver()[0] != "glibc":
        pytest.skip("recorded with glibc, whose qsort decides the order of equal weights")
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))[kind.name]
    for weighted in (False, True):
        if kernel(kind, weighted, name) and recorded[weighted] is not None:
            assert digest(kind, weighted, name) == recorded[weighted]
