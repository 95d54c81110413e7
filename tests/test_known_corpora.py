"""Fetching a known corpus, from a small hub on this machine that speaks the real one's protocol."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from localmix import known_corpora
from localmix.corpus import find_corpora
from localmix.errors import FileError, NetworkError
from localmix.known_corpora import KNOWN_CORPORA, fetch

TEXT = b"The valley of Ostra lies high.\n" * 40


def zipped(member: str, text: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(member, text)
    return archive.getvalue()


@dataclass
class Hub:
    """What it serves, and what it was asked for."""

    endpoint: str
    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 404
    asked: list[str] = field(default_factory=list)


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a process that has imported the package already."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the archive that `wikitext-2` means in this test, and an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, with_body: bool) -> None:
            served.asked.append(f"{self.command} {self.path}")
            assert "authorization" not in self.headers
            data = served.files.get(self.path)
            if data is None:
                self.send_response(served.status)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", self.path.split("/")[-2])
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    served = Hub(f"http://127.0.0.1:{server.server_port}")
    known = KNOWN_CORPORA["wikitext-2"]
    archive = zipped(known.member, TEXT)
    mine = replace(
        known,
        archive_sha256=hashlib.sha256(archive).hexdigest(),
        sha256=hashlib.sha256(TEXT).hexdigest(),
    )
    served.files[f"/datasets/ggml-org/ci/resolve/{known.revision}/{known.archive}"] = archive
    monkeypatch.setattr(known_corpora, "KNOWN_CORPORA", {"wikitext-2": mine})
    point_to(served.endpoint, monkeypatch)
    # what the cache's place is read from on each system
    for variable in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files_below(folder: Path) -> list[str]:
    """Names of the files, without those that lock one."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]


def test_it_comes_once_and_stays(hub: Hub, tmp_path: Path) -> None:
    corpus = find_corpora(["wikitext-2"])[0]
    assert (corpus.name, corpus.bytes, corpus.sha256) == ("wiki.test.raw", len(TEXT), hashlib.sha256(TEXT).hexdigest())
    assert corpus.text == TEXT[:-1]
    assert "ggml-org/ci" in corpus.notes[0]
    assert any(line.startswith("GET ") for line in hub.asked)
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
    place = next(iter(hub.files))
    hub.files[place] = zipped("wikitext-2-raw/wiki.test.raw", b"something else")
    with pytest.raises(NetworkError, match="is not the file it should be and was deleted: its sha256 is") as caught:
        fetch("wikitext-2")
    assert caught.value.exit_code == 6
    assert files_below(tmp_path / "cache") == []


@pytest.mark.parametrize("status", [404, 401, 500])
def test_a_hub_without_it_is_said(hub: Hub, status: int) -> None:
    hub.files.clear()
    hub.status = status
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
    hub.files.clear()
    program = "from localmix.corpus import find_corpora; find_corpora(['wikitext-2'])"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "NetworkError" in done.stderr
    revision = "927b3642933080f1b0e811e2f916e14c292992f9"
    assert hub.asked[-1] == f"HEAD /datasets/ggml-org/ci/resolve/{revision}/wikitext-2-raw-v1.zip"


def test_a_cache_that_cannot_be_written_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(FileError, match="Cannot use"):
        fetch("wikitext-2")


def test_the_pins_are_whole() -> None:
    for known in KNOWN_CORPORA.values():
        assert len(known.revision) == 40
        assert len(known.archive_sha256) == len(known.sha256) == 64
