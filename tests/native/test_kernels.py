from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from localmix.native.kernels import quantize_rows, requires_importance
from localmix.tensor_types import BLOCKS, FLOAT_TYPES, TensorType

# Types ggml has no encoder for, and two that gguf-py cannot decode (their bytes are compared with llama-quantize's)
LEFT_OUT = {"F32", "F64", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0", "Q2_0"}
ENCODED = [kind for kind in TensorType if kind.name not in LEFT_OUT]


def weights(rows: int = 8, columns: int = 1024) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", ENCODED, ids=lambda kind: kind.name)
def test_gguf_py_decodes_what_we_encode_close_to_the_weights(kind: TensorType) -> None:
    rows = weights()
    encoded = quantize_rows(kind, rows, np.ones(rows.shape[1], np.float32))
    decoded = dequantize(encoded, GGMLQuantizationType(int(kind)))
    error = np.mean((decoded - rows) ** 2) / np.mean(rows**2)
    if kind in FLOAT_TYPES:
        assert error < 1e-5
    elif kind in (TensorType.TQ1_0, TensorType.TQ2_0):
        assert error < 0.7  # made for ternary weights, not for a normal distribution
    else:
        # each bit divides the squared error by four; measured on these types: 2.0 to 5.0
        assert error < 6 * 4.0 ** (-BLOCKS[kind][1] * 8 / BLOCKS[kind][0])


def test_importance_moves_the_error_to_the_columns_that_matter_less() -> None:
    rows = weights(64)
    importance = np.ones(1024, np.float32)
    importance[::2] = 100
    decoded = dequantize(quantize_rows(TensorType.IQ2_XS, rows, importance), GGMLQuantizationType.IQ2_XS)
    squared = (decoded - rows) ** 2
    assert squared[:, ::2].mean() < 0.8 * squared[:, 1::2].mean()


def test_a_missing_importance_row_is_an_error_and_no_abort() -> None:
    assert requires_importance(TensorType.IQ1_S)
    with pytest.raises(ValueError, match="importance"):
        quantize_rows(TensorType.IQ1_S, weights(), None)
