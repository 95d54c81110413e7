"""One request to a llama-server and its answer, at no more processor time than it takes: a token is one read.

Each piece of a stream is handed on within the callback that read it. What a library's client does beside (futures,
tasks that wake up, buffers) is taken from the threads that compute, which wait for each other at every step.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

_ROOM_BYTES = 16384
_HEAD_BYTES = 65536
_EXTENSION = rb"[ \t]{0,8}(?:;[^\r\n]{0,256})?"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})" + _EXTENSION + rb"\r\n")
_PART_OF_SIZE = re.compile(rb"(?:[0-9A-Fa-f]{1,8}" + _EXTENSION + rb")?\r?")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_STATUS = re.compile(r"HTTP/1\.\d ([1-5]\d\d)(?!\S)")
_LENGTH = re.compile(r"[0-9]{0,18}")
_WITHOUT_BODY = frozenset({204, 304})


class EngineGone(Exception):
    """A llama-server ended, or closed the connection, before its answer was complete."""


class Chunks:
    """Takes a chunked body (RFC 9112, 7.1) apart, however it was cut on its way.

    Attributes:
        ended: the last chunk has come.
        broken: there was no size where one has to be.
    """

    def __init__(self) -> None:
        self.ended = False
        self.broken = False
        self._rest = b""  # of a size
        self._left = 0  # bytes of a chunk and its line end
        self._is_last = False

    def feed(self, data: bytes) -> bytes:
        """What the chunks hold."""
        if not self._left and not self._rest:
            # nearly always it is one chunk, and whole
            found = _SIZE.match(data)
            if found and 0 < int(found[1], 16) == len(data) - found.end() - 2:
                return data[found.end() : -2]
        pieces = []
        data, self._rest, place = self._rest + data, b"", 0
        while place < len(data) and not self.ended and not self.broken:
            if not self._left:
                found = _SIZE.match(data, place)
                if found is None:
                    self.broken = _PART_OF_SIZE.fullmatch(data, place) is None
                    self._rest = data[place:]
                    break
                place = found.end()
                self._left = int(found[1], 16) + 2
                self._is_last = self._left == 2
            piece = data[place : place + self._left]
            pieces.append(piece[: max(self._left - 2, 0)])
            place += len(piece)
            self._left -= len(piece)
            self.ended = self._is_last and not self._left
        return b"".join(pieces)


class Reply(asyncio.BufferedProtocol):
    """An answer as it comes.

    Args:
        request: the bytes to send.

    Attributes:
        status: of HTTP.
        headers: with names in lower case.
        ended: whether the answer came to its end, once nothing more of it will come.
    """

    def __init__(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended: asyncio.Future[bool] = loop.create_future()
        self._request = request
        self._begun: asyncio.Future[bool] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        # asyncio would make and give back 256 KiB for each token
        self._room = memoryview(bytearray(_ROOM_BYTES))
        self._head = b""
        self._pieces: list[bytes] = []
        self._take: Callable[[bytes], object] = self._pieces.append
        self._chunks: Chunks | None = None
        self._left: int | None = None  # of a body whose length is known

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def wait_until_begun(self) -> None:
        """Wait for the head.

        Raises:
            EngineGone: it will not come.
        """
        if not await self._begun:
            raise EngineGone

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            EngineGone: it did not come to its end.
        """
        if not await self.ended:
            raise EngineGone
        return b"".join(self._pieces)

    def hand_to(self, take: Callable[[bytes], object]) -> None:
        """Let `take` have the body piece by piece: what has come by now at once, the rest as it comes."""
        come, self._pieces, self._take = self._pieces, [], take
        for piece in come:
            take(piece)

    def pause(self) -> None:
        """Take nothing more for now: the engine has to wait when its own buffer is full."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Go on."""
        if self._transport is not None:
            self._transport.resume_reading()

    def close(self) -> None:
        """Give it up; llama-server sees that nobody listens any more, and frees the slot."""
        if self._transport is not None:
            self._transport.abort()

    # ------- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)
        self._request = b""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        if self.ended.done():  # what comes behind an answer belongs to none
            return
        data = bytes(self._room[:nbytes])
        try:
            if self.status == 0:
                self._take_head(data)
            else:
                self._take_body(data)
        except ValueError:  # what an engine of ours would not send
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        # a body without a length ends with its connection
        self._end(self.status != 0 and self._chunks is None and self._left is None and exc is None)

    def _take_head(self, data: bytes) -> None:
        head, end, rest = (self._head + data).partition(b"\r\n\r\n")
        if not end:
            self._head = head
            if len(head) > _HEAD_BYTES:
                raise ValueError("The head is too long.")
            return
        line, *fields = head.decode("latin-1").split("\r\n")
        found = _STATUS.match(line)
        if found is None or any(map(_CONTROL.search, fields)):
            raise ValueError("That is no HTTP.")
        status, self._head = int(found[1]), b""
        if status < 200:  # the answer is still to come
            self._take_head(rest)
            return
        for field in fields:
            name, _, value = field.partition(":")
            self.headers[name.lower()] = value.strip()
        coding, length = self.headers.get("transfer-encoding", "").lower(), self.headers.get("content-length", "")
        if status in _WITHOUT_BODY:
            self._left = 0
        elif coding == "chunked":
            self._chunks = Chunks()
        elif coding or not _LENGTH.fullmatch(length):
            raise ValueError("Nobody knows where its body ends.")
        elif length:
            self._left = int(length)
        self.status = status
        if not self._begun.done():
            self._begun.set_result(True)
        self._take_body(rest)

    def _take_body(self, data: bytes) -> None:
        if self._chunks is not None:
            piece = self._chunks.feed(data)
            if piece:
                self._take(piece)
            if self._chunks.ended:
                self._end(True)
            elif self._chunks.broken:
                self.close()
            return
        data = data[: self._left]
        if data:
            self._take(data)
        if self._left is not None:
            self._left -= len(data)
            if not self._left:
                self._end(True)

    def _end(self, complete: bool) -> None:
        if not self._begun.done():
            self._begun.set_result(False)
        if not self.ended.done():
            self.ended.set_result(complete)


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """A request as it is sent; the connection is for it alone, as llama-server closes old ones when it likes."""
    given = {"Host": "localhost", **headers, "Connection": "close"}
    if body is not None:
        given["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")
