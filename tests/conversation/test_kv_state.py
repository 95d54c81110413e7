"""State files: whole ones come back, everything else is passed over before native code sees it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from localmix.conversation.kv_state import MAGIC, model_identity, read_state, write_state
from localmix.errors import FileError, InputError

KEY = {"engine": "abc", "model": {"bytes": 1, "modified": 2}}


def save(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    write_state(tmp_path / "a.kv", KEY, 7, save)
    return tmp_path / "a.kv"


def test_a_whole_file_comes_back(state: Path) -> None:
    found = read_state(state, KEY)
    assert found is not None and found.tokens == 7 and found.bytes == state.stat().st_size
    assert state.read_bytes().startswith(bytes(range(256)))
    assert [file.name for file in state.parent.iterdir()] == ["a.kv"]
    if os.name != "nt":
        assert stat.S_IMODE(state.stat().st_mode) == 0o600


def test_another_key_and_a_missing_file(state: Path) -> None:
    assert read_state(state, KEY | {"engine": "abd"}) is None
    assert read_state(state.with_name("b.kv"), KEY) is None
    assert read_state(state.parent, KEY) is None


def test_every_cut_and_every_changed_byte_is_noticed(state: Path) -> None:
    data = state.read_bytes()
    for length in [0, 1, len(MAGIC), 100, len(data) // 2, *range(len(data) - 300, len(data), 7)]:
        state.write_bytes(data[:length])
        assert read_state(state, KEY) is None, length
    for place in [0, 5000, 10239, *range(10240, len(data), 11)]:
        changed = bytearray(data)
        changed[place] ^= 1
        state.write_bytes(changed)
        found = read_state(state, KEY)
        # the count of tokens is for people: the cache itself holds its own, behind the digest
        assert found is None or found.tokens != 7, place
    state.write_bytes(data + b"x")
    assert read_state(state, KEY) is None


def test_a_failed_write_leaves_the_old_file(state: Path) -> None:
    before = state.read_bytes()

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise InputError("no")

    with pytest.raises(InputError):
        write_state(state, KEY, 9, fail)
    assert state.read_bytes() == before
    assert len(list(state.parent.iterdir())) == 1
    with pytest.raises(FileError, match="Cannot write"):
        write_state(state.parent / "missing" / "a.kv", KEY, 9, save)


def test_a_model_is_known_by_size_and_time(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"1234")
    first = model_identity(model)
    os.utime(model, ns=(1, 1))
    assert model_identity(model) != first
    with pytest.raises(FileError):
        model_identity(tmp_path / "none.gguf")
