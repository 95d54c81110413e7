"""The head of a GGUF file: read with every count checked against the bytes that remain, and written exactly.

gguf-py's reader trusts the file: fifty bytes that declare two million array items cost it seconds and gigabytes.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gguf.constants import GGUFValueType as ValueType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, TensorInfo
from localmix.sources.positional import PositionalFile
from localmix.tensor_types import BLOCKS, TensorType, fits, row_bytes

MAGIC = b"GGUF"
VERSION = 3
OLDEST_LOADED = 2  # llama.cpp reads no older version
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # ggml.h, GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # ggml.h, GGML_MAX_NAME without its closing zero
MAX_HEADER_BYTES = 1 << 29  # a vocabulary of a million tokens takes 40 MB
MAX_ARRAY_ITEMS = 1 << 24

_SCALARS: Mapping[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT32: "f",
    ValueType.FLOAT64: "d",
    ValueType.BOOL: "?",
}


# What llama.cpp's models were before GGUF, by the first four bytes.
_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg", b"algg")

# ggml.h: types that came and went, and what holds such weights now.
_REMOVED_TYPES: Mapping[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4, which is Q4_0 since November 2024",
    32: "Q4_0_4_8, which is Q4_0 since November 2024",
    33: "Q4_0_8_8, which is Q4_0 since November 2024",
    36: "IQ4_NL_4_4, which is IQ4_NL since November 2024",
    37: "IQ4_NL_4_8, which is IQ4_NL since November 2024",
    38: "IQ4_NL_8_8, which is IQ4_NL since November 2024",
}


class ReadableFile(Protocol):
    """What the head is read from: a file, or one that lies in pieces."""

    path: Path
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes lie, counted from the start of the file."""

    info: TensorInfo
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Everything in a GGUF file before the weights.

    Attributes:
        end: where the last tensor ends; a file may be padded beyond it.
    """

    metadata: dict[str, MetaValue]
    tensors: tuple[StoredTensor, ...]
    data_offset: int
    end: int
    version: int


def padded(size: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return (size + alignment - 1) // alignment * alignment


def tensor_bytes(info: TensorInfo) -> int:
    """Bytes of a whole tensor in its own type."""
    return info.rows * row_bytes(info.type, info.columns)


# --- writing ---------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    # surrogateescape: a token that is no UTF-8 goes out with the bytes it came in with
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _payload(kind: ValueType, values: Sequence[Any]) -> bytes:
    if kind == ValueType.STRING:
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{_SCALARS[kind]}", *values)


def encode_value(value: MetaValue) -> bytes:
    """A metadata value with its type tag, as it stands in the file."""
    tag = struct.pack("<I", value.type)
    if value.type != ValueType.ARRAY:
        return tag + _payload(value.type, [value.value])
    assert value.item_type is not None
    return tag + struct.pack("<IQ", value.item_type, len(value.value)) + _payload(value.item_type, value.value)


def layout(tensors: Iterable[TensorInfo], alignment: int = DEFAULT_ALIGNMENT) -> tuple[list[int], int]:
    """Offset of each tensor from the start of the data section, and the section's size."""
    offsets: list[int] = []
    end = 0
    for info in tensors:
        offsets.append(end)
        end += padded(tensor_bytes(info), alignment)
    return offsets, end


def encode_entry(info: TensorInfo, offset: int) -> bytes:
    """What the head says of one tensor; its length does not depend on the offset."""
    dimensions = info.shape[::-1]  # ggml counts from the fastest
    return _string(info.name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, info.type, offset)


def encode_header(
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[TensorInfo],
    encode: Callable[[MetaValue], bytes] = encode_value,
) -> bytes:
    """The head of a GGUF file that holds these tensors one after the other, padded to the default alignment.

    Another alignment that the metadata comes with, from the file it was read from, is left out.

    Args:
        encode: `encode_value`, or what remembers its answers.
    """
    metadata = {key: value for key, value in metadata.items() if key != ALIGNMENT}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), encode(value)]
    offsets, _ = layout(tensors)
    parts += map(encode_entry, tensors, offsets)
    head = b"".join(parts)
    return head + bytes(padded(len(head)) - len(head))


# --- reading ---------------------------------------------------------------------------------


class _Cursor:
    """Reads forward through a file, never past its end nor past the largest sensible header."""

    def __init__(self, file: ReadableFile) -> None:
        self._file = file
        self._path = file.path
        self._size = min(file.size, MAX_HEADER_BYTES)
        self._window = b""
        self._start = 0  # file offset of the window
        self._at = 0  # place in the window
        self.what = "header"  # the thing being read, for messages
        self.word = "Q"  # of counts and lengths; version 1 has them in 32 bits

    @property
    def position(self) -> int:
        return self._start + self._at

    @property
    def remaining(self) -> int:
        return self._size - self.position

    @property
    def word_bytes(self) -> int:
        return struct.calcsize("<" + self.word)

    def fail(self, reason: str) -> InputError:
        return InputError(
            f"{self._path} is not a usable GGUF file: {reason}.",
            "Download it again, or make it again with `localmix convert`.",
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.remaining:
            raise self.fail(f"it ends inside its {self.what}")
        if self._at + count > len(self._window):
            self._start, self._at = self.position, 0
            self._window = self._file.read(self._start, min(max(count, 1 << 20), self._size - self._start))
        piece = self._window[self._at : self._at + count]
        self._at += count
        return piece

    def number(self, code: str) -> Any:
        """One little-endian value of a struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number(self.word)).decode("utf-8", "surrogateescape")

    def count(self, smallest: int, limit: int = MAX_ARRAY_ITEMS) -> int:
        """A count of items that take at least `smallest` bytes each."""
        declared: int = self.number(self.word)
        if declared * smallest > self.remaining or declared > limit:
            raise self.fail(f"its {self.what} declares {declared:,} items, more than the file can hold")
        return declared

    def value(self) -> MetaValue:
        kind = self._value_type()
        if kind != ValueType.ARRAY:
            return MetaValue(kind, self._items(kind, 1)[0])
        item_type = self._value_type()
        if item_type == ValueType.ARRAY:
            raise self.fail(f"{self.what} is an array of arrays")
        smallest = self.word_bytes if item_type == ValueType.STRING else struct.calcsize("<" + _SCALARS[item_type])
        return MetaValue(kind, self._items(item_type, self.count(smallest)), item_type)

    def _value_type(self) -> ValueType:
        number = self.number("I")
        try:
            return ValueType(number)
        except ValueError:
            raise self.fail(f"{self.what} has the unknown value type {number}") from None

    def _items(self, kind: ValueType, count: int) -> list[Any]:
        if kind == ValueType.STRING:
            return [self.string() for _ in range(count)]
        code = _SCALARS[kind]
        data = self.take(count * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", data))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetaValue]:
    metadata: dict[str, MetaValue] = {}
    for index in range(count):
        cursor.what = f"metadata entry {index + 1} of {count}"
        key = cursor.string()
        cursor.what = f"metadata entry '{key[:80]}'"
        if key in metadata:
            raise cursor.fail(f"{cursor.what} stands there twice")
        metadata[key] = cursor.value()
    return metadata


def _read_tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    """One tensor and its offset in the data section."""
    name = cursor.string()
    cursor.what = f"tensor '{name[:80]}'"
    if not name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise cursor.fail(f"a tensor's name has {len(name)} characters, 1 to {MAX_NAME_BYTES} are allowed")
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"{cursor.what} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
    shape = struct.unpack(f"<{dimensions}{cursor.word}", cursor.take(cursor.word_bytes * dimensions))[::-1]
    number = cursor.number("I")
    try:
        kind = TensorType(number)
    except ValueError:
        if number in _REMOVED_TYPES:
            raise cursor.fail(f"{cursor.what} is {_REMOVED_TYPES[number]}: no llama.cpp of today reads it") from None
        raise cursor.fail(f"{cursor.what} has the unknown type {number}") from None
    if math.prod(shape) == 0 or math.prod(shape) >= 1 << 63 or not fits(kind, shape[-1]):
        raise cursor.fail(
            f"{cursor.what} has the shape {list(shape)}, which {kind.name} in blocks of {BLOCKS[kind][0]} cannot hold"
        )
    return TensorInfo(name, shape, kind), cursor.number("Q")


def read_header(path: Path) -> Header:
    """Read and check the head of a GGUF file; costs no more memory than the head itself has bytes.

    Raises:
        InputError: the file is no GGUF file nor a regular file at all, or contradicts itself.
        FileError: the file cannot be opened.
    """
    file = PositionalFile(path)
    try:
        return read_header_of(file)
    finally:
        file.close()


def read_header_of(file: ReadableFile) -> Header:
    """As `read_header`, of a file that is open already."""
    cursor, size = _Cursor(file), file.size
    magic = cursor.take(4) if cursor.remaining >= 4 else b""
    if magic == bytes(4):
        raise cursor.fail("it starts with zeros, as a file does whose writing was interrupted")
    if magic in _BEFORE_GGUF:
        raise InputError(
            f"{file.path} is a GGML file of before August 2023, which knows too little of its model.",
            "Convert the checkpoint that it was made from.",
        )
    if magic != MAGIC:
        raise cursor.fail(f"it starts with {magic!r} instead of {MAGIC!r}")
    version = cursor.number("I")
    if version not in (1, 2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"big-endian (version {swapped})" if swapped in (1, 2, 3) else f"of version {version}"
        raise cursor.fail(f"it is {what}, and 1 to 3 are known")
    cursor.word = "I" if version == 1 else "Q"
    word = cursor.word_bytes
    tensor_count = cursor.count(smallest=word + 4 + word + 4 + 8)
    metadata = _read_metadata(cursor, cursor.count(smallest=word + 4 + 1))
    alignment = metadata.get(ALIGNMENT)
    align = DEFAULT_ALIGNMENT if alignment is None else alignment.value
    if not isinstance(align, int) or not 1 <= align <= 1 << 16 or align & (align - 1):
        raise cursor.fail(f"{ALIGNMENT} is {align!r}, no power of two")

    found: dict[str, tuple[TensorInfo, int]] = {}
    for index in range(tensor_count):
        cursor.what = f"tensor {index + 1} of {tensor_count}"
        info, offset = _read_tensor(cursor)
        if info.name in found:
            raise cursor.fail(f"{cursor.what} stands there twice")
        found[info.name] = info, offset

    start = padded(cursor.position, align)
    tensors = tuple(StoredTensor(info, start + at, tensor_bytes(info)) for info, at in found.values())
    end, before = start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        what = f"tensor '{tensor.info.name}'"
        if (tensor.offset - start) % align:
            raise cursor.fail(f"{what} starts at a place that is no multiple of {align}")
        if tensor.offset < end:
            raise cursor.fail(f"{what} overlaps {before}")
        end, before = tensor.offset + tensor.bytes, what
        if end > size:
            raise cursor.fail(f"{what} ends at byte {end:,}, but the file has {size:,}: it is incomplete")
    return Header(metadata, tensors, start, end, version)
