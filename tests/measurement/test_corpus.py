"""Reading texts and cutting them into chunks."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import FileError, InputError, UsageError
from localmix.measurement.corpus import find_corpora, read_corpus, split


def test_bytes_stay_as_they_are_but_for_one_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo 中\n\n".encode())
    corpus = read_corpus([path])
    assert corpus.text == "one\r\ntwo 中\n".encode()
    assert corpus.name == "text.txt"
    assert corpus.files[0].bytes == path.stat().st_size
    assert corpus.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.notes == ("text.txt has CRLF line ends, which are tokenized as they are.",)


def test_files_are_joined_by_a_newline(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_bytes(b"first\n")
    paths[1].write_bytes(b"\xef\xbb\xbfsecond")
    corpus = read_corpus(paths)
    assert corpus.text == b"first\n\xef\xbb\xbfsecond"
    assert corpus.name == "a.txt+b.txt"
    assert "byte order mark" in corpus.notes[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"good\nbad \xff\xe4 byte", "not UTF-8: byte 0xff at offset 9, line 2"),
        (b"cut \xe4\xb8", "not UTF-8: byte 0xe4 at offset 4, line 1"),
        ("text".encode("utf-16"), "is UTF-16"),
        (b"\x1f\x8b\x08", "is gzip"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_corpus([path])


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.txt cannot be read"):
        read_corpus([tmp_path / "none.txt"])
    with pytest.raises(FileError, match="cannot be read"):
        read_corpus([tmp_path])
    with pytest.raises(UsageError):
        read_corpus([])


def test_a_text_of_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(3 << 40)
    with pytest.raises(InputError, match=r"sparse\.txt is larger than 1 GiB"):
        read_corpus([path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_is_read_if_somebody_writes_to_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a device"):
        read_corpus([Path("/dev/zero")])
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="Nothing comes out of the pipe"):
        read_corpus([path])
    reader, writer = os.pipe()
    shell = subprocess.Popen(["sh", "-c", "echo text; echo more"], stdout=writer)
    os.close(writer)
    try:
        assert read_corpus([Path(f"/dev/fd/{reader}")]).text == b"text\nmore"
    finally:
        os.close(reader)
        shell.wait()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_an_endless_pipe_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmix.measurement.corpus.MAX_BYTES", 1 << 20)
    reader, writer = os.pipe()
    endless = subprocess.Popen(["cat", "/dev/zero"], stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    try:
        with pytest.raises(InputError, match="is larger than"):
            read_corpus([Path(f"/dev/fd/{reader}")])
    finally:
        os.close(reader)
        endless.wait()


def test_chunks_do_not_overlap_and_start_with_bos() -> None:
    tokens = np.arange(100, 141, dtype=np.int32)
    chunks = split(tokens, 8, name="x", bos=1)
    assert chunks.shape == (5, 8)
    assert chunks[:, 0].tolist() == [1] * 5
    assert chunks[2].tolist() == [1, *range(117, 124)]
    assert tokens[0] == 100
    assert split(tokens, 8, name="x", limit=2)[:, 0].tolist() == [100, 108]


def test_too_short_says_what_is_needed_and_found() -> None:
    tokens = np.zeros(812, np.int32)
    with pytest.raises(InputError) as caught:
        split(tokens, 512, name="news.txt")
    assert caught.value.message == "news.txt is too short: a context of 512 needs 1024 tokens, and it has 812."
    assert "a context of 256" in caught.value.hint
    assert len(split(tokens, 256, name="news.txt")) == 3
    with pytest.raises(UsageError, match="7 tokens"):
        split(tokens, 7, name="x")
    with pytest.raises(UsageError, match="0 chunks"):
        split(tokens, 8, name="x", limit=0)


def test_a_corpus_for_each_file_and_each_text_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / ".hidden").write_text("no")
    (folder / "model.gguf").write_bytes(b"GGUF\0\0\0\3")
    (folder / "old.txt").write_bytes(b"caf\xe9")
    single = tmp_path / "single.txt"
    single.write_text("alone")
    corpora = find_corpora([str(single), folder, f"{folder}/../single.txt"])
    assert [(corpus.name, corpus.text) for corpus in corpora] == [
        ("single.txt", b"alone"),
        ("a.md", b"first"),
        ("b.txt", b"second"),
    ]
    assert corpora[0].sha256 == hashlib.sha256(b"alone").hexdigest()
    assert corpora[0].bytes == 5
    assert corpora[1].notes == (
        f"Left out of {folder}: .hidden (hidden), model.gguf (binary), more (a folder),"
        " old.txt (not UTF-8: byte 0xe9 at offset 3, line 1).",
    )
    assert corpora[0].notes == corpora[2].notes == ()


def test_corpora_of_one_name_get_their_folders_in_front(tmp_path: Path) -> None:
    for name in ("x/one/t.txt", "x/two/t.txt", "y/one/t.txt", "u.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_corpora([tmp_path / name for name in ("x/one/t.txt", "x/two/t.txt", "u.txt")])
    assert [corpus.name for corpus in found] == ["one/t.txt", "two/t.txt", "u.txt"]
    found = find_corpora([tmp_path / name for name in ("x/one/t.txt", "y/one/t.txt")])
    assert [corpus.name for corpus in found] == [str(tmp_path / "x/one/t.txt"), str(tmp_path / "y/one/t.txt")]


def test_what_is_no_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        find_corpora([])
    with pytest.raises(FileError, match="wikitext2 does not exist") as caught:
        find_corpora(["wikitext2"])
    assert "wikitext-2" in caught.value.hint
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    with pytest.raises(InputError, match=r"has no text in it but weights\.bin \(binary\)"):
        find_corpora(["."])
    with pytest.raises(InputError, match="is not UTF-8"):  # named, so not left out
        (tmp_path / "old.txt").write_bytes(b"caf\xe9")
        find_corpora(["old.txt"])


def test_a_file_of_a_known_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext-2").write_text("mine")
    assert find_corpora(["./wikitext-2"])[0].text == b"mine"
