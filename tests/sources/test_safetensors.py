"""Every way a shard can lie about itself, and that the truth is read back exactly."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmix.errors import InputError, LocalmixError
from localmix.sources.safetensors import DTYPE_BITS, WEIGHT_DTYPES, open_shard
from tests.checkpoints import write_raw_shard

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [32, 32]},
}
DATA = np.arange(6, dtype="<f4").tobytes() + np.arange(4, dtype="<u2").tobytes()


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    change(header)
    return header


def test_good_shard(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    write_raw_shard(path, HEADER, DATA)
    shard = open_shard(path)
    assert list(shard.tensors) == ["a", "b", "none"]
    assert np.array_equal(shard.tensors["a"].read_rows(1, 2), [[3, 4, 5]])
    assert np.array_equal(shard.tensors["b"].read_rows(0, 4), [[0], [1], [2], [3]])
    assert shard.tensors["none"].read_rows(0, 0).shape == (0, 3)
    shard.close()


HEADERS: dict[str, tuple[Any, str]] = {
    "not json": (b"{not json", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not a JSON object"),
    "not an object": ([1, 2], "not a JSON object"),
    "deep nesting": (b'{"a":' * 100_000, "nested too deep"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}',
        "names 'a' twice",
    ),
    "duplicate key in a tensor": (b'{"a":{"dtype":"F32","dtype":"F32"}}', "names 'dtype' twice"),
    "metadata is no object": (changed(lambda h: h.update(__metadata__=[1])), "__metadata__ must map"),
    "metadata holds numbers": (changed(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ must map"),
    "entry is no object": (changed(lambda h: h.update(a=3)), "'a' must have dtype"),
    "entry lacks a key": (changed(lambda h: h["a"].pop("shape")), "'a' must have dtype"),
    "entry has a key too many": (changed(lambda h: h["a"].update(zip="x")), "nothing else"),
    "unknown dtype": (changed(lambda h: h["a"].update(dtype="F33")), "unknown dtype 'F33'"),
    "dtype is a list": (changed(lambda h: h["a"].update(dtype=["F32"])), "unknown dtype"),
    "negative length": (changed(lambda h: h["a"].update(shape=[-2, -3])), "impossible shape"),
    "length is true": (changed(lambda h: h["a"].update(shape=[True, 6])), "impossible shape"),
    "length is a fraction": (changed(lambda h: h["a"].update(shape=[2.0, 3])), "impossible shape"),
    "length of 2^70": (changed(lambda h: h["a"].update(shape=[2**70, 0])), "impossible shape"),
    "shape overflows 64 bits": (changed(lambda h: h["a"].update(shape=[2**62, 2**62])), "bytes, but 24"),
    "a hundred dimensions": (changed(lambda h: h["a"].update(shape=[1] * 100)), "impossible shape"),
    "shape is a number": (changed(lambda h: h["a"].update(shape=6)), "impossible shape"),
    "negative offset": (changed(lambda h: h["a"].update(data_offsets=[-1, 23])), "impossible data_offsets"),
    "one offset": (changed(lambda h: h["a"].update(data_offsets=[0])), "impossible data_offsets"),
    "offsets reversed": (changed(lambda h: h["a"].update(data_offsets=[24, 0])), "lies at 24…0"),
    "offset beyond the file": (changed(lambda h: h["b"].update(data_offsets=[24, 2**40])), "of 32 bytes"),
    "size is not shape times dtype": (changed(lambda h: h["a"].update(shape=[2, 2])), "16 bytes, but 24"),
    "overlap": (changed(lambda h: h["b"].update(data_offsets=[20, 28])), "overlaps"),
    "hole": (
        changed(lambda h: h["a"].update(shape=[5], data_offsets=[0, 20])),
        "4 bytes before tensor 'b' belong to no tensor",
    ),
    "bytes left over": (changed(lambda h: h.pop("b") and h.pop("none")), "8 bytes at the end"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(tmp_path: Path, case: str) -> None:
    header, problem = HEADERS[case]
    path = tmp_path / "model.safetensors"
    write_raw_shard(path, header, DATA)
    with pytest.raises(InputError, match=problem) as caught:
        open_shard(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        ((0).to_bytes(8, "little") + DATA, "header of 0 bytes"),
        ((2**62).to_bytes(8, "little") + DATA, "claims 4611686018427387904 bytes"),
        ((100).to_bytes(8, "little") + DATA, "claims 100 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + DATA, "claims 18446744073709551615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_lying_lengths(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        open_shard(path)


def test_long_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**40).to_bytes(8, "little") + b"{")
        file.truncate(2**41)
    with pytest.raises(InputError, match="not credible"):
        open_shard(path)


@pytest.mark.parametrize("cut", [8, 40, 150, -1])
def test_truncated(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    write_raw_shard(path, HEADER, DATA)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError):
        open_shard(path)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no FIFOs on Windows")
def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        open_shard(tmp_path / "model.safetensors")


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    path = tmp_path / "model.safetensors"
    write_raw_shard(path, HEADERS["hole"][0], DATA)
    before = len(list(descriptors.iterdir()))
    with pytest.raises(InputError):
        open_shard(path)
    assert len(list(descriptors.iterdir())) == before


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), bits=st.integers(1, 255), cut=st.integers(0, 60))
def test_damaged_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, place: int, bits: int, cut: int) -> None:
    """Flip bits and cut the end: the shard opens, or one of our sentences comes; nothing else."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_raw_shard(path, HEADER, DATA)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= bits
    path.write_bytes(content[: len(content) - cut])
    try:
        open_shard(path).close()
    except LocalmixError as error:
        assert str(path) in error.message


def test_dtypes_agree_with_the_reference_implementation() -> None:
    """The safetensors package reads what this table says is a file, for every dtype that numpy has."""
    import json

    from safetensors import deserialize

    for dtype in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"):
        size = DTYPE_BITS[dtype] // 8 * 3
        header = json.dumps({"x": {"dtype": dtype, "shape": [3], "data_offsets": [0, size]}}).encode()
        ((name, tensor),) = deserialize(len(header).to_bytes(8, "little") + header + bytes(size))
        assert (name, tensor["dtype"], len(tensor["data"])) == ("x", dtype, size)
    assert all(kind.itemsize * 8 == DTYPE_BITS[dtype] for dtype, kind in WEIGHT_DTYPES.items())
