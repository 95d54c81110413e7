"""The side of `localmix worker` that the network sees: it takes connections, and passes one at a time on.

ggml-rpc-server listens behind it, on loopback. By itself it knows IPv4 alone, leaves a second client waiting without
a word, waits for ever for a client whose machine is gone, and says of the processor's memory that all of it is free.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from localmix.capacity import memory
from localmix.distribution import protocol
from localmix.distribution.protocol import Endpoint
from localmix.distribution.rpc_server import PROGRAM, RpcServer
from localmix.errors import FileError, InputError, NetworkError, UsageError

_PIECE_BYTES = 2**18
_SILENT = 32  # connections that have not greeted, and that watch; one more of either, and the oldest has to go
_GREETING_BYTES = 256  # of whatever version
_LARGE_BYTES = 64 * 2**20  # a message that there may not be memory for
_TURN_SECONDS = 2.0  # a client's next process comes before the end of the one before is seen
_BUSY_SECONDS = 1.0
_UNREAD_MILLISECONDS = 10000
# before each new start of a server that crashed
_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)
_STEADY_SECONDS = 600.0  # one that lived so long starts counting anew
_ALLOC_BUFFER, _DEVICE_BYTES = 0, 4
_WATCH = protocol.HEADER.pack(protocol.WATCH, 0)


@dataclass(frozen=True)
class Came:
    """A client begins to load a model; one that only asks what there is does not count."""

    client: str


@dataclass(frozen=True)
class Left:
    """A client is gone, and what it had loaded too.

    Attributes:
        received, sent: bytes from the client, and to it.
        reason: why, if the client did not end it itself.
    """

    client: str
    seconds: float
    received: int
    sent: int
    reason: str = ""


@dataclass(frozen=True)
class Refused:
    """A client came while another one was served."""

    client: str


@dataclass(frozen=True)
class Restarted:
    """ggml-rpc-server crashed, and was started again."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """ggml-rpc-server cannot be kept running."""

    error: InputError


Event = Came | Left | Refused | Restarted | Failed


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections at an address of this machine, of IPv4 or IPv6; port 0 for any free one.

    Raises:
        UsageError: there is no such address here.
        FileError: another program listens there, or the system forbids it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=_SILENT)
    except socket.gaierror as error:
        raise UsageError(f"There is no address {host!r}.", "Name one of this machine's with --host.") from error
    except OSError as error:
        endpoint = Endpoint(host, port)
        if isinstance(error, PermissionError):
            raise FileError(
                f"The system does not let this user listen at {endpoint}.", "Use a port >= 1024."
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise FileError(f"{endpoint} is taken by another program.", "Choose another --port.") from error
        raise UsageError(f"{host} is no address of this machine.", "Name another one with --host.") from error


class Front:
    """Serves clients, one at a time, until it is closed; a context manager.

    Args:
        listener: from `listen`.
        server: what computes, started; it is started again when it crashes.
        offered: most bytes of each device that clients are told of; None for what is free.
        tell: called with each event, from several threads.
    """

    def __init__(
        self, listener: socket.socket, server: RpcServer, offered: int | None, tell: Callable[[Event], None]
    ) -> None:
        self._listener = listener
        self._server = server
        self._offered = offered
        self._tell = tell
        self._turn = threading.Lock()
        # the oldest first
        self._silent: dict[socket.socket, None] = {}
        self._watching: dict[socket.socket, None] = {}
        self._lock = threading.Lock()  # of these two
        self._closed = threading.Event()

    def __enter__(self) -> Front:
        for job in (self._accept, self._keep_alive):
            threading.Thread(target=job, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):  # else the system keeps the port while a thread waits there
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, or a client that was gone already
                time.sleep(0.01)
                continue
            client = str(address[0]).removeprefix("::ffff:")
            self._keep(connection, self._silent)
            threading.Thread(target=self._meet, args=(connection, client), daemon=True).start()

    def _keep(self, connection: socket.socket, kept: dict[socket.socket, None]) -> None:
        """Count a connection among others of its kind, of which the oldest ends if they are too many."""
        with self._lock:
            if len(kept) >= _SILENT:
                oldest = next(iter(kept))
                del kept[oldest]
                _shut(oldest)
            kept[connection] = None

    def _meet(self, connection: socket.socket, client: str) -> None:
        with contextlib.closing(connection), contextlib.suppress(OSError):
            try:
                protocol.keep_alive(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client reads at once what it asked for
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MILLISECONDS)
                greeting = _read_greeting(connection)
            finally:
                with self._lock:
                    self._silent.pop(connection, None)
            if greeting == _WATCH:
                self._beat(connection)
                return
            if not greeting:
                return
            if not self._turn.acquire(timeout=_TURN_SECONDS):
                self._tell(Refused(client))
                _say_busy(connection)
                return
            try:
                _Visit(connection, client, self._server, self._free, self._tell).run(greeting)
            finally:
                self._turn.release()

    def _beat(self, connection: socket.socket) -> None:
        """Tell a client that this worker runs, each time that it asks, until it is gone."""
        connection.settimeout(None)
        self._keep(connection, self._watching)
        worked = None
        try:
            while True:
                # not one that is let go on now and then, so that it takes less of the machine
                before, (stopped, worked) = worked, self._server.activity()
                connection.sendall(protocol.STOPPED if stopped and worked == before else protocol.RUNS)
                if not connection.recv(1):
                    return
        finally:
            with self._lock:
                self._watching.pop(connection, None)

    def _free(self, device: int, free: int) -> int:
        """What a client is told of a device's free memory."""
        if device < len(self._server.devices) and self._server.devices[device].is_processor:
            free = min(free, memory.available().bytes)
        return free if self._offered is None else min(free, self._offered)

    def _keep_alive(self) -> None:
        """Start the server again when it crashed."""
        attempt, started = 0, time.monotonic()
        while not self._closed.wait(0.2):
            if self._server.alive:
                continue
            reason = self._server.words()
            if time.monotonic() - started > _STEADY_SECONDS:
                attempt = 0
            if attempt == len(_PAUSES):
                self._tell(Failed(InputError(f"{PROGRAM} crashes again and again: {reason}.")))
                return
            if self._closed.wait(_PAUSES[attempt]):
                return
            attempt += 1
            try:
                with self._turn:  # who was served sees the old one end first
                    self._server.stop()
                    self._server.start()
            except InputError as error:
                self._tell(Failed(error))
                return
            started = time.monotonic()
            self._tell(Restarted(reason))


class _Visit:
    """A client that is served."""

    def __init__(
        self,
        client: socket.socket,
        name: str,
        server: RpcServer,
        free: Callable[[int, int], int],
        tell: Callable[[Event], None],
    ) -> None:
        self._client = client
        self._name = name
        self._server = server
        self._free = free
        self._tell = tell
        self._requests = _Requests()
        self._sent = 0
        self._left = False
        self._reason = ""

    def run(self, greeting: bytes) -> None:
        """Pass on what comes from both sides, the client's greeting first, until one of them ends."""
        started = time.monotonic()
        try:
            connection = protocol.connect(self._server.endpoint)
        except NetworkError:  # it has just crashed; the client sees this connection end
            return
        with contextlib.closing(connection) as server:
            answers = threading.Thread(target=self._pass_answers, args=(server,), daemon=True)
            answers.start()
            self._pass_requests(server, greeting)
            self._left = True
            self._end(server)
            answers.join()
        if self._requests.loads:
            seconds = time.monotonic() - started
            self._tell(Left(self._name, seconds, self._requests.bytes, self._sent, self._reason))

    def _pass_requests(self, server: socket.socket, greeting: bytes) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        buffer[: len(greeting)] = greeting
        count = len(greeting)
        told = False
        while count:
            try:
                self._requests.read(buffer[:count])
            except _TooLargeError as error:
                self._reason = str(error)
                return
            if self._requests.loads and not told:
                told = True
                self._tell(Came(self._name))
            try:
                server.sendall(buffer[:count])
            except OSError:
                return
            try:
                count = self._client.recv_into(buffer)
            except OSError as error:
                self._lose(error)
                return

    def _pass_answers(self, server: socket.socket) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with contextlib.suppress(OSError):
            while count := server.recv_into(buffer):
                piece = bytearray(buffer[:count])
                if self._requests.asked is not None:
                    device, self._requests.asked = self._requests.asked, None
                    piece = self._correct(device, piece, server)
                try:
                    self._client.sendall(piece)
                except OSError as error:
                    self._left = True
                    self._lose(error)
                    break
                self._sent += len(piece)
        if not self._left and not self._reason:
            self._reason = f"{PROGRAM} crashed" if self._server.ends() else f"{PROGRAM} did not understand it"
        self._end(server)

    def _correct(self, device: int, answer: bytearray, server: socket.socket) -> bytearray:
        """The answer about a device's memory, with what is really free."""
        whole = protocol.SIZE.size + protocol.MEMORY.size
        while len(answer) < whole and (more := server.recv(whole - len(answer))):
            answer += more
        (size,) = protocol.SIZE.unpack_from(answer)
        if size == protocol.MEMORY.size and len(answer) == whole:
            free, total = protocol.MEMORY.unpack_from(answer, protocol.SIZE.size)
            protocol.MEMORY.pack_into(answer, protocol.SIZE.size, self._free(device, free), total)
        return answer

    def _lose(self, error: OSError) -> None:
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):  # a client that died
            return
        silent = isinstance(error, TimeoutError)
        words = "its machine does not answer any more" if silent else (error.strerror or str(error)).lower()
        self._reason = self._reason or words

    def _end(self, server: socket.socket) -> None:
        for connection in (self._client, server):
            _shut(connection)


class _TooLargeError(Exception):
    """A message for which ggml-rpc-server would take more memory than there is; it takes it at once, and fills it."""


class _Requests:
    """Follows the requests of a client: where one ends, and what matters of it.

    Attributes:
        bytes: how many came.
        loads: whether it takes memory for a model.
        asked: the device whose memory was asked for and not yet told. A client waits for an answer before it asks
            on, so the next bytes to it are that answer.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.loads = False
        self.asked: int | None = None
        self._head = bytearray()
        self._left = 0

    def read(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            _TooLargeError: a message begins that there is no memory for.
        """
        self.bytes += len(data)
        place = 0
        while place < len(data):
            if self._left:
                step = min(self._left, len(data) - place)
                self._left -= step
                place += step
                continue
            # of a question about memory the device is read too
            wanted = protocol.HEADER.size
            if len(self._head) >= wanted:
                wanted += _DEVICE_BYTES
            step = min(wanted - len(self._head), len(data) - place)
            self._head += data[place : place + step]
            place += step
            if len(self._head) == wanted:
                self._understand()

    def _understand(self) -> None:
        command, size = protocol.HEADER.unpack_from(self._head)
        if command == protocol.DEVICE_MEMORY and size == _DEVICE_BYTES:
            if len(self._head) == protocol.HEADER.size:
                return
            self.asked = int.from_bytes(self._head[protocol.HEADER.size :], "little")
            size = 0
        elif command == _ALLOC_BUFFER:
            self.loads = True
        if size > _LARGE_BYTES and size > (free := memory.available().bytes):
            raise _TooLargeError(f"it announced a message of {size} bytes, and {free} are free")
        self._left = size
        self._head.clear()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _read_greeting(connection: socket.socket) -> bytes:
    """What a client says first; nothing, if it leaves or does not speak this protocol."""
    # older clients see by a connection on which nothing comes that this machine is there
    first = connection.recv(1)
    end = time.monotonic() + protocol.PATIENCE_SECONDS
    head = first + protocol.receive(connection, protocol.HEADER.size - len(first), end) if first else b""
    if len(head) < protocol.HEADER.size:
        return b""
    command, size = protocol.HEADER.unpack(head)
    if head == _WATCH:
        return head
    if command != protocol.HELLO or size > _GREETING_BYTES:
        return b""
    rest = protocol.receive(connection, size, end)
    connection.settimeout(None)
    return head + rest if len(rest) == size else b""


def _say_busy(connection: socket.socket) -> None:
    """Answer a greeting with a version that no client takes, which ours knows the meaning of."""
    connection.settimeout(_BUSY_SECONDS)
    answer = protocol.GREETING.pack(*protocol.BUSY, 0, bytes(protocol.HELLO_BYTES))
    connection.sendall(protocol.SIZE.pack(len(answer)) + answer)
    connection.shutdown(socket.SHUT_WR)
    end = time.monotonic() + _BUSY_SECONDS
    while time.monotonic() < end and connection.recv(4096):  # else what it still sends would throw our answer away
        pass
