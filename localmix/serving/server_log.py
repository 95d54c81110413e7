"""The log of `localmix serve`: what llama-server says, and a line for each request; no text of a request, no key."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from pathlib import Path

import platformdirs

from localmix.serving.gateway import Access

FILE_BYTES = 10 * 2**20
OLD_FILES = 3


def log_folder() -> Path:
    """The user's folder for logs."""
    return platformdirs.user_log_path("localmix", appauthor=False)


class ServerLog:
    """Lines in a file that only its user can read, with at most `OLD_FILES` older ones beside it.

    A disk that is full loses lines, and ends no server.

    Args:
        path: the file.
        as_json: one JSON object a line.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, as_json: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._as_json = as_json
        self._descriptor = _open(path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def line(self, source: str, text: str) -> None:
        """A line of a model's llama-server."""
        self._write({"source": source, "text": text}, f"{source}: {text}")

    def request(self, access: Access) -> None:
        """A request that was answered."""
        told = f"{access.client} {access.method} {access.path} {access.status} {access.milliseconds:.0f} ms"
        model = f" {access.model}" if access.model else ""
        self._write(dataclasses.asdict(access), f"{told} {access.bytes_out} bytes{model} ({access.end})")

    def _write(self, fields: dict[str, object], text: str) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **fields}, ensure_ascii=False) if self._as_json else f"{now} {text}"
        # the path of a request may hold line ends, which would forge lines
        data = (line.replace("\r", "\\r").replace("\n", "\\n") + "\n").encode("utf-8", "replace")
        with contextlib.suppress(OSError):
            if os.fstat(self._descriptor).st_size + len(data) > FILE_BYTES:
                self._start_anew()
            os.write(self._descriptor, data)

    def _start_anew(self) -> None:
        older = [self.path, *(self.path.with_name(f"{self.path.name}.{number + 1}") for number in range(OLD_FILES))]
        for number in range(OLD_FILES, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(older[number - 1], older[number])
        full, self._descriptor = self._descriptor, _open(self.path)
        os.close(full)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
