"""Quantize and decode rows of weights: one function each in front of ggml's kernels and the lanes that equal them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.native import lanes
from localmix.native.library import ggml
from localmix.tensor_types import BLOCKS, FLOAT_TYPES, TensorType, row_bytes, widen


@functools.cache
def _chunk_kernel() -> Any:
    """ggml_quantize_chunk with its C signature (ggml.h); `start` counts weights, not bytes."""
    kernel = ggml().ggml_quantize_chunk
    kernel.restype = ctypes.c_size_t
    kernel.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return kernel


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def _decoder(kind: TensorType) -> Any:
    traits = ggml().ggml_get_type_traits
    traits.restype = ctypes.POINTER(_TypeTraits)
    found = traits(int(kind)).contents
    if (found.type_name or b"").decode().upper() != kind.name.upper() or found.type_size != BLOCKS[kind][1]:
        raise InputError("This llama.cpp lays out its type table differently.", "Run `localmix doctor`.")
    return found.to_float


def dequantize_rows(kind: TensorType, rows: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.float32]:
    """Decode quantized rows, as llama.cpp does. Releases the GIL.

    Args:
        rows: `[n, row_bytes(kind, columns)]`, C-contiguous.

    Returns:
        float32 `[n, columns]`.
    """
    decoded = np.empty((rows.shape[0], columns), np.float32)
    _decoder(kind)(rows.ctypes.data, decoded.ctypes.data, decoded.size)
    return decoded


def decode_rows(kind: TensorType, rows: npt.NDArray[Any], columns: int) -> npt.NDArray[np.float32]:
    """Decode rows of any type, plain or quantized, as a source gives them: float32 `[n, columns]`, C-contiguous."""
    if kind in FLOAT_TYPES:
        return np.ascontiguousarray(widen(rows, kind))
    return dequantize_rows(kind, np.ascontiguousarray(rows), columns)


@functools.cache
def _validator() -> Any:
    """ggml_validate_row_data with its C signature (ggml.h)."""
    check = ggml().ggml_validate_row_data
    check.restype = ctypes.c_bool
    check.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return check


def is_valid(kind: TensorType, rows: npt.NDArray[np.uint8]) -> bool:
    """Whether ggml takes these bytes for rows of the type: every scale a number. Releases the GIL.

    Args:
        rows: `[n, row_bytes(kind, columns)]`, C-contiguous.
    """
    return bool(_validator()(int(kind), rows.ctypes.data, rows.nbytes))


@functools.cache
def requires_importance(kind: TensorType) -> bool:
    """Whether ggml aborts the process when this type is quantized without an importance row."""
    question = ggml().ggml_quantize_requires_imatrix
    question.restype = ctypes.c_bool
    return bool(question(int(kind)))


def quantize_rows(
    kind: TensorType,
    rows: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    kernels: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Quantize whole rows, with the bytes `llama-quantize` writes. Releases the GIL.

    Args:
        kind: any type ggml can encode, the plain F16 and BF16 included.
        rows: `[n, columns]`, C-contiguous; columns a multiple of the type's block.
        importance: `[columns]`, the weight of each column's squared error, or None for none.
        kernels: `ggml` or one of `lanes.instruction_sets()`; None for the quickest. The bytes are the same.

    Returns:
        `[n, row_bytes(kind, columns)]`.

    Raises:
        ValueError: the type needs an importance row and has none: ggml would abort the process.
    """
    count, columns = rows.shape
    if importance is None and requires_importance(kind):
        raise ValueError(f"{kind.name} cannot be quantized without an importance row")
    encoded = np.empty((count, row_bytes(kind, columns)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    if quick := lanes.kernel(kind, weights is not None, kernels or lanes.chosen()):
        quick(rows.ctypes.data, encoded.ctypes.data, count, columns, weights)
    else:
        # The first call for an I-quant builds ggml's tables, under a lock: up to 17 s, which the lanes do without.
        _chunk_kernel()(int(kind), rows.ctypes.data, encoded.ctypes.data, 0, count, columns, weights)
    return encoded
