"""A small hub on this machine: it speaks what huggingface-hub and the downloads use, over real sockets.

Files that git would keep in LFS are answered with a redirect to another path, as the real hub answers with one to its
storage. What goes wrong is asked for beforehand: `refuse`, `drop`, `damage`, `speed`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 4096  # files from this size on are kept in LFS

_RESOLVE = re.compile(r"/(?:datasets/)?(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")


@dataclass(frozen=True)
class Refusal:
    """An error to answer with, for so many requests of a path that contains `part`."""

    part: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """What it serves, what goes wrong, and what it was asked for.

    Attributes:
        repositories: name → file → content.
        refusals: each is used once, by the first request whose path contains its part.
        drops: file → numbers of bytes after which the connection is closed, one for each request.
        damage: file → content that is sent instead.
        information: what is answered instead of what a repository holds.
        silent: files of which half is sent, and then nothing for `silence` seconds; each once.
        bytes_per_second: of one connection; 0 for as fast as it goes.
        token: the one that it wants, if any.
        asked: method, path and the Range header of each request.
        sent: bytes of bodies, by file.
        saw_token: whether a request brought one.
        leaks: paths of the storage that one came to.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commit: str = COMMIT
    refusals: list[Refusal] = field(default_factory=list)
    drops: dict[str, list[int]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    information: bytes = b""
    damage: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    silence: float = 2
    bytes_per_second: int = 0
    token: str = ""
    with_ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    saw_token: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, folder: Path) -> None:
        """Serve the files of a folder."""
        self.repositories[repository] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    @property
    def variables(self) -> dict[str, str]:
        """What leads a process to it; nothing of the user's own is in the way."""
        return {"HF_ENDPOINT": self.endpoint, "NO_PROXY": "*", "HF_TOKEN": self.token, "HF_HOME": "/nonexistent"}

    def paths(self, part: str = "") -> list[str]:
        """The paths asked for that contain `part`."""
        return [path for _, path, _ in self.asked if part in path]

    def bytes_of(self, part: str) -> int:
        """Bytes sent of all files whose name contains `part`."""
        return sum(count for name, count in self.sent.items() if part in name)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) >= LFS_BYTES:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["blobId"] = "f" * 40  # of the pointer
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        with self.hub.lock:
            self.hub.saw_token |= "authorization" in self.headers
            self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
            refusal = next((found for found in self.hub.refusals if found.part in path), None)
            if refusal:
                self.hub.refusals.remove(refusal)
        if refusal:
            self._send(refusal.status, b"", refusal.headers)
        elif path.startswith("/storage/"):
            if "authorization" in self.headers:
                self.hub.leaks.append(path)
            self._send_file(path.removeprefix("/storage/"))
        elif self.hub.token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models":
            self._send_json([{"id": name} for name in self.hub.repositories])
        elif self.hub.information and _INFO.fullmatch(path):
            self._send(200, self.hub.information, {"Content-Type": "application/json"})
        elif match := _INFO.fullmatch(path):
            self._send_info(match["repository"], match["revision"])
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["repository"], match["revision"], match["file"])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send_info(self, repository: str, revision: str | None) -> None:
        files = self.hub.repositories.get(repository)
        if files is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", self.hub.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            entries = [_entry(name, content) for name, content in files.items()]
            self._send_json({"id": repository, "sha": self.hub.commit, "siblings": entries})

    def _resolve(self, repository: str, revision: str, file: str) -> None:
        content = self.hub.repositories.get(repository, {}).get(file)
        if content is None or revision != self.hub.commit:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif len(content) >= LFS_BYTES:
            # another host, as the real hub's storage is one
            storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
            location = f"{storage}/storage/{urllib.parse.quote(f'{repository}/{file}')}"
            sha256 = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256}"'}
            self._send(302, b"", {"Location": location, "X-Repo-Commit": self.hub.commit, **linked})
        else:
            self._send_file(f"{repository}/{file}")

    def _send_file(self, place: str) -> None:
        owner, model, file = place.split("/", 2)
        repository = f"{owner}/{model}"
        content = self.hub.damage.get(file, self.hub.repositories[repository][file])
        etag = self.hub.etags.get(file, f'"{hashlib.md5(content).hexdigest()}"')
        start, stop = 0, len(content)
        status, headers = 200, {"ETag": etag, "Accept-Ranges": "bytes", "X-Repo-Commit": self.hub.commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if wanted and same and self.hub.with_ranges:
            start = int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        with self.hub.lock:
            drops = self.hub.drops.get(file, [])
            cut = drops.pop(0) if drops and stop - start > drops[0] else None
        self._send(status, content[start:stop], headers, file, cut)

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], file: str = "", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        silent = file in self.hub.silent
        if silent:
            self.hub.silent.remove(file)
            cut = len(body) // 2
        rest = memoryview(body if cut is None else body[:cut])
        try:
            while rest:
                piece = rest[: 1 << 16]
                self.wfile.write(piece)
                with self.hub.lock:
                    self.hub.sent[file] = self.hub.sent.get(file, 0) + len(piece)
                rest = rest[len(piece) :]
                if self.hub.bytes_per_second and file:
                    time.sleep(len(piece) / self.hub.bytes_per_second)
        except OSError:  # the other side left
            self.close_connection = True
        if silent:
            time.sleep(self.hub.silence)
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub for as long as the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a process that has imported the package already."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
