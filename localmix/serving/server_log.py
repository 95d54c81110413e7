"""The log of `localmix serve`: what llama-server says, and a line for each request; no text of a request, no key."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import logging.handlers
import os
from io import TextIOWrapper
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

    Args:
        path: the file.
        as_json: one JSON object a line.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, as_json: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._as_json = as_json
        self._file = _PrivateFile(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def line(self, source: str, text: str) -> None:
        """A line of a model's llama-server, or of localmix itself."""
        self._write({"source": source, "text": text}, f"{source}: {text}")

    def request(self, access: Access) -> None:
        """A request that was answered."""
        told = f"{access.client} {access.method} {access.path} {access.status} {access.milliseconds:.0f} ms"
        model = f" {access.model}" if access.model else ""
        self._write(dataclasses.asdict(access), f"{told} {access.bytes_out} bytes{model} ({access.end})")

    def _write(self, fields: dict[str, object], text: str) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **fields}, ensure_ascii=False) if self._as_json else f"{now} {text}"
        # a request's path may hold line ends, which would forge lines
        self._file.emit(logging.makeLogRecord({"msg": line.replace("\r", "\\r").replace("\n", "\\n")}))


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """Readable for its user alone, and silent where the disk is full: a log must not end a server."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return TextIOWrapper(os.fdopen(descriptor, "ab"), encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""
