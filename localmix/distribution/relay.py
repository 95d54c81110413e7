"""The way from llama.cpp to the workers: a child process that passes bytes on and notices when a worker is gone.

llama.cpp's connections have no deadlines: cut off from a server it waits for ever, it dies without a word when the
server does, and it knows neither IPv6 nor a second address of a name. So llama.cpp only talks to this child, on
loopback, and this child talks to the workers. A worker is lost when it closes the connection, or when its machine
no longer answers the system's probes. Those cannot see a machine that is gone while data is on its way to it, and a
limit on unanswered data would give up a worker that computes and therefore does not read. So beside each connection
there is a second one. `localmix worker` is asked there each second whether it runs, and lost when it falls silent,
as one that is stopped does while its machine answers; in the queue of any other server the connection is only probed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from localmix.distribution import protocol
from localmix.distribution.protocol import Endpoint
from localmix.errors import NetworkError
from localmix.worker import Channel

_PIECE_BYTES = 2**18
_RETRY_SECONDS = 1.0
_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 8.0
_STOPPED_BEATS = 5  # a stop that lasts no longer is none


@dataclass(frozen=True)
class Listening:
    """The relay is ready: the loopback ports that stand for the workers, in their order."""

    ports: tuple[int, ...]


@dataclass(frozen=True)
class Reached:
    """A worker answers llama.cpp."""

    endpoint: Endpoint


@dataclass(frozen=True)
class Lost:
    """A worker is gone while llama.cpp uses it."""

    endpoint: Endpoint
    error: NetworkError


def relay(channel: Channel, endpoints: Sequence[Endpoint]) -> None:
    """The child's job: connect whoever comes to a port of `Listening` with its worker, until the parent ends it."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in endpoints]
    for endpoint, listener in zip(endpoints, listeners, strict=True):
        threading.Thread(target=_accept, args=(channel, endpoint, listener), daemon=True).start()
    channel.emit(Listening(tuple(listener.getsockname()[1] for listener in listeners)))
    channel.receive()


def _accept(channel: Channel, endpoint: Endpoint, listener: socket.socket) -> None:
    while True:
        engine, _ = listener.accept()
        engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # one at a time, as a worker takes them
        _Passage(channel, endpoint, engine).run()


class _Passage:
    """One connection of llama.cpp's to a worker."""

    def __init__(self, channel: Channel, endpoint: Endpoint, engine: socket.socket) -> None:
        self._channel = channel
        self._endpoint = endpoint
        self._engine = engine
        self._watch: socket.socket | None = None
        self._worker: socket.socket | None = None
        self._beats: bool | None = None  # whether the worker knows what a beat is; None if that is not known
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Pass on what comes from both sides, until one of them ends."""
        with contextlib.closing(self._engine):
            try:
                worker = protocol.connect(self._endpoint)
            except NetworkError as error:
                self._lose(error)
                return
            with contextlib.closing(worker):
                self._worker = worker
                answers = threading.Thread(target=self._pass_answers, args=(worker,), daemon=True)
                answers.start()
                self._pass_requests(worker)
                answers.join()

    def _pass_requests(self, worker: socket.socket) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while True:
            try:
                count = self._engine.recv_into(buffer)
            except OSError:
                count = 0
            if not count:
                self._end()
                return
            try:
                worker.sendall(buffer[:count])
            except OSError as error:
                self._lose(_lost(self._endpoint, error))
                return

    def _pass_answers(self, worker: socket.socket) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        greeted = False
        worker.settimeout(protocol.PATIENCE_SECONDS)  # to be greeted; it takes its time for what comes later
        while True:
            try:
                count = worker.recv_into(buffer)
            except OSError as error:
                waited = isinstance(error, TimeoutError) and not greeted
                self._lose(protocol.silent(self._endpoint) if waited else _lost(self._endpoint, error))
                return
            if not count:
                self._lose(_lost(self._endpoint, None))
                return
            if not greeted:  # before, it may still have had another client
                greeted = True
                worker.settimeout(None)
                self._channel.emit(Reached(self._endpoint))
                threading.Thread(target=self._keep_watch, daemon=True).start()
            try:
                self._engine.sendall(buffer[:count])
            except OSError:
                self._end()
                return

    def _keep_watch(self) -> None:
        while not self._ended.is_set():
            # without a place in its queue the worker is only watched while nothing is on its way there
            with contextlib.suppress(NetworkError), contextlib.closing(protocol.connect(self._endpoint)) as watch:
                with self._lock:
                    self._watch = watch
                try:
                    if not self._ended.is_set():
                        self._listen(watch)
                except (ConnectionResetError, BrokenPipeError):  # the other connection will tell, if it means anything
                    pass
                except OSError as error:
                    self._lose(_lost(self._endpoint, error))
                finally:
                    with self._lock:
                        self._watch = None
            self._ended.wait(_RETRY_SECONDS)

    def _listen(self, watch: socket.socket) -> None:
        """Wait for the end of the second connection, or of the worker."""
        if self._beats is not False:
            watch.sendall(protocol.HEADER.pack(protocol.WATCH, 0))
        if self._beats:
            watch.settimeout(_SILENCE_SECONDS)
        stopped = 0
        while beat := watch.recv(1):
            self._beats = True
            stopped = stopped + 1 if beat == protocol.STOPPED else 0
            if stopped > _STOPPED_BEATS:
                self._lose(_lost(self._endpoint, "its ggml-rpc-server is stopped"))
            if self._ended.wait(_BEAT_SECONDS):
                return
            watch.settimeout(_SILENCE_SECONDS)
            watch.sendall(protocol.AGAIN)
        if self._beats is None:
            self._beats = False

    def _lose(self, error: NetworkError) -> None:
        # told before llama.cpp sees its connection end, which it does not survive
        self._end(Lost(self._endpoint, error))

    def _end(self, last: Lost | None = None) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            if last is not None:
                self._channel.emit(last)
            for connection in (self._engine, self._worker, self._watch):
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


def _lost(endpoint: Endpoint, error: OSError | str | None) -> NetworkError:
    """The error for a worker that is gone in the middle of its work; without a reason it said goodbye."""
    if isinstance(error, str):
        reason = error
    elif error is None or isinstance(error, (ConnectionResetError, BrokenPipeError)):
        reason = "it ended the connection"
    elif isinstance(error, TimeoutError):
        reason = "it does not answer any more"
    else:
        reason = (error.strerror or str(error)).lower()
    return NetworkError(
        f"The worker {endpoint} was lost: {reason}.", "Look after `localmix worker` on that machine, and run it again."
    )
