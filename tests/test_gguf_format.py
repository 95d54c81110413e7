from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmix.errors import InputError
from localmix.gguf_format import encode_header, layout, read_header
from localmix.sources.base import MetaValue, TensorInfo, ValueType, array, boolean, f32, text, u32
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.random_model import write_random_model


def string(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def head(tensors: int, entries: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body


def entry(key: str, value: bytes) -> bytes:
    return string(key) + value


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    count = len(dimensions)
    return string(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, kind, offset)


def test_reads_what_gguf_py_writes(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", layers=1)
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        assert header.metadata[key].value == pytest.approx(field.contents()), key
    assert [
        (stored.info.name, stored.info.shape[::-1], int(stored.info.type), stored.offset, stored.bytes)
        for stored in header.tensors
    ] == [
        (found.name, tuple(map(int, found.shape)), int(found.tensor_type), found.data_offset, found.n_bytes)
        for found in reader.tensors
    ]


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": text("llama"),
        "a.flag": boolean(True),
        "a.number": u32(7),
        "a.real": f32(0.5),
        "a.words": array(ValueType.STRING, ["", "两个", "x" * 300]),
        "a.numbers": array(ValueType.INT32, [-1, 2, 3]),
    }
    infos = [TensorInfo("one", (5,), TensorType.F32), TensorInfo("two", (2, 3, 256), TensorType.Q4_K)]
    path = tmp_path / "model.gguf"
    path.write_bytes(encode_header(metadata, infos) + bytes(layout(infos)[1]))
    reader = gguf.GGUFReader(path)
    for key, value in metadata.items():
        assert reader.fields[key].contents() == value.value
    assert [(found.name, found.data_offset % 32) for found in reader.tensors] == [("one", 0), ("two", 0)]
    assert [int(length) for length in reader.tensors[1].shape] == [256, 3, 2]


def test_a_token_that_is_no_utf8_survives(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    value = MetaValue(ValueType.STRING, b"\xff\xfe".decode("utf-8", "surrogateescape"))
    path.write_bytes(encode_header({"key": value}, []))
    assert read_header(path).metadata["key"] == value


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "starts with b''"),
    "zeros": (bytes(64), "interrupted"),
    "magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "before GGUF": (b"tjgg" + bytes(60), "before August 2023"),
    "version 4": (head(0, 0, version=4), "version 4"),
    "version 1, cut off": (b"GGUF" + struct.pack("<III", 1, 0, 1), "more than the file can hold"),
    "version 1, name beyond the end": (b"GGUF" + struct.pack("<IIII", 1, 0, 1, 1 << 31) + bytes(50), "ends inside"),
    "big-endian": (head(0, 0, version=3 << 24), "big-endian"),
    "tensor count": (head(1 << 40, 0), "more than the file can hold"),
    "entry count": (head(0, 1 << 40), "more than the file can hold"),
    "string length": (head(0, 1, struct.pack("<Q", 1 << 40) + bytes(50)), "ends inside"),
    "array of two million": (
        head(0, 1, entry("k", struct.pack("<IIQ", 9, 0, 2_000_000)) + bytes(50)),
        "more than the file can hold",
    ),
    "array of arrays": (head(0, 1, entry("k", struct.pack("<IIQ", 9, 9, 1)) + bytes(50)), "array of arrays"),
    "value type": (head(0, 1, entry("k", struct.pack("<I", 77)) + bytes(50)), "unknown value type 77"),
    "duplicate key": (head(0, 2, 2 * entry("k", struct.pack("<II", 4, 1))), "twice"),
    "duplicate tensor": (head(2, 0, tensor("t", (8,)) + tensor("t", (8,), 0, 32)) + bytes(200), "twice"),
    "offset beyond the end": (head(1, 0, tensor("t", (8,), 0, 1 << 40)) + bytes(100), "incomplete"),
    "offset not aligned": (head(1, 0, tensor("t", (8,), 0, 7)) + bytes(100), "multiple of 32"),
    "overlap": (head(2, 0, tensor("t", (64,)) + tensor("u", (64,), 0, 32)) + bytes(999), "overlaps"),
    "tensor type": (head(1, 0, tensor("t", (8,), 99)) + bytes(100), "unknown type 99"),
    "type of the past": (head(1, 0, tensor("t", (8,), 31)) + bytes(100), "Q4_0_4_4, which is Q4_0 since"),
    "five dimensions": (head(1, 0, tensor("t", (1,) * 5)) + bytes(100), "5 dimensions"),
    "no rows": (head(1, 0, tensor("t", (8, 0))) + bytes(100), "cannot hold"),
    "shape beyond 64 bits": (head(1, 0, tensor("t", (1 << 40, 1 << 40))) + bytes(100), "cannot hold"),
    "broken block": (head(1, 0, tensor("t", (100,), 12)) + bytes(100), "cannot hold"),
    "long name": (head(1, 0, tensor("t" * 64, (8,))) + bytes(100), "64 characters"),
    "alignment": (head(0, 1, entry("general.alignment", struct.pack("<II", 4, 33))), "no power of two"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_heads_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    data, reason = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write_random_model(tmp_path / "model.gguf", layers=1, hidden=64, feed_forward=64, experts=0).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 3000, 7), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_header(path)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 20_000), value=st.integers(0, 255))
def test_a_changed_byte_never_crashes_the_reader(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = _whole_model(tmp_path_factory)
    content = bytearray(base.read_bytes())
    content[place % len(content)] = value
    path = base.with_name("changed.gguf")
    path.write_bytes(content)
    try:
        read_header(path)
    except InputError as error:
        assert str(path) in error.message


_cache: list[Path] = []


def _whole_model(factory: pytest.TempPathFactory) -> Path:
    if not _cache:
        folder = factory.mktemp("fuzz")
        _cache.append(write_random_model(folder / "model.gguf", layers=1, hidden=64, feed_forward=64, experts=0))
    return _cache[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path / "model.gguf")


def test_an_architecture_that_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(encode_header({"general.architecture": u32(5)}, []))
    with pytest.raises(InputError, match="names no architecture"):
        open_source(path)
