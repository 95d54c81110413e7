"""A stream on its way from an engine to a client: each piece as it comes, and no faster than the client reads."""

from __future__ import annotations

import asyncio
from typing import Literal

from localmix.serving.connection import Connection
from localmix.serving.engine_reply import Reply

_LOOKS = 4  # within the time that a client has

Ending = Literal["done", "client left", "client stalled", "engine lost"]


class Pipe:
    """Hands a reply over to the client of a connection.

    Where the client does not read, the connection's buffer fills up to its limit, then the engine's own, and then
    the engine waits.

    Args:
        reply: whose body is the stream.
        connection: on which the head of the answer was sent.
        chunked: whether the client gets it in chunks; the last one is not sent from here.
        stall_seconds: after which a client that takes nothing of what waits for it is given up.

    Attributes:
        size: bytes of the stream that were handed over.
    """

    def __init__(self, reply: Reply, connection: Connection, chunked: bool, stall_seconds: float) -> None:
        assert connection.transport is not None
        self.size = 0
        self._reply = reply
        self._connection = connection
        self._transport = connection.transport
        self._chunked = chunked
        self._stall_seconds = stall_seconds
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None
        self._written = 0  # with the chunks' frames
        self._taken = 0
        self._moved = 0.0

    async def run(self) -> Ending:
        """Hand over everything; how it ended."""
        self._connection.follower = self
        self._moved = self._loop.time()
        self._look()
        if self._connection.is_full:  # of an answer before
            self.pause()
        self._reply.hand_to(self.write)
        self._reply.ended.add_done_callback(self._stop)
        try:
            return await self._ending
        finally:
            self._reply.ended.remove_done_callback(self._stop)
            self._connection.follower = None
            if self._watch is not None:
                self._watch.cancel()

    def write(self, piece: bytes) -> None:
        """Send a piece, or what there is to say instead of the rest."""
        if self._transport.is_closing():
            self.leave()
            return
        self.size += len(piece)
        if self._chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self._written += len(piece)
        self._transport.write(piece)

    def pause(self) -> None:
        """The client has to read first."""
        self._reply.pause()

    def resume(self) -> None:
        """It has read."""
        self._reply.resume()

    def leave(self) -> None:
        """It has gone."""
        self._finish("client left")

    def _stop(self, ended: asyncio.Future[bool]) -> None:
        self._finish("done" if ended.result() else "engine lost")

    def _finish(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    def _look(self) -> None:
        now = self._loop.time()
        left = self._transport.get_write_buffer_size()
        taken = self._written - left
        if not left or taken != self._taken:
            self._taken, self._moved = taken, now
        elif now - self._moved >= self._stall_seconds:
            self._finish("client stalled")
            return
        self._watch = self._loop.call_later(self._stall_seconds / _LOOKS, self._look)
