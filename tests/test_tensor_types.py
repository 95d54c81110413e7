from __future__ import annotations

import ctypes

import numpy as np
import pytest

from localmix.native.library import ggml
from localmix.tensor_types import BLOCKS, FLOAT_TYPES, TensorType, fits, row_bytes, widen


@pytest.mark.parametrize("kind", TensorType, ids=lambda kind: kind.name)
def test_every_row_of_the_table_is_ggmls(kind: TensorType) -> None:
    library = ggml()
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    assert library.ggml_type_name(int(kind)).decode().upper() == kind.name.upper()
    assert (library.ggml_blck_size(int(kind)), library.ggml_type_size(int(kind))) == BLOCKS[kind]


def test_row_bytes_and_fits() -> None:
    assert row_bytes(TensorType.Q4_K, 4096) == 4096 // 256 * 144
    assert fits(TensorType.Q4_K, 512)
    assert not fits(TensorType.Q4_K, 352)
    assert fits(TensorType.Q5_0, 352)


def test_widen_is_exact_for_every_bfloat16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    wide = widen(bits, TensorType.BF16)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.view(np.uint32) >> 16, bits)
    assert not (wide.view(np.uint32) & 0xFFFF).any()


def test_widen_is_exact_for_every_half() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(FLOAT_TYPES[TensorType.F16]).reshape(256, 256)
    with np.errstate(invalid="ignore"):
        back = widen(halves, TensorType.F16).astype(np.float16)
    np.testing.assert_array_equal(back, halves)  # NaN equals NaN here
