"""Streams of engines that stutter, lie, flood and break off, and clients that read late or never."""

from __future__ import annotations

import asyncio
import itertools
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from localmix.serving.connection import UNSENT_BYTES, Connection
from localmix.serving.engine_client import EngineAddress, EngineState
from localmix.serving.piping import Pipe
from localmix.serving.policy import Policy
from tests.gateways import Front, events, post, read_all, running_gateway

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"content": "' + "苹".encode() * 20 + b'"}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"0\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
ASKED = post("/v1/completions", {"prompt": "a", "stream": True})


@dataclass
class Scripted:
    """An engine that does what a test says with each connection, once a request has come on it."""

    address: EngineAddress
    act: Callable[[socket.socket], None]
    name: str = "scripted:F32"
    state: EngineState = "ready"
    failure: str | None = None
    embeddings: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    sent: int = 0

    def flood(self, client: socket.socket) -> None:
        """Send events as fast as they are taken, until nobody takes them any more."""
        try:
            client.sendall(HEAD)
            while True:
                client.sendall(CHUNK * 100)
                self.sent += len(CHUNK) * 100
        except OSError:
            self.left.set()

    def drip(self, client: socket.socket) -> None:
        """Send an event now and then, until the other side has gone."""
        try:
            client.sendall(HEAD)
            while True:
                client.sendall(CHUNK)
                time.sleep(0.02)
        except OSError:
            self.left.set()

    def wait_until_blocked(self) -> int:
        """Until nothing more is taken; how much was."""
        deadline = time.monotonic() + 20
        before = -1
        while before != self.sent or not self.sent:
            assert time.monotonic() < deadline
            before = self.sent
            time.sleep(0.3)
        return self.sent


@contextmanager
def running(
    act: Callable[[socket.socket], None] | str, policy: Policy | None = None
) -> Iterator[tuple[Front, Scripted]]:
    """A gateway before a scripted engine; the name of one of its methods may stand for what it does."""
    with tempfile.TemporaryDirectory(prefix="lm") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "engine.sock")
        listener.bind(str(path))
        listener.listen()
        engine = Scripted(EngineAddress(path), lambda client: None)
        engine.act = getattr(engine, act) if isinstance(act, str) else act

        def serve(client: socket.socket) -> None:
            with client:
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += client.recv(65536)
                engine.act(client)

        def accept() -> None:
            try:
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        try:
            with running_gateway([engine], policy or Policy(port=0)) as front:
                yield front, engine
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def body_of(raw: bytes) -> bytes:
    """The body of a chunked answer, which has to be whole."""
    rest, body = raw.partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            assert rest == b"\r\n"
            return body
        body, rest = body + rest[:length], rest[length + 2 :]


def read_stream(client: socket.socket) -> bytes:
    """An answer on a connection that stays open."""
    raw = b""
    while not raw.endswith(LAST):
        piece = client.recv(65536)
        assert piece, raw
        raw += piece
    return raw


def fill(front: Front, engine: socket.socket) -> Connection:
    """Stream to the only client, which does not read, until its buffer is nearly full."""
    assert front.gateway._server is not None
    (connection,) = front.gateway._server.connections
    assert isinstance(connection, Connection) and connection.transport is not None
    sent = 0
    while connection.transport.get_write_buffer_size() < UNSENT_BYTES - 3000:
        engine.sendall(CHUNK * 10)
        sent += 10 * len(EVENT)
        while not isinstance(connection.follower, Pipe) or connection.follower.size < sent:
            time.sleep(0.0002)
    return connection


def wait_for_end(front: Front) -> str:
    """How the first request ended."""
    deadline = time.monotonic() + 10
    while not front.records:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return front.records[0].end


@pytest.mark.parametrize("size", [1, 5, len(CHUNK) + 1, 10**6])
def test_a_stream_is_the_same_however_it_was_cut(size: int) -> None:
    whole = HEAD + CHUNK * 5 + LAST

    def stutter(client: socket.socket) -> None:
        for place in range(0, len(whole), size):
            client.sendall(whole[place : place + size])
            time.sleep(0.0002)

    with running(stutter) as (front, _), front.open() as client:
        for _ in range(2):  # the connection goes on to serve
            client.sendall(ASKED)
            assert body_of(read_stream(client)) == EVENT * 5
        client.sendall(HEALTH)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert wait_for_end(front) == "done" and front.records[0].bytes_out == 5 * len(EVENT)


def test_requests_sent_ahead_wait_for_the_end_of_a_stream() -> None:
    def reply(client: socket.socket) -> None:
        client.sendall(HEAD + CHUNK)
        time.sleep(0.2)
        client.sendall(CHUNK + LAST)

    with running(reply) as (front, _), front.open() as client:
        client.sendall(ASKED + ASKED + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        first, second, third = read_all(client).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert body_of(first) == body_of(second) == EVENT * 2
        assert third.endswith(b'{"status": "ok"}')


def test_an_old_client_gets_a_stream_without_chunks() -> None:
    with running(lambda client: client.sendall(HEAD + CHUNK * 3 + LAST)) as (front, _):
        raw = front.send(ASKED.replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200") and b"chunked" not in head.lower()
        assert body == EVENT * 3


def test_the_end_of_a_stream_without_chunks_is_that_of_its_connection() -> None:
    with running(lambda client: client.sendall(HEAD + CHUNK + LAST)) as (front, _):
        kept = b" HTTP/1.0\r\nConnection: keep-alive"
        assert front.send(ASKED.replace(b" HTTP/1.1", kept)).endswith(EVENT)


def test_only_who_knows_of_it_is_told_to_go_on() -> None:
    with running(lambda client: client.sendall(HEAD + CHUNK + LAST)) as (front, _), front.open() as client:
        expecting = ASKED.replace(b"\r\n", b"\r\nExpect: 100-continue\r\n", 1)
        assert front.send(expecting.replace(b"HTTP/1.1", b"HTTP/1.0")).startswith(b"HTTP/1.0 200 OK\r\n")
        head, _, body = expecting.partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert body_of(read_stream(client)) == EVENT


@pytest.mark.parametrize(
    "end", [b"", b"0\r\n", b"5\r\nda", b"data: no size\n\n", b"123456789\r\n"], ids=["", "0", "part", "none", "large"]
)
def test_a_stream_without_its_end_ends_with_an_error(end: bytes) -> None:
    with running(lambda client: client.sendall(HEAD + CHUNK + end)) as (front, _), front.open() as client:
        client.sendall(ASKED)
        body = body_of(read_stream(client))
        assert body.startswith(EVENT)
        assert events(body)[-1]["error"]["code"] == "engine_unavailable"
        client.sendall(HEALTH)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert wait_for_end(front) == "engine lost"


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"nonsense\r\n\r\n", b"a" * 100_000])
def test_an_engine_that_gives_no_answer_is_told(raw: bytes) -> None:
    with running(lambda client: client.sendall(raw)) as (front, _):
        answer = front.ask("POST", "/v1/completions", {"prompt": "a", "stream": True})
        assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
        assert wait_for_end(front) == "engine lost"


def test_a_refusal_in_place_of_a_stream_is_told() -> None:
    refusal = b'{"error": {"message": "no room", "type": "unavailable_error"}}'
    head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(refusal)
    with running(lambda client: client.sendall(head + refusal)) as (front, _):
        answer = front.ask("POST", "/v1/completions", {"prompt": "a", "stream": True})
        assert (answer.status, answer.error["message"]) == (503, "no room")


def test_an_engine_waits_for_a_client_that_reads_late() -> None:
    with running("flood") as (front, engine), front.open() as client:
        client.sendall(ASKED)
        taken = engine.wait_until_blocked()
        assert taken < 8 << 20  # what the kernel and the gateway hold at most
        raw = b""
        while len(raw) < taken + (1 << 20):
            raw += client.recv(1 << 20)
        found = raw.partition(b"\r\n\r\n")[2]
        assert found.replace(b"\r\n", b"").count(EVENT) > taken // len(CHUNK)
        assert engine.sent > taken and not front.records


@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_without_reading_frees_the_engine_at_once(half: bool) -> None:
    with running("flood") as (front, engine), front.open() as client:
        client.sendall(ASKED)
        engine.wait_until_blocked()
        if half:
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        assert engine.left.wait(10)
        assert wait_for_end(front) == "client left"


def test_a_client_that_leaves_frees_an_engine_that_is_thinking() -> None:
    def think(client: socket.socket) -> None:
        client.sendall(HEAD + CHUNK)
        if client.recv(1) == b"":
            left.set()

    left = threading.Event()
    with running(think) as (front, _), front.open() as client:
        client.sendall(ASKED)
        assert client.recv(65536)
        client.close()
        assert left.wait(10)
        assert wait_for_end(front) == "client left"


def test_a_client_that_reads_nothing_is_dropped_in_time() -> None:
    with running("flood", Policy(port=0, stall_seconds=1.0)) as (front, engine), front.open() as client:
        client.sendall(ASKED)
        engine.wait_until_blocked()
        assert engine.left.wait(10)
        assert wait_for_end(front) == "client stalled"
        assert not read_all(client).endswith(LAST)


def test_a_client_that_reads_all_of_a_slow_stream_is_not_dropped() -> None:
    with running("drip", Policy(port=0, stall_seconds=0.2)) as (front, _), front.open() as client:
        client.sendall(ASKED)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert client.recv(65536)
        assert not front.records


def test_streams_one_after_the_other_wait_for_the_client_too() -> None:
    turns = itertools.count()
    seen: list[bool] = []

    def act(client: socket.socket) -> None:
        if next(turns):
            engine.flood(client)
            return
        client.sendall(HEAD)
        connection = fill(front, client)
        client.sendall(CHUNK * 50 + LAST)  # the last that is read fills the buffer
        wait_for_end(front)
        seen.append(connection.is_full)

    with running(act) as (front, engine), front.open() as client:
        client.sendall(ASKED + ASKED)
        assert engine.wait_until_blocked() < 4 << 20
        assert seen == [True]
        read = 0
        while read < 6 << 20:
            piece = client.recv(1 << 20)
            assert piece
            read += len(piece)


def test_answers_behind_a_stream_that_nobody_reads_wait_too() -> None:
    def act(client: socket.socket) -> None:
        client.sendall(HEAD)
        filled.append(fill(front, client))
        client.sendall(CHUNK * 50 + LAST)

    filled: list[Connection] = []
    with running(act) as (front, _), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # else the system lets it grow
        client.connect((front.host, front.port))
        client.sendall(ASKED)
        assert wait_for_end(front) == "done"
        client.settimeout(1)
        with pytest.raises(TimeoutError):  # they are not even taken
            while len(front.records) < 10_000:
                client.sendall(HEALTH * 10)
        (transport,) = (connection.transport for connection in filled)
        assert transport is not None and transport.get_write_buffer_size() < 2 * UNSENT_BYTES


def test_a_request_whose_body_is_on_its_way_is_answered_before_the_end_of_the_server() -> None:
    with running(lambda client: client.sendall(HEAD + CHUNK + LAST)) as (front, _), front.open() as client:
        client.sendall(ASKED[:-5])
        assert front.gateway._server is not None
        deadline = time.monotonic() + 10
        while not front.gateway._running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        drain = asyncio.run_coroutine_threadsafe(front.gateway.drain(20), front.loop)
        time.sleep(0.2)
        client.sendall(ASKED[-5:])
        raw = read_all(client)
        assert body_of(raw) == EVENT and b"\r\nConnection: close\r\n" in raw
        assert drain.result(10) == 0


def test_a_stream_that_ends_after_the_server_began_to_end_takes_its_connection_along() -> None:
    def reply(client: socket.socket) -> None:
        client.sendall(HEAD + CHUNK)
        draining.wait(10)
        client.sendall(CHUNK + LAST)

    draining = threading.Event()
    with running(reply) as (front, _), front.open() as client:
        client.sendall(ASKED + HEALTH)
        first = client.recv(65536)
        drain = asyncio.run_coroutine_threadsafe(front.gateway.drain(20), front.loop)
        front.run(asyncio.sleep(0))
        draining.set()
        raw = first + read_all(client)
        assert body_of(raw) == EVENT * 2  # and nothing behind it
        assert drain.result(10) == 0


def test_streams_leave_nothing_behind_however_they_end() -> None:
    turns = itertools.count()

    def act(client: socket.socket) -> None:
        ending = (LAST, b"", b"nonsense\r\n")[next(turns) % 3]
        client.sendall(HEAD + CHUNK + ending)

    async def left_behind() -> tuple[set[asyncio.Task[Any]], list[asyncio.TimerHandle]]:
        loop: Any = asyncio.get_running_loop()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return tasks, [timer for timer in loop._scheduled if not timer.cancelled()]

    with running(act) as (front, _):
        assert front.gateway._server is not None
        with front.open() as client:
            for _ in range(6):
                client.sendall(ASKED)
                read_stream(client)
            (connection,) = front.gateway._server.connections
            assert isinstance(connection, Connection) and connection.follower is None
        for _ in range(6):
            with front.open() as client:
                client.sendall(ASKED)
                client.recv(1)
        deadline = time.monotonic() + 10
        while front.gateway._server.connections or front.run(left_behind()) != (set(), []):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_an_engine_that_is_slow_to_accept_is_waited_for() -> None:
    with tempfile.TemporaryDirectory(prefix="lm") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "engine.sock")
        listener.bind(str(path))
        listener.listen(0)
        engine = Scripted(EngineAddress(path), lambda client: None)
        with running_gateway([engine], Policy(port=0)) as front:
            clients = [front.open() for _ in range(4)]
            for client in clients:
                client.sendall(ASKED)
            time.sleep(0.5)
            assert not front.records
            for _ in clients:
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.recv(65536)
                    accepted.sendall(HEAD + CHUNK + LAST)
            for client in clients:
                assert body_of(read_stream(client)) == EVENT
                client.close()


def test_the_end_of_the_server_waits_till_an_answer_is_read() -> None:
    size = 8 << 20  # more than the system holds
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size
    with running(lambda client: client.sendall(head + b"\xff" * size)) as (front, _), front.open() as client:
        client.sendall(ASKED)
        assert wait_for_end(front) == "done"
        drain = asyncio.run_coroutine_threadsafe(front.gateway.drain(20), front.loop)
        time.sleep(0.3)
        assert not drain.done()
        assert read_all(client).count(b"\xff") == size
        assert drain.result(2) == 0


def test_the_end_of_the_server_does_not_wait_for_a_client_that_does_not_read() -> None:
    with running("flood") as (front, engine), front.open() as client:
        client.sendall(ASKED)
        engine.wait_until_blocked()
        began = time.monotonic()
        assert front.run(front.gateway.drain(0.2)) == 1
        assert engine.left.wait(2) and time.monotonic() - began < 1.5
        assert wait_for_end(front) == "cut"
        assert b"shutting_down" in read_all(client)
