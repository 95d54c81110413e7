"""What ggml-rpc-server is asked before llama.cpp talks to it: is it there, does it fit, what memory has it.

llama.cpp's own client aborts where a server is absent or of another version, and waits for ever where one hangs.
Here each step has a deadline, and each failure is a sentence. A request is `| command 1 | size 8 | data |`, an answer
`| size 8 | data |`, little-endian; see ggml-rpc.cpp.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from localmix.errors import NetworkError, UsageError

DEFAULT_PORT = 50052  # ggml-rpc-server's
PATIENCE_SECONDS = 5.0  # for each step of talking to a worker that nobody else uses

# ggml-rpc.h: an engine takes a server of the same major version, and of no later minor one
VERSION = (7, 0)
HELLO, DEVICE_COUNT, DEVICE_MEMORY = 14, 15, 11
HEADER = struct.Struct("<BQ")
SIZE = struct.Struct("<Q")
HELLO_BYTES = 24  # of what a client can do beyond TCP: nothing
GREETING = struct.Struct("<4B24s")
MEMORY = struct.Struct("<QQ")
# what `localmix worker` answers to a second client: a version that no llama.cpp has, so that each refuses it
BUSY = (0, 0, 1)
# No command of llama.cpp's. `localmix worker` answers it, and each byte that follows, with a byte that says how the
# ggml-rpc-server behind it fares. Older ones end the connection, and ggml-rpc-server leaves it in its queue.
WATCH = 255
AGAIN = b"?"
RUNS, STOPPED = b"r", b"s"

_MOST_DEVICES = 64

# Of a connection on which nothing comes: probed after so many seconds, each second, and given up after so many probes.
_IDLE, _INTERVAL, _PROBES = 2, 1, 4


@dataclass(frozen=True)
class Endpoint:
    """Where a worker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device of a worker, as the worker reports them."""

    free: int
    total: int


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """`HOST:PORT,[::1]:PORT,HOST`; without a port ggml-rpc-server's usual one.

    Raises:
        UsageError: one is no such thing, or is there twice.
    """
    found: list[Endpoint] = []
    for word in text.split(","):
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/@]+))(?::(\d{1,5}))?", word.strip())
        port = int(match[3] or DEFAULT_PORT) if match else 0
        if match is None or not 0 < port < 65536:
            raise UsageError(
                f"{word.strip()!r} is no address of a worker.",
                f"Write HOST:PORT, such as 192.168.1.20:{DEFAULT_PORT} or [fe80::1]:{DEFAULT_PORT}.",
            )
        endpoint = Endpoint(match[1] or match[2], port)
        if endpoint in found:
            raise UsageError(f"The worker {endpoint} is named twice.")
        found.append(endpoint)
    return tuple(found)


def connect(endpoint: Endpoint, seconds: float = PATIENCE_SECONDS) -> socket.socket:
    """A TCP connection to a worker, probed by the system (`keep_alive`).

    Raises:
        NetworkError: there is none to be had in time.
    """
    try:
        connection = socket.create_connection((endpoint.host, endpoint.port), timeout=seconds)
    except OSError as error:
        raise _unreachable(endpoint, error) from error
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(connection)
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Have the system probe an idle connection, and end it when the other machine does not answer for 6 seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # the first is called otherwise on macOS
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    interval, probes = (getattr(socket, name, None) for name in ("TCP_KEEPINTVL", "TCP_KEEPCNT"))
    for option, value in ((idle, _IDLE), (interval, _INTERVAL), (probes, _PROBES)):
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def devices_of(endpoint: Endpoint) -> tuple[DeviceMemory, ...]:
    """The devices that a worker computes on.

    Raises:
        NetworkError: it does not answer, is busy, or speaks another version of the protocol.
    """
    with visit(endpoint) as devices:
        return devices


@contextlib.contextmanager
def visit(endpoint: Endpoint) -> Iterator[tuple[DeviceMemory, ...]]:
    """As `devices_of`, and nobody else gets to the worker before this ends."""
    with contextlib.closing(connect(endpoint)) as connection:
        talk = _Talk(endpoint, connection)
        talk.greet()
        (count,) = struct.unpack("<I", talk.ask(DEVICE_COUNT, b"", 4))
        if not 0 < count <= _MOST_DEVICES:
            raise NetworkError(f"The worker {endpoint} says that it has {count} devices.", "Is it ggml-rpc-server?")
        yield tuple(
            DeviceMemory(*MEMORY.unpack(talk.ask(DEVICE_MEMORY, struct.pack("<I", number), MEMORY.size)))
            for number in range(count)
        )


class _Talk:
    """Questions and answers over one connection, each within the deadline."""

    def __init__(self, endpoint: Endpoint, connection: socket.socket) -> None:
        self._endpoint = endpoint
        self._connection = connection

    def greet(self) -> None:
        """Agree on the version; the server listens to nothing else before."""
        answer = self.ask(HELLO, bytes(HELLO_BYTES), GREETING.size)
        version = GREETING.unpack(answer)[:3]
        if version == BUSY:
            raise NetworkError(
                f"The worker {self._endpoint} is busy: it serves another client.",
                "It serves one at a time. Two names of one worker count as two clients.",
            )
        if version[0] != VERSION[0] or version[1] > VERSION[1]:
            raise NetworkError(
                f"The worker {self._endpoint} speaks version {'.'.join(map(str, version))} of llama.cpp's RPC protocol,"
                f" and this engine {'.'.join(map(str, VERSION))}.",
                "Install the same localmix on both machines.",
            )

    def ask(self, command: int, data: bytes, size: int) -> bytes:
        """The answer to a command, of `size` bytes."""
        end = time.monotonic() + PATIENCE_SECONDS
        try:
            self._connection.settimeout(PATIENCE_SECONDS)
            self._connection.sendall(HEADER.pack(command, len(data)) + data)
            (announced,) = SIZE.unpack(self._read(SIZE.size, end))
            if announced == size:
                return self._read(size, end)
        except TimeoutError as error:
            raise silent(self._endpoint) from error
        except OSError as error:
            raise _unreachable(self._endpoint, error) from error
        raise _stranger(self._endpoint)

    def _read(self, size: int, end: float) -> bytes:
        found = receive(self._connection, size, end)
        if len(found) < size:
            raise _stranger(self._endpoint)
        return found


def receive(connection: socket.socket, size: int, end: float) -> bytes:
    """So many bytes from the other side, fewer if it says no more; the connection keeps a timeout.

    Args:
        end: of `time.monotonic()`.

    Raises:
        TimeoutError: they have not come by then.
        OSError: the connection failed.
    """
    found = b""
    while len(found) < size:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(size - len(found))
        if not piece:
            break
        found += piece
    return found


def silent(endpoint: Endpoint) -> NetworkError:
    """The error for a worker that takes a connection and says nothing."""
    return NetworkError(
        f"The worker {endpoint} does not answer within {PATIENCE_SECONDS:g} seconds.",
        "It serves one client at a time: is another one using it?",
    )


def _stranger(endpoint: Endpoint) -> NetworkError:
    return NetworkError(
        f"What listens at {endpoint} does not speak this version of llama.cpp's RPC protocol.",
        "Start `localmix worker` there, of the same version as here.",
    )


def _unreachable(endpoint: Endpoint, error: OSError) -> NetworkError:
    start = f"Start one on that machine: `localmix worker --port {endpoint.port}`."
    if isinstance(error, socket.gaierror):
        return NetworkError(f"There is no machine of the name {endpoint.host}.", "Check the name given with --rpc.")
    if isinstance(error, ConnectionRefusedError):
        return NetworkError(f"No worker listens at {endpoint}.", start)
    if isinstance(error, TimeoutError):
        return NetworkError(
            f"The worker {endpoint} cannot be reached within {PATIENCE_SECONDS:g} seconds.",
            "Is the machine on, and does a firewall let the port through?",
        )
    return NetworkError(f"The worker {endpoint} cannot be reached: {(error.strerror or str(error)).lower()}.", start)
