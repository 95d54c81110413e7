"""Fetching a known corpus, from a small hub on this machine that speaks the real one's protocol."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from localmix.errors import FileError, NetworkError
from localmix.measurement import known_corpora
from localmix.measurement.corpus import find_corpora
from localmix.measurement.known_corpora import KNOWN_CORPORA, fetch
from tests.hub_server import Hub, Refusal, point_to, serve

TEXT = b"The valley of Ostra lies high.\n" * 40


def zipped(member: str, text: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(member, text)
    return archive.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the archive that `wikitext-2` means in this test, and an empty cache."""
    known = KNOWN_CORPORA["wikitext-2"]
    archive = zipped(known.member, TEXT)
    mine = replace(
        known,
        archive_sha256=hashlib.sha256(archive).hexdigest(),
        sha256=hashlib.sha256(TEXT).hexdigest(),
    )
    monkeypatch.setattr(known_corpora, "KNOWN_CORPORA", {"wikitext-2": mine})
    # what the cache's place is read from on each system
    for variable in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    with serve() as served:
        served.repositories[known.repository] = {known.archive: archive}
        served.commit = known.revision
        point_to(served.endpoint, monkeypatch)
        yield served
        assert not served.saw_token


def files_below(folder: Path) -> list[str]:
    """Names of the files, without those that lock one."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]


def test_it_comes_once_and_stays(hub: Hub, tmp_path: Path) -> None:
    corpus = find_corpora(["wikitext-2"])[0]
    assert (corpus.name, corpus.bytes, corpus.sha256) == ("wiki.test.raw", len(TEXT), hashlib.sha256(TEXT).hexdigest())
    assert corpus.text == TEXT[:-1]
    assert "ggml-org/ci" in corpus.notes[0]
    assert any(method == "GET" for method, _, _ in hub.asked)
    # only the text stays
    assert files_below(tmp_path / "cache") == ["wiki.test.raw"]

    hub.asked.clear()
    assert find_corpora(["wikitext-2"])[0].notes == ()
    assert hub.asked == []


def test_a_damaged_copy_is_fetched_again(hub: Hub) -> None:
    path, _ = fetch("wikitext-2")
    path.write_bytes(TEXT[:-100])
    again, notes = fetch("wikitext-2")
    assert again == path
    assert path.read_bytes() == TEXT
    assert "was not the text it should be any more" in notes[0]


def test_another_file_is_refused_and_deleted(hub: Hub, tmp_path: Path) -> None:
    known = KNOWN_CORPORA["wikitext-2"]
    hub.repositories[known.repository][known.archive] = zipped("wikitext-2-raw/wiki.test.raw", b"something else")
    with pytest.raises(NetworkError, match="is not the file it should be and was deleted: its sha256 is") as caught:
        fetch("wikitext-2")
    assert caught.value.exit_code == 6
    assert files_below(tmp_path / "cache") == []


@pytest.mark.parametrize("status", [404, 401, 500])
def test_a_hub_without_it_is_said(hub: Hub, status: int) -> None:
    hub.refusals.append(Refusal("/resolve/", status, {"X-Error-Code": "EntryNotFound"}))
    with pytest.raises(NetworkError, match=f"does not give wikitext-2-raw-v1.zip .* it answers {status}") as caught:
        fetch("wikitext-2")
    assert "--corpus FILE" in caught.value.hint


def test_without_a_network_it_fails_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        with pytest.raises(NetworkError, match=r"The hub cannot be reached for wikitext-2-raw-v1\.zip"):
            fetch("wikitext-2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="The hub cannot be reached"):
        fetch("wikitext-2")
    assert time.monotonic() - started < 10


def test_the_variable_of_the_hub_is_heeded(hub: Hub, tmp_path: Path) -> None:
    hub.repositories.clear()
    program = "from localmix.measurement.corpus import find_corpora; find_corpora(['wikitext-2'])"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "NetworkError" in done.stderr
    revision = "927b3642933080f1b0e811e2f916e14c292992f9"
    place = f"/datasets/ggml-org/ci/resolve/{revision}/wikitext-2-raw-v1.zip"
    assert hub.asked[-1] == ("HEAD", place, "")


def test_a_cache_that_cannot_be_written_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(FileError, match="Cannot use"):
        fetch("wikitext-2")


def test_the_pins_are_whole() -> None:
    for known in KNOWN_CORPORA.values():
        assert len(known.revision) == 40
        assert len(known.archive_sha256) == len(known.sha256) == 64
