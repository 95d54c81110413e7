"""FP8 weights of a checkpoint, widened while they are read: eight bits a weight, and scales for blocks of them.

A scale stands for a block of rows and columns (DeepSeek V3 and what follows it), for a row, or for a whole matrix.
The product of weight and scale is made in float32 and rounded once.
Format: OCP 8-bit Floating Point Specification, E4M3 (without infinities) and E5M2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.native.kernels import quantize_rows
from localmix.sources.documents import shown
from localmix.sources.safetensors import WEIGHT_DTYPES, StoredTensor
from localmix.tensor_types import TensorType, widen

# Of blocks whose size nobody tells: the one that all known models have.
DEFAULT_BLOCK = (128, 128)

# Scales of what is computed, not of what is stored.
_OF_ACTIVATIONS = re.compile(r"\.((input|activation|output)_scale|input_scale_ub|[qkv]_scale|kv_scale)$")

_SCALE_ENDINGS = ("_scale_inv", "_scale")
_POWERS = "F8_E8M0"
_AGAIN = "Download the checkpoint again."


def _e4m3() -> npt.NDArray[np.float32]:
    """The value of each byte: a sign, four bits of exponent (less 7), three digits; all ones is no number."""
    codes = np.arange(128)
    exponents, digits = codes >> 3, codes & 7
    normal = np.ldexp(8.0 + digits, exponents - 10)
    positive = np.where(exponents == 0, np.ldexp(digits.astype(np.float64), -9), normal).astype(np.float32)
    positive[127] = np.nan
    return np.concatenate([positive, -positive])


# E5M2 is the upper half of an F16.
_VALUES: Mapping[str, npt.NDArray[np.float32]] = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256, dtype="<u2") << 8).view("<f2").astype(np.float32),
}


@dataclass(frozen=True)
class Fp8Tensor(StoredTensor):
    """An FP8 tensor and its scales as one of BF16 or F32, whatever `dtype` says.

    Attributes:
        encoding: the dtype in the file.
        matrix: rows and columns of one matrix, of which a stack of experts has several.
        scale: None where the values stand for themselves.
        block: rows and columns that share a scale.
    """

    encoding: str
    matrix: tuple[int, int]
    scale: StoredTensor | None
    block: tuple[int, int]

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        columns = math.prod(self.shape[1:])
        first, last = start * columns // self.matrix[1], stop * columns // self.matrix[1]
        codes = np.empty((last - first, self.matrix[1]), np.uint8)
        if codes.size:
            self.file.read_into(self.offset + first * self.matrix[1], codes.reshape(-1).data)
        values = _VALUES[self.encoding][codes]
        if self.scale is not None and codes.size:
            values *= self._scales(first, last)
        if self.dtype == "F32":
            return values.reshape(stop - start, columns)
        bits = quantize_rows(TensorType.BF16, values, None).view(WEIGHT_DTYPES["BF16"])
        return bits.reshape(stop - start, columns)

    def _scales(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """The scale of each weight of rows `[first:last)`, or of each row where columns share it."""
        assert self.scale is not None
        rows, columns = self.matrix
        per_matrix = -(-rows // self.block[0])
        numbers = np.arange(first, last)
        places = numbers // rows * per_matrix + numbers % rows // self.block[0]
        if math.prod(self.scale.shape) == 1:
            places[:] = 0
        low, high = int(places[0]), int(places[-1]) + 1
        width = 1 if math.prod(self.scale.shape) == 1 else -(-columns // self.block[1])
        found = _read_scales(self.scale, low * width, high * width).reshape(high - low, width)
        if width > 1:
            found = np.repeat(found, self.block[1], axis=1)[:, :columns]
        rows_of_scales: npt.NDArray[np.float32] = found[places - low]
        return rows_of_scales


def _read_scales(scale: StoredTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Scales by their place in the file, in float32."""
    if scale.dtype == _POWERS:
        codes = np.frombuffer(scale.file.read(scale.offset + start, stop - start), np.uint8)
        powers: npt.NDArray[np.float32] = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
        return np.where(codes == 255, np.float32(np.nan), powers)
    kind = WEIGHT_DTYPES[scale.dtype]
    size = kind.itemsize
    data = np.frombuffer(scale.file.read(scale.offset + start * size, (stop - start) * size), kind)
    return widen(data, TensorType.BF16) if scale.dtype == "BF16" else data.astype(np.float32)


def widen_fp8(
    stored: dict[str, StoredTensor], *, dtype: str, block: tuple[int, int] | None, scaled: bool
) -> tuple[int, list[str]]:
    """Put a wide tensor in the place of each FP8 one and its scales.

    Args:
        stored: by name; changed.
        dtype: `BF16` or `F32`, of the wide tensors.
        block: rows and columns that share a scale, as the configuration says.
        scaled: whether every FP8 tensor must have scales.

    Returns:
        How many tensors there were, and the names of scales that are not of weights and were dropped.

    Raises:
        InputError: scales are missing, or fit no way of sharing them.
    """
    names = [name for name, tensor in stored.items() if tensor.dtype in _VALUES]
    for name in names:
        tensor = stored[name]
        scales = [stored.pop(name + ending) for ending in _SCALE_ENDINGS if name + ending in stored]
        if len(scales) != 1 and (scaled or scales):
            raise InputError(f"{tensor.file.path}: the FP8 tensor {shown(name)} has {len(scales)} scales.", _AGAIN)
        stored[name] = _widened(tensor, scales[0] if scales else None, dtype, block or DEFAULT_BLOCK)
    dropped = [name for name in stored if _OF_ACTIVATIONS.search(name)] if names else []
    for name in dropped:
        del stored[name]
    return len(names), dropped


def _widened(tensor: StoredTensor, scale: StoredTensor | None, dtype: str, block: tuple[int, int]) -> Fp8Tensor:
    shape = tensor.shape
    matrix = (shape[-2], shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
    shared = matrix if scale is None else _shared(tensor, scale, matrix, block)
    return Fp8Tensor(tensor.name, dtype, shape, tensor.file, tensor.offset, tensor.dtype, matrix, scale, block=shared)


def _shared(
    tensor: StoredTensor, scale: StoredTensor, matrix: tuple[int, int], block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shape that the scales have.

    Raises:
        InputError: it is none that is known.
    """
    if scale.dtype in WEIGHT_DTYPES or scale.dtype == _POWERS:
        if math.prod(scale.shape) == 1:
            return matrix
        leading = tensor.shape[:-2]
        of_rows = (*leading, matrix[0])
        if scale.shape in (of_rows, (*of_rows, 1)):
            return 1, matrix[1]
        if scale.shape in (leading, (*leading, 1, 1)):
            return matrix
        if scale.shape == (*leading, -(-matrix[0] // block[0]), -(-matrix[1] // block[1])):
            return block
    raise InputError(
        f"{scale.file.path}: the scales of {shown(tensor.name)} are {scale.dtype} {list(scale.shape)},"
        f" which do not fit {list(tensor.shape)} in blocks of {block[0]} x {block[1]}.",
        _AGAIN,
    )
