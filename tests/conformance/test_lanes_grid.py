"""The I-quants on a grid, where lanes could differ from ggml: points on and off it, ties, zeros and overflows."""

from __future__ import annotations

import numpy as np
import pytest

from localmix.native.kernels import dequantize_rows, quantize_rows, requires_importance
from localmix.native.lanes import instruction_sets, kernel, reference_calls
from localmix.tensor_types import TensorType, row_bytes

KINDS = [TensorType[name] for name in ("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")]
CASES = [(kind, name) for kind in KINDS for name in instruction_sets()]
COLUMNS = 1024

pytestmark = [
    pytest.mark.skipif(not CASES, reason="the lane kernels were not built"),
    pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "name", value)),
]


def assert_ggmls_bytes(kind: TensorType, name: str, rows: np.ndarray) -> None:
    for weights in ((0.01 + np.random.default_rng(1).random(COLUMNS)).astype(np.float32), None):
        if weights is not None or not requires_importance(kind):
            assert kernel(kind, weights is not None, name)
            wanted = quantize_rows(kind, rows, weights, "ggml")
            assert np.array_equal(quantize_rows(kind, rows, weights, name), wanted)


def test_what_was_decoded_from_the_grid(kind: TensorType, name: str) -> None:
    random = np.random.default_rng(2)
    packed = random.integers(0, 256, (64, row_bytes(kind, COLUMNS)), np.uint8)
    decoded = dequantize_rows(kind, packed, COLUMNS)
    rows = decoded[np.isfinite(decoded).all(1)]
    assert len(rows) > 16
    assert_ggmls_bytes(kind, name, rows)
    # and next to it
    noise = random.standard_normal(rows.shape).astype(np.float32)
    assert_ggmls_bytes(kind, name, rows * (1 + 0.1 * noise))


def test_few_values_so_that_many_are_equal(kind: TensorType, name: str) -> None:
    random = np.random.default_rng(3)
    for count in (1, 2, 3, 5, 17):
        values = np.append(random.standard_normal(count), [0.0, -0.0])
        assert_ggmls_bytes(kind, name, random.choice(values, (9, COLUMNS)).astype(np.float32))
    rows = 0.02 * random.standard_normal((9, COLUMNS)).astype(np.float32)
    as_bfloat16 = (rows.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert_ggmls_bytes(kind, name, as_bfloat16)


def test_parts_that_are_zero(kind: TensorType, name: str) -> None:
    random = np.random.default_rng(4)
    for size in (8, 16, 32, 256):
        rows = random.standard_normal((33, COLUMNS // size, size))
        rows[random.random(rows.shape[:2]) < 0.4] = 0
        rows[random.random(rows.shape[:2]) < 0.2] *= 1e-12
        assert_ggmls_bytes(kind, name, rows.reshape(33, COLUMNS).astype(np.float32))


def test_a_flipped_sign_that_outweighs_the_rest(kind: TensorType, name: str) -> None:
    # The weight with the least error changes its sign where signs must be even; here it turns the scale negative.
    random = np.random.default_rng(6)
    rows = random.uniform(500, 1500, (8, COLUMNS)).astype(np.float32)
    rows[:, ::8] = -random.uniform(0.5, 2, rows[:, ::8].shape)
    weights = 10 ** random.uniform(-10, -7, COLUMNS)
    weights[::8] = 10 ** random.uniform(-6, -2, COLUMNS // 8)
    importance = weights.astype(np.float32)
    wanted = quantize_rows(kind, rows, importance, "ggml")
    if kind in (TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ3_XXS):
        assert (dequantize_rows(kind, wanted, COLUMNS)[:, 1::8] < 0).any()
    assert np.array_equal(quantize_rows(kind, rows, importance, name), wanted)


def test_where_distances_could_overflow_ggml_is_asked(kind: TensorType, name: str) -> None:
    rows = np.random.default_rng(5).standard_normal((5, COLUMNS)).astype(np.float32)
    rows[2] *= 1e-5
    weights = np.full(COLUMNS, 1e20, np.float32)
    weights[256:512] = 3e34
    wanted = quantize_rows(kind, rows, weights, "ggml")
    before = reference_calls()
    assert np.array_equal(quantize_rows(kind, rows, weights, name), wanted)
    assert reference_calls() == before + 4
