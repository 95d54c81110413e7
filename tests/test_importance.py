from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from localmix.errors import FileError, InputError
from localmix.gguf_format import encode_header, layout
from localmix.importance import Entry, Importance, load_importance, write_importance
from localmix.sources.base import MetaValue, TensorInfo, ValueType, array, f32, text, u32
from localmix.tensor_types import TensorType


def entry(experts: int, columns: int, seed: int = 0) -> Entry:
    random = np.random.default_rng(seed)
    return Entry(
        random.chisquare(1, (experts, columns)).astype(np.float32),
        random.integers(1, 99, experts).astype(np.float32),
    )


def test_round_trip_and_gguf_py_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    written = Importance({"b.weight": entry(8, 64), "a.weight": entry(1, 33)}, ["one", "二"], 5, 512)
    write_importance(path, written)
    read = load_importance(path)
    assert (read.datasets, read.chunk_count, read.chunk_size, read.path) == (("one", "二"), 5, 512, path)
    for name, expected in written.entries.items():
        np.testing.assert_array_equal(read.entries[name].sums, expected.sums)
        np.testing.assert_array_equal(read.entries[name].counts, expected.counts)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(tensors["b.weight.in_sum2"].data, written.entries["b.weight"].sums)
    np.testing.assert_array_equal(tensors["b.weight.counts"].data.reshape(-1), written.entries["b.weight"].counts)


@pytest.mark.parametrize(("ones", "filled"), [(True, [1, 1]), (False, [2, 3])])
def test_rows_are_means_and_an_unreached_expert_is_filled(ones: bool, filled: list[float]) -> None:
    sums = np.array([[2, 4], [0, 0], [3, 4]], np.float32)
    importance = Importance({"w": Entry(sums, np.array([2, 0, 1], np.float32))}, fill_with_ones=ones)
    rows = importance.rows(TensorInfo("w", (3, 7, 2), TensorType.BF16))
    np.testing.assert_array_equal(rows, np.array([[1, 2], filled, [3, 4]], np.float32))
    assert importance.rows(TensorInfo("other", (7, 2), TensorType.BF16)) is None


def test_another_model_is_refused() -> None:
    importance = Importance({"w": entry(1, 64)}, path=Path("x.gguf"))
    with pytest.raises(InputError, match="another model"):
        importance.rows(TensorInfo("w", (7, 128), TensorType.BF16))


def legacy(*entries: tuple[str, int, list[float]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + tail


def test_the_older_format(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(legacy(("blk.0.w", 4, [4, 8, 12, 16]), tail=struct.pack("<ii", 9, 4) + b"text"))
    read = load_importance(path)
    assert (read.chunk_count, read.datasets) == (9, ("text",))
    # the file does not say how many experts a row is for: the tensor does
    rows = read.rows(TensorInfo("blk.0.w", (2, 5, 2), TensorType.BF16))
    np.testing.assert_array_equal(rows, np.array([[1, 2], [3, 4]], np.float32))


def test_entries_of_single_experts_in_the_older_format(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    experts = [("blk.1.ffn_up.1.weight", 2, [2.0, 8.0]), ("blk.1.ffn_up.0.weight", 4, [4.0, 12.0])]
    path.write_bytes(legacy(*experts, ("blk.1.attn_q.weight", 1, [5.0])))
    read = load_importance(path)
    rows = read.rows(TensorInfo("blk.1.ffn_up_exps.weight", (2, 5, 2), TensorType.BF16))
    np.testing.assert_array_equal(rows, np.array([[1, 3], [1, 4]], np.float32))
    assert set(read.entries) == {"blk.1.attn_q.weight", "blk.1.ffn_up_exps.weight"}
    assert not read.coverage.tokens
    path.write_bytes(legacy(experts[0]))  # the other one was never reached, or is lost
    assert not load_importance(path).entries
    path.write_bytes(legacy(*experts, ("blk.2.ffn_up.0.weight", 1, [5.0, 5.0])))  # as in another layer the last one
    assert set(load_importance(path).entries) == {"blk.1.ffn_up_exps.weight"}


def broken_files() -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "neither GGUF nor"),
        "text": (b"hello world, this is no imatrix", "neither GGUF nor"),
        "cut": (legacy(("blk.0.w", 4, [1, 2, 3]))[:-2], "neither GGUF nor"),
        "huge": (struct.pack("<ii", 1, 1 << 30), "neither GGUF nor"),
        "no entries": (struct.pack("<i", 0), "empty"),
        "nan": (legacy(("blk.0.w", 4, [1, float("nan")])), "NaN or Inf for blk.0.w"),
        "negative": (legacy(("blk.0.w", 4, [1, -1])), "negative"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    data, reason = broken_files()[name]
    path = tmp_path / "imatrix"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        load_importance(path)


def test_a_model_is_no_imatrix(random_model: Path) -> None:
    with pytest.raises(InputError, match="holds the tensor"):
        load_importance(random_model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("imatrix.chunk_count", text("abc")),
        ("imatrix.chunk_count", array(ValueType.UINT32, [1])),
        ("imatrix.chunk_count", MetaValue(ValueType.INT32, -4)),
        ("imatrix.chunk_count", MetaValue(ValueType.UINT64, 1 << 40)),
        ("imatrix.chunk_size", f32(512)),
        ("imatrix.datasets", u32(1)),
        ("imatrix.datasets", array(ValueType.UINT32, [1])),
        ("imatrix.datasets", text("wiki.txt")),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused(key: str, value: MetaValue, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    infos = [TensorInfo("w.in_sum2", (1, 8), TensorType.F32), TensorInfo("w.counts", (1, 1), TensorType.F32)]
    path.write_bytes(encode_header({key: value}, infos) + bytes(layout(infos)[1]))
    with pytest.raises(InputError, match=f"its entry {key} is "):
        load_importance(path)


def test_a_negative_number_of_chunks_in_the_older_format(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(legacy(("blk.0.w", 4, [4, 8]), tail=struct.pack("<i", -9)))
    with pytest.raises(InputError, match="chunks is '-9'"):
        load_importance(path)


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(3 << 40)
    with pytest.raises(InputError, match="3,072 GiB, and 4 are the most"):
        load_importance(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            load_importance(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        load_importance(tmp_path / "none")
