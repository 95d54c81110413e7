"""What the gateway knows of a llama-server, and how it asks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from localmix.serving.api_errors import RETRY_SECONDS, SERVER, ApiError, engine_error
from localmix.serving.engine_reply import EngineGone, Reply, request_bytes

EngineState = Literal["loading", "ready", "restarting", "failed"]

CONNECT_SECONDS = 5.0
_QUEUE_SECONDS = 0.05  # between two looks at a queue that was full
ENGINE_LOST = "engine_unavailable"


@dataclass(frozen=True)
class EngineAddress:
    """Where a llama-server listens: a Unix socket, or (where there are none) a port of the loopback with a key."""

    socket: Path | None = None
    port: int = 0
    key: str = field(default="", repr=False)


class Engine(Protocol):
    """A running llama-server."""

    @property
    def name(self) -> str:
        """What clients call the model, as the library does: `tinymix:Q8_0`."""

    @property
    def address(self) -> EngineAddress:
        """Read before each request: a restarted engine may listen elsewhere."""

    @property
    def state(self) -> EngineState:
        """Whether it answers."""

    @property
    def failure(self) -> str | None:
        """Why it does not."""

    @property
    def embeddings(self) -> bool:
        """Whether it makes vectors instead of text."""


@contextlib.asynccontextmanager
async def ask(
    engine: Engine, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> AsyncIterator[Reply]:
    """An engine's answer, whose head has come; leaving the block closes the connection, which frees the slot.

    Raises:
        ApiError: the engine is not there, or went away.
    """
    if engine.state != "ready":
        _refuse_unready(engine)
    address = engine.address
    key = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    reply = Reply(request_bytes(method, path, {**(headers or {}), **key}, body))
    try:
        await _connect(address, reply)
        await reply.wait_until_begun()
        yield reply
    except EngineGone as error:
        raise engine_lost(engine.name) from error
    finally:
        reply.close()


async def ask_json(engine: Engine, path: str) -> dict[str, Any]:
    """What an engine tells of itself.

    Raises:
        ApiError: it does not.
    """
    async with ask(engine, "GET", path) as reply:
        text = await reply.read()
        if reply.status >= 400:
            raise engine_error(reply.status, text)
    told = json.loads(text)
    assert isinstance(told, dict)
    return told


def engine_lost(name: str) -> ApiError:
    """An engine went away while it worked."""
    return ApiError(
        503, f"The engine of {name} is gone, and is started again; try again soon.", SERVER,
        code=ENGINE_LOST, retry_after=RETRY_SECONDS,
    )  # fmt: skip


async def open_socket(path: Path, seconds: float) -> socket.socket:
    """A connection to a Unix socket.

    Where its queue is full, the system does not let a program wait, and asyncio takes that for connected.

    Raises:
        OSError: nobody listens there.
        TimeoutError: the queue stayed full.
    """
    deadline = time.monotonic() + seconds
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try:
            client.connect(str(path))
            return client
        except BlockingIOError:
            client.close()
        except OSError:
            client.close()
            raise
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(_QUEUE_SECONDS)


async def _connect(address: EngineAddress, reply: Reply) -> None:
    loop = asyncio.get_running_loop()
    try:
        if address.socket is not None:
            await loop.create_unix_connection(lambda: reply, sock=await open_socket(address.socket, CONNECT_SECONDS))
        else:
            connecting = loop.create_connection(lambda: reply, "127.0.0.1", address.port)
            await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except (OSError, TimeoutError, asyncio.TimeoutError) as error:
        raise EngineGone from error


def _refuse_unready(engine: Engine) -> NoReturn:
    if engine.state == "failed":
        raise ApiError(
            503, f"The engine of {engine.name} has failed, and was given up; the server's log says why.", SERVER,
            code="engine_failed",
        )  # fmt: skip
    word = "loading" if engine.state == "loading" else "restarting"
    raise ApiError(
        503, f"{engine.name} is {word}; try again soon.", SERVER, code=f"engine_{word}", retry_after=RETRY_SECONDS
    )
