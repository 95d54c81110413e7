"""The types a tensor can have in a GGUF file: block size, bytes of a block, numpy's view of the plain ones.

A table of our own because gguf-py's lags behind ggml (0.19 has no Q2_0); the tests hold every row against ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt


class TensorType(IntEnum):
    """ggml's tensor types by name; the numbers are those stored in GGUF files (ggml.h, `enum ggml_type`)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# type: (weights in a block, bytes of a block); ggml.c, `type_traits`
BLOCKS: Mapping[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
    TensorType.F64: (1, 8),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 36),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ1_M: (256, 56),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ4_XS: (256, 136),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
    TensorType.Q2_0: (64, 18),
}

# The types that hold plain floating-point weights; every other one is a quantization.
FLOAT_TYPES: Mapping[TensorType, np.dtype[Any]] = {
    TensorType.F32: np.dtype("<f4"),
    TensorType.F16: np.dtype("<f2"),
    TensorType.BF16: np.dtype("<u2"),  # numpy has no bfloat16: the bits, as unsigned integers
}

# What ggml can write from float32: the rest are types of intermediate results and of integers.
ENCODABLE = frozenset(TensorType) - {
    TensorType.Q8_1,
    TensorType.Q8_K,
    TensorType.I8,
    TensorType.I16,
    TensorType.I32,
    TensorType.I64,
    TensorType.F64,
}


def row_bytes(kind: TensorType, columns: int) -> int:
    """Bytes of one row of `columns` weights; `columns` must be a multiple of the type's block."""
    weights, size = BLOCKS[kind]
    return columns // weights * size


def bits(kind: TensorType) -> float:
    """Bits of a weight, scales counted."""
    weights, size = BLOCKS[kind]
    return size * 8 / weights


def fits(kind: TensorType, columns: int) -> bool:
    """Whether rows of `columns` weights can be cut into whole blocks of this type."""
    return columns % BLOCKS[kind][0] == 0


def widen(values: npt.NDArray[Any], kind: TensorType) -> npt.NDArray[np.float32]:
    """F32, F16 or BF16 rows as float32, exactly; F32 comes back as it is, without a copy."""
    if kind == TensorType.BF16:
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)
