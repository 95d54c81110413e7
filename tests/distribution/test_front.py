"""What the network sees of a worker, with a real ggml-rpc-server behind it."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from localmix.distribution import front
from localmix.distribution.front import Event, Front, listen
from localmix.distribution.protocol import Endpoint, connect, devices_of
from localmix.distribution.rpc_server import RpcServer
from localmix.errors import FileError, NetworkError, UsageError
from tests.workers import require_rpc_server

MIB = 2**20


Fronted = tuple[Endpoint, RpcServer, "queue.Queue[Event]"]


@contextlib.contextmanager
def fronted(offered: int | None = None, host: str = "127.0.0.1") -> Iterator[Fronted]:
    events: queue.Queue[Event] = queue.Queue()
    with (
        RpcServer(require_rpc_server(), threads=1) as server,
        listen(host, 0) as listener,
        Front(listener, server, offered, events.put),
    ):
        yield Endpoint(host, listener.getsockname()[1]), server, events


GREETING = bytes([14]) + (24).to_bytes(8, "little") + bytes(24)


def allocate(connection: socket.socket, size: int) -> None:
    """Greet, and take memory, as a client does that loads a model."""
    connection.sendall(GREETING)
    assert len(connection.recv(36, socket.MSG_WAITALL)) == 36
    connection.sendall(bytes([0]) + (12).to_bytes(8, "little") + bytes(4) + size.to_bytes(8, "little"))
    assert len(connection.recv(24, socket.MSG_WAITALL)) == 24


def test_only_what_is_free_is_told_as_free() -> None:
    with fronted() as (endpoint, server, _):
        (behind,) = devices_of(server.endpoint)
        (told,) = devices_of(endpoint)
        assert behind.free == behind.total == told.total
        assert 0 < told.free <= psutil.virtual_memory().available + 512 * MIB < behind.free


def test_no_more_is_told_than_offered() -> None:
    with fronted(offered=100 * MIB) as (endpoint, _, _):
        assert devices_of(endpoint)[0].free == 100 * MIB


def test_nobody_listens_any_more_when_it_is_closed() -> None:
    with fronted() as (endpoint, _, _):
        pass
    with pytest.raises(NetworkError, match="No worker listens"):
        connect(endpoint)


def test_ipv6() -> None:
    try:
        with fronted(host="::1") as (endpoint, _, _):
            assert len(devices_of(endpoint)) == 1
    except UsageError:
        pytest.skip("this machine has no IPv6")


def test_one_client_at_a_time_and_the_next_when_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_TURN_SECONDS", 0.2)
    with fronted() as (endpoint, _, events):
        with connect(endpoint) as first:
            allocate(first, MIB)
            assert events.get(timeout=5) == front.Came("127.0.0.1")
            with pytest.raises(NetworkError, match="busy"):
                devices_of(endpoint)
            assert events.get(timeout=5) == front.Refused("127.0.0.1")
        left = events.get(timeout=5)
        assert isinstance(left, front.Left)
        # greeting 9 + 24, memory 9 + 12; answers 8 + 28 and 8 + 16
        assert (left.received, left.sent, left.reason) == (54, 60, "")
        assert len(devices_of(endpoint)) == 1
        assert events.empty()


def test_who_says_nothing_keeps_nobody_out() -> None:
    with fronted() as (endpoint, _, _):
        silent = [connect(endpoint) for _ in range(front._SILENT + 8)]
        assert len(devices_of(endpoint)) == 1
        # the oldest had to go, the youngest are there
        assert silent[0].recv(1) == b""
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)
        for connection in silent:
            connection.close()


def test_half_a_greeting_keeps_nobody_out() -> None:
    with fronted() as (endpoint, _, _), connect(endpoint) as client:
        client.sendall(GREETING[:20])
        assert len(devices_of(endpoint)) == 1
        client.sendall(GREETING[20:])
        assert len(client.recv(36, socket.MSG_WAITALL)) == 36


@pytest.mark.parametrize("size", [2**62, 2**42])
def test_a_message_that_no_memory_holds_is_not_begun(size: int) -> None:
    with fronted() as (endpoint, server, events), connect(endpoint) as client:
        process = server._process
        allocate(client, MIB)
        client.sendall(bytes([6]) + size.to_bytes(8, "little") + bytes(1000))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert events.get(timeout=5) == front.Came("127.0.0.1")
        left = events.get(timeout=5)
        assert isinstance(left, front.Left) and f"a message of {size} bytes" in left.reason
        assert len(devices_of(endpoint)) == 1
        assert server._process is process and server.alive


def test_the_server_waits_as_a_child_of_ours_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, waits in ((None, "2000"), ("5", "5")):
        if told is None:
            monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        else:
            monkeypatch.setenv("GOMP_SPINCOUNT", told)
        with RpcServer(require_rpc_server(), threads=1) as server:
            assert server._process is not None
            assert psutil.Process(server._process.pid).environ()["GOMP_SPINCOUNT"] == waits


def test_a_server_that_crashed_runs_again() -> None:
    with fronted() as (endpoint, server, events), connect(endpoint) as client:
        allocate(client, MIB)
        assert server._process is not None
        server._process.kill()
        assert client.recv(1) == b""
        while not isinstance(event := events.get(timeout=10), front.Restarted):
            assert isinstance(event, front.Came) or (isinstance(event, front.Left) and "crashed" in event.reason)
        assert len(devices_of(endpoint)) == 1


def test_who_watches_is_told_how_the_server_fares() -> None:
    with fronted() as (endpoint, server, _), connect(endpoint) as watch, connect(endpoint) as client:
        watch.settimeout(5)
        watch.sendall(bytes([255]) + bytes(8))
        allocate(client, MIB)  # the watch takes no client's turn
        assert watch.recv(1) == b"r"
        assert server._process is not None
        for sent, answer in ((signal.SIGSTOP, b"s"), (signal.SIGCONT, b"r")):
            server._process.send_signal(sent)
            end = time.monotonic() + 5
            told = b""
            while told != answer and time.monotonic() < end:
                watch.sendall(b"?")
                told = watch.recv(1)
            assert told == answer


def test_a_server_that_is_throttled_is_not_taken_for_stopped() -> None:
    with fronted() as (endpoint, server, _), connect(endpoint) as watch:
        watch.settimeout(5)
        watch.sendall(bytes([255]) + bytes(8))
        assert watch.recv(1) == b"r"
        assert server._process is not None
        told = b""
        for _ in range(4):
            server._process.send_signal(signal.SIGCONT)
            before = server.activity()[1]
            while server.activity()[1] == before:  # until it has computed
                devices_of(server.endpoint)
            server._process.send_signal(signal.SIGSTOP)
            while not server.activity()[0]:
                time.sleep(0.01)
            watch.sendall(b"?")
            told += watch.recv(1)
        server._process.send_signal(signal.SIGCONT)
        assert told == b"rrrr"


def test_who_watches_by_the_hundred_keeps_nobody_out() -> None:
    with fronted() as (endpoint, _, _), contextlib.ExitStack() as stack:
        before = threading.active_count()
        watches = []
        for _ in range(100):
            watches.append(stack.enter_context(connect(endpoint)))
            watches[-1].sendall(bytes([255]) + bytes(8))
        watches[-1].settimeout(5)
        assert watches[-1].recv(1) == b"r"
        assert len(devices_of(endpoint)) == 1
        end = time.monotonic() + 5
        while threading.active_count() > before + front._SILENT and time.monotonic() < end:
            time.sleep(0.05)
        assert threading.active_count() <= before + front._SILENT


def test_a_client_that_dies_while_it_is_answered_is_no_fault_of_the_server() -> None:
    with fronted() as (endpoint, server, events):
        assert server._process is not None
        with connect(endpoint) as client:
            allocate(client, MIB)
            server._process.send_signal(signal.SIGSTOP)
            client.settimeout(0.5)
            with contextlib.suppress(TimeoutError):  # until nothing more can be on its way
                while True:
                    client.sendall(10_000 * (bytes([15]) + bytes(8)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server._process.send_signal(signal.SIGCONT)
        assert events.get(timeout=5) == front.Came("127.0.0.1")
        left = events.get(timeout=10)
        assert isinstance(left, front.Left) and left.reason == ""


def test_nonsense_ends_the_visit_and_nothing_else() -> None:
    with fronted() as (endpoint, server, events):
        process = server._process
        for nonsense in (
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            bytes(range(256)) * 40,
            b"\x0e" + b"\xff" * 8,
            GREETING + b"\xff" * 9,
        ):
            with connect(endpoint) as client:
                client.settimeout(10)
                client.sendall(nonsense)
                with contextlib.suppress(OSError):  # it may have ended this by now
                    client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while client.recv(1000):
                        pass
        assert len(devices_of(endpoint)) == 1
        assert server._process is process and server.alive and events.empty()


def test_places_where_nobody_can_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(FileError, match="taken"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="no address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match="no address"):
        listen("nowhere.invalid", 0)
