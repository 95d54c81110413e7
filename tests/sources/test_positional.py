from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from localmix.errors import FileError, InputError
from localmix.sources.positional import PositionalFile, read_whole

WAYS = [("preadv",), ("preadv", "pread")]


@pytest.mark.parametrize("missing", [(), *WAYS])
def test_every_way_of_reading_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """With `preadv`, with `pread` only, and with neither, as on Windows; from many threads."""
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    content = os.urandom(100_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    file = PositionalFile(path)
    places = [(start, 997) for start in range(0, 99_000, 313)]
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda place: file.read(*place), places))
    file.close()
    assert all(piece == content[start : start + count] for (start, count), piece in zip(places, pieces, strict=True))


def test_reads_that_come_in_pieces_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    file = PositionalFile(path)
    assert file.read(3, 190) == bytes(range(3, 193))
    file.close()


def test_end_of_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    file = PositionalFile(path)
    os.truncate(path, 4)
    with pytest.raises(InputError, match="ends at byte 4 where byte 8"):
        file.read(0, 8)
    file.close()


def test_change_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    file = PositionalFile(path)
    file.check_unchanged()
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match="changed while it was read"):
        file.check_unchanged()
    file.close()
    file.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no FIFOs and devices to open on Windows")
def test_fifo_device_and_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            PositionalFile(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be opened: No such file"):
        PositionalFile(tmp_path / "nothing")


def test_too_many_open_files_leaves_none_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    path = tmp_path / "file"
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match="Too many open files"):
        PositionalFile(path)


def test_whole_files_have_a_limit_and_pointers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="has 11 bytes; at most 10"):
        read_whole(path, 10)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="Git LFS pointer") as caught:
        read_whole(path, 1000)
    assert "git lfs pull" in caught.value.hint
