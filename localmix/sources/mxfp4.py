"""MXFP4 weights of a checkpoint (gpt-oss), widened: four bits a weight, and a power of two for each 32 of them.

Every value is exact in BF16, which has more bits for the digits and as many for the exponent.
Format: OCP Microscaling Formats, E2M1 elements and E8M0 scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.sources.positional import PositionalFile
from localmix.sources.safetensors import StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"

_GROUP = 32
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])

# A scale is 2 to the power of its byte less this; 255 is no number.
_BIAS, _NO_NUMBER = 127, 255


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """Blocks and scales as one BF16 tensor; `shape` is that of the weights.

    Attributes:
        scale_file, scale_offset: where the scales lie.
    """

    scale_file: PositionalFile
    scale_offset: int

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        columns = math.prod(self.shape[1:])
        first, count = start * columns // _GROUP, (stop - start) * columns // _GROUP
        blocks = np.frombuffer(self.file.read(self.offset + first * _GROUP // 2, count * _GROUP // 2), np.uint8)
        scales = np.frombuffer(self.scale_file.read(self.scale_offset + first, count), np.uint8)
        if scales.size and int(scales.max()) == _NO_NUMBER:
            raise InputError(f"{self.file.path}: {self.name} has a scale that is no number.")
        pairs = _pairs().take(np.repeat(scales.astype(np.uint16) << 8, _GROUP // 2) | blocks)
        return pairs.view("<u2").reshape(stop - start, columns)


@cache
def _pairs() -> npt.NDArray[np.uint32]:
    """The BF16 bits of the two weights in a byte, the lower half first, by scale · 256 + byte."""
    codes = np.arange(256)
    halves = _VALUES[np.stack([codes & 15, codes >> 4], axis=-1)]
    with np.errstate(over="ignore"):  # the largest scales give infinities, which are told like any other
        values = np.ldexp(halves[None], np.arange(256, dtype=np.int32)[:, None, None] - _BIAS)
    bits: npt.NDArray[Any] = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    return bits.reshape(-1).view("<u4")


def pack(stored: dict[str, StoredTensor]) -> None:
    """Put one tensor in the place of each pair of blocks and scales; it keeps the name of the blocks.

    Raises:
        InputError: one without the other, or shapes that do not fit.
    """
    for name in [name for name in stored if name.endswith(BLOCKS)]:
        blocks, scales = stored[name], stored.pop(name.removesuffix(BLOCKS) + SCALES, None)
        if (
            scales is None
            or (blocks.dtype, scales.dtype) != ("U8", "U8")
            or len(blocks.shape) < 3
            or blocks.shape != (*scales.shape, _GROUP // 2)
        ):
            raise InputError(f"{blocks.file.path}: {name} has no scales that fit it.", "Download the checkpoint again.")
        shape = (*blocks.shape[:-2], blocks.shape[-2] * _GROUP)
        stored[name] = PackedTensor(name, "BF16", shape, blocks.file, blocks.offset, scales.file, scales.offset)
