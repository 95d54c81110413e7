"""Safetensors shards: the header is validated in full before anything is believed, tensors are read lazily.

Format: 8 bytes header length (little endian), the header (a JSON object: name → dtype, shape, data_offsets),
then the data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.sources.documents import parse_json, shown
from localmix.sources.positional import PositionalFile, refuse_pointer

_LENGTH_BYTES = 8
# The format allows 100 MB; the largest real headers have about 10 MB, and JSON grows tenfold in memory.
_HEADER_LIMIT = 32 * 2**20
_MOST_DIMENSIONS = 8
_METADATA = "__metadata__"

# Bits per element of every dtype the format knows.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The dtypes that hold plain weights; numpy has no bfloat16: the bits, as unsigned integers.
WEIGHT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard; nothing is read until `read_rows`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: PositionalFile
    offset: int

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `[start:stop)` of the first dimension as `[stop - start, elements of a row]`.

        The dtype is `WEIGHT_DTYPES[self.dtype]`; other dtypes cannot be read.
        """
        columns = math.prod(self.shape[1:])
        kind = WEIGHT_DTYPES[self.dtype]
        rows = np.empty((stop - start, columns), kind)
        if rows.size:
            position = self.offset + start * columns * kind.itemsize
            self.file.read_into(position, rows.view(np.uint8).reshape(-1).data)
        return rows


@dataclass(frozen=True)
class Shard:
    """An open safetensors file and its tensors by name."""

    file: PositionalFile
    tensors: Mapping[str, StoredTensor]

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self.file.path

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_shard(path: Path) -> Shard:
    """Open one safetensors file and validate its header against the file.

    Raises:
        InputError: truncated, a header that is too long or not JSON, unknown dtypes, sizes that do not fit,
            overlaps or holes.
        FileError: the file system refuses.
    """
    file = PositionalFile(path)
    try:
        return Shard(file, _read_header(file))
    except BaseException:
        file.close()
        raise


def _broken(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: {problem}.", "The file is damaged or cut off; download it again.")


def _read_header(file: PositionalFile) -> dict[str, StoredTensor]:
    path = file.path
    if file.size < _LENGTH_BYTES:
        raise _broken(path, f"{file.size} bytes are too few for a safetensors file")
    head = file.read(0, min(file.size, 64))
    refuse_pointer(path, head)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > file.size - _LENGTH_BYTES:
        raise _broken(path, f"the header claims {length} bytes, the file has {file.size}")
    if not 2 <= length <= _HEADER_LIMIT:
        raise _broken(path, f"a header of {length} bytes is not credible")
    raw = file.read(_LENGTH_BYTES, length)
    if raw[:1] != b"{":
        raise _broken(path, "the header is not a JSON object")
    header = parse_json(raw, f"{path}: the header", unique_keys=True, encoding="utf-8")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, f"{_METADATA} must map strings to strings")
    data_start = _LENGTH_BYTES + length
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _read_entry(path, name, entry, file.size - data_start)
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(name, dtype, shape, file, data_start + begin)
    _require_gapless(path, spans, file.size - data_start)
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_entry(path: Path, name: str, entry: object, room: int) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, and the data offsets of one header entry; `room` is the bytes of data in the file."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {shown(name)} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _broken(path, f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
        raise _broken(path, f"tensor {shown(name)} has an impossible shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(path, f"tensor {shown(name)} has impossible data_offsets {shown(offsets)}")
    begin, end = offsets
    if not begin <= end <= room:
        raise _broken(path, f"tensor {shown(name)} lies at {begin}…{end} of {room} bytes of data")
    needed = math.prod(shape) * bits
    if needed != (end - begin) * 8:
        lengths = f"{needed // 8} bytes, but {end - begin} are given"
        raise _broken(path, f"tensor {shown(name)} is {dtype} {shown(shape)}: {lengths}")
    return dtype, tuple(shape), begin, end


def _require_gapless(path: Path, spans: list[tuple[int, int, str]], room: int) -> None:
    """The tensors must cover the data once, without overlap or hole, as the format demands."""
    reached = 0
    for begin, end, name in sorted(spans):
        if begin < reached:
            raise _broken(path, f"tensor {shown(name)} overlaps the one before it (byte {begin} < {reached})")
        if begin > reached:
            raise _broken(path, f"{begin - reached} bytes before tensor {shown(name)} belong to no tensor")
        reached = end
    if reached != room:
        raise _broken(path, f"{room - reached} bytes at the end belong to no tensor")
