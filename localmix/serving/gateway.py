"""The only door to the engines: an HTTP server that judges every request before a llama-server sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from localmix.serving.policy import Policy

EngineState = Literal["loading", "ready", "restarting", "failed"]


@dataclass(frozen=True)
class EngineAddress:
    """Where a llama-server listens: a Unix socket, or (where there are none) a port of the loopback with a key."""

    socket: Path | None = None
    port: int = 0
    key: str = ""


class Engine(Protocol):
    """What the gateway has to know of a running llama-server."""

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


@dataclass(frozen=True)
class Access:
    """A request that was answered, or not: never its text nor a key.

    Attributes:
        path: without the query, cut to 200 characters.
        status: of the answer; 0 where the client left before there was one.
        model: the engine it went to, empty where it went to none.
        end: how it ended.
    """

    client: str
    method: str
    path: str
    status: int
    milliseconds: float
    bytes_in: int
    bytes_out: int
    model: str
    end: Literal["done", "client left", "client stalled", "engine lost", "cut"]


class Gateway:
    """Listens for clients and carries their requests to the engines.

    Args:
        engines: the models, the first of which answers where a request names none.
        policy: the rules.
        log: gets a record of every request.
    """

    def __init__(self, engines: Sequence[Engine], policy: Policy, log: Callable[[Access], None]) -> None:
        self._engines = engines
        self._policy = policy
        self._log = log

    async def start(self) -> tuple[str, int]:
        """Listen, and return the address and port.

        Raises:
            UsageError: the port is taken, or the address is none of this machine's.
        """
        raise NotImplementedError

    async def drain(self, seconds: float) -> int:
        """Accept nothing more, and let what is running end; returns how many requests had to be cut."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Cut what is running and close; harmless when it never started."""
        raise NotImplementedError
