"""One client's connection: deadlines for what it sends, and errors of HTTP itself in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from localmix.serving.api_errors import INVALID, SERVER, ApiError

HEADER_BYTES, HEADERS = 16384, 100
# how long what a refused client still sends is read and dropped, so that it reads why
LINGER_SECONDS = 1.0
# what the kernel holds for a client that does not read: a stream shows soon that nobody follows it
SEND_BUFFER_BYTES = 65536
# more than this beyond it, and whoever writes has to wait
UNSENT_BYTES = 65536

_bugs = logging.getLogger("localmix.serving")


class Follower(Protocol):
    """Who writes to a client beside aiohttp."""

    def pause(self) -> None:
        """Too much is unread."""

    def resume(self) -> None:
        """Most of it was read."""

    def leave(self) -> None:
        """The client will not read any more."""


class Connection(web.RequestHandler):
    """aiohttp's server protocol with a deadline for a request's head and a limit of connections.

    Args:
        server: aiohttp's, which holds the handler of requests.
        head_seconds: from the first byte of a head to its last; the first request's from the connection's beginning.
        has_too_many: whether one more would be.
        refused: told the status of what ended before it was a request.
        stall_seconds: after which a client is dropped that reads nothing of what waits for it.

    Attributes:
        is_busy: whether a request is being answered.
        is_full: whether too much is unread.
        follower: who writes its stream, and looks itself whether it is read.
    """

    __slots__ = (
        "_deadline",
        "_has_sent",
        "_has_too_many",
        "_head_seconds",
        "_refused",
        "_stall_seconds",
        "_unread",
        "_watch",
        "follower",
        "is_busy",
        "is_full",
    )

    def __init__(
        self,
        server: web.Server,
        *,
        head_seconds: float,
        idle_seconds: float,
        has_too_many: Callable[[], bool],
        refused: Callable[[str, int], None],
        stall_seconds: float,
    ) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=idle_seconds,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            max_headers=HEADERS,
            lingering_time=LINGER_SECONDS,
            auto_decompress=False,
        )
        self.is_busy = False
        self.is_full = False
        self.follower: Follower | None = None
        self._head_seconds = head_seconds
        self._has_too_many = has_too_many
        self._refused = refused
        self._deadline: asyncio.TimerHandle | None = None
        self._has_sent = False
        self._stall_seconds = stall_seconds
        self._unread = 0
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._has_too_many():
            full = ApiError(503, "Too many clients are connected.", SERVER, code="too_many_connections", retry_after=1)
            self._end_with(transport, full)
            return
        transport.set_write_buffer_limits(UNSENT_BYTES)
        own: socket.socket | None = transport.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().connection_made(transport)
        self._await_head()
        self._look_again(transport)

    def data_received(self, data: bytes) -> None:
        self._has_sent = True
        super().data_received(data)
        if self._deadline is None and not self.is_busy:
            self._await_head()

    def eof_received(self) -> None:
        if self.follower is not None:
            self.follower.leave()

    def pause_writing(self) -> None:
        self.is_full = True
        if self.follower is not None:
            self.follower.pause()
        else:
            super().pause_writing()

    def resume_writing(self) -> None:
        self.is_full = False
        if self.follower is not None:
            self.follower.resume()
        if self.writing_paused:  # a follower's pause is none of aiohttp's, which would wait for the end of it
            super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel_deadline()
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def begin(self) -> None:
        """A request's head is complete."""
        self.is_busy = True
        self._cancel_deadline()
        if self.is_full and not self.writing_paused:  # of a stream before, whose pause aiohttp was not told
            super().pause_writing()

    def end(self) -> None:
        """It was answered; the next may come."""
        self.is_busy = False
        self._has_sent = False

    def abort(self) -> None:
        """Close at once; a close would wait till the client has read the rest."""
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, and bugs."""
        self.begin()
        if isinstance(exc, BadHttpMessage):
            error = _head_error(exc)
            self._refused(self.client(), error.status)
        else:
            _bugs.error("A request could not be answered.", exc_info=exc)
            error = ApiError(500, "The server made a mistake; its log has the details.", SERVER, code="internal_error")
        if request.writer.output_size > 0:
            raise ConnectionError("A part of another answer was sent already.")
        return error_response(error, close=True)

    def client(self) -> str:
        """The address of the other side."""
        name = self.peername
        return str(name[0]) if isinstance(name, tuple) else ""

    def _look_again(self, transport: asyncio.Transport) -> None:
        self._watch = asyncio.get_running_loop().call_later(self._stall_seconds, self._look, transport)

    def _look(self, transport: asyncio.Transport) -> None:
        """Drop a client that left as much unread as the last time; closing would wait till it has read."""
        unread = transport.get_write_buffer_size()
        if unread and unread == self._unread and self.follower is None:
            transport.abort()
            return
        self._unread = unread
        self._look_again(transport)

    def _await_head(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self._head_seconds, self._give_up)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.transport is None:
            return
        if self._has_sent:  # a browser opens connections for later and takes an answer on them for an error
            late = ApiError(408, "The head of the request did not come in time.", INVALID, code="request_timeout")
            self._end_with(self.transport, late)
        self.force_close()

    def _end_with(self, transport: asyncio.Transport, error: ApiError) -> None:
        peer = transport.get_extra_info("peername")
        self._refused(str(peer[0]) if isinstance(peer, tuple) else "", error.status)
        response = error_response(error, close=True)
        body = error.body()
        head = [f"HTTP/1.1 {response.status} {response.reason}", "Connection: close", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in response.headers.items() if name != "Content-Length"]
        transport.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
        transport.close()


def error_response(error: ApiError, *, close: bool = False) -> web.Response:
    """The answer that says it."""
    headers = {"Server": "localmix", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if error.retry_after:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    response = web.Response(
        status=error.status, body=error.body(), content_type="application/json", charset="utf-8", headers=headers
    )
    if close or error.close:
        response.force_close()
    return response


def _head_error(problem: BadHttpMessage) -> ApiError:
    if isinstance(problem, LineTooLong) or "Too many headers" in str(problem):
        sizes = f"{HEADER_BYTES} bytes a line and {HEADERS} headers"
        return ApiError(431, f"The head of the request is too large: {sizes} at most.", code="headers_too_large")
    return ApiError(400, "The request is not valid HTTP.", code="bad_http")


def socket_address(request: web.BaseRequest) -> str:
    """The address of this machine that a client connected to."""
    found: Any = request.get_extra_info("sockname")
    return str(found[0]) if isinstance(found, tuple) else ""
