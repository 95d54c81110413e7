"""The relay between llama.cpp and the workers: what it passes on, and what it notices."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from localmix.distribution.protocol import Endpoint
from localmix.distribution.relay import Listening, Lost, Reached, relay
from localmix.worker import Worker

WATCH = bytes([255]) + bytes(8)


class Far:
    """A server at the far end, which a test plays."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.listener.settimeout(10)
        self.endpoint = Endpoint(host, self.listener.getsockname()[1])

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        return connection


@contextmanager
def relayed(*far: Far) -> Iterator[tuple[Worker, list[int]]]:
    with Worker(relay, [each.endpoint for each in far]) as child:
        first = next(child)
        assert isinstance(first, Listening)
        yield child, list(first.ports)
    for each in far:
        each.listener.close()


def near(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece
        data += piece
    return data


def passed_on(worker: socket.socket, engine: socket.socket, byte: bytes) -> bool:
    """Whether what the worker says comes to the engine."""
    worker.sendall(byte)
    return read(engine, 1) == byte


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bytes_arrive_as_they_were_in_both_directions(host: str) -> None:
    try:
        far = Far(host)
    except OSError:
        pytest.skip("this machine has no IPv6")
    data = random.Random(1).randbytes(3_000_001)
    with relayed(far) as (_, (port,)), near(port) as engine:
        worker = far.accept()
        with worker:
            for source, target in ((engine, worker), (worker, engine)):
                sending = threading.Thread(target=source.sendall, args=(data,))
                sending.start()
                assert read(target, len(data)) == data
                sending.join()


def test_each_port_leads_to_its_own_worker() -> None:
    first, second = Far(), Far()
    with relayed(first, second) as (_, ports):
        for port, far, word in zip(ports, (first, second), (b"one", b"two"), strict=True):
            with near(port) as engine:
                engine.sendall(word)
                with far.accept() as worker:
                    assert read(worker, 3) == word


def test_an_engine_that_leaves_is_no_loss_and_may_come_again() -> None:
    far = Far()
    with relayed(far) as (child, (port,)):
        for _ in range(3):
            with near(port) as engine, far.accept() as worker:
                engine.sendall(b"a")
                assert read(worker, 1) == b"a"
                engine.shutdown(socket.SHUT_RDWR)
                assert worker.recv(1) == b""
        far.listener.close()
        with near(port) as engine:
            assert engine.recv(1) == b""
        lost = next(child)
        # of nothing before
        assert isinstance(lost, Lost) and "No worker listens" in lost.error.message


@pytest.mark.parametrize("abruptly", [False, True])
def test_a_worker_that_ends_the_connection_is_lost(abruptly: bool) -> None:
    far = Far()
    with relayed(far) as (child, (port,)), near(port) as engine:
        worker = far.accept()
        worker.sendall(b"hello")
        assert read(engine, 5) == b"hello"
        watch = far.accept()  # the second connection, which only listens
        if abruptly:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        worker.close()
        assert engine.recv(1) == b""
        assert next(child) == Reached(far.endpoint)
        lost = next(child)
        assert isinstance(lost, Lost) and lost.endpoint == far.endpoint
        assert lost.error.message == f"The worker {far.endpoint} was lost: it ended the connection."
        watch.close()


def test_a_worker_that_does_not_greet_is_not_waited_for() -> None:
    far = Far()
    with relayed(far) as (child, (port,)), near(port) as engine:
        engine.sendall(b"hello")
        assert engine.recv(1) == b""
        lost = next(child)
        assert isinstance(lost, Lost) and "does not answer within 5 seconds" in lost.error.message


def test_a_second_connection_that_the_worker_ends_means_nothing() -> None:
    far = Far()
    with relayed(far) as (_, (port,)), near(port) as engine, far.accept() as worker:
        assert passed_on(worker, engine, b"a")
        far.accept().close()
        again = far.accept()
        assert passed_on(worker, engine, b"b")
        again.close()


def test_an_older_worker_is_not_asked_for_beats_again() -> None:
    far = Far()
    with relayed(far) as (_, (port,)), near(port) as engine, far.accept() as worker:
        assert passed_on(worker, engine, b"a")
        with far.accept() as watch:
            assert read(watch, 9) == WATCH
        with far.accept() as watch:
            watch.settimeout(0.5)
            with pytest.raises(TimeoutError):
                watch.recv(1)
            assert passed_on(worker, engine, b"b")


def test_a_worker_that_says_it_is_stopped_is_lost() -> None:
    far = Far()
    with relayed(far) as (child, (port,)), near(port) as engine, far.accept() as worker:
        assert passed_on(worker, engine, b"a")
        with far.accept() as watch:
            assert read(watch, 9) == WATCH
            watch.sendall(b"r")
            assert read(watch, 1) == b"?"
        # one that answered before is asked again
        watch = far.accept()
        assert read(watch, 9) == WATCH
        watch.sendall(6 * b"s")
        assert engine.recv(1) == b""
        assert next(child) == Reached(far.endpoint)
        lost = next(child)
        assert isinstance(lost, Lost) and lost.error.message.endswith("was lost: its ggml-rpc-server is stopped.")
        watch.close()


def test_only_who_knows_of_beats_and_gives_none_is_lost_while_it_computes() -> None:
    kinds = Far(), Far(), Far()  # that beats, of an older version, that falls silent
    with relayed(*kinds) as (child, ports), contextlib.ExitStack() as stack:
        engines = [stack.enter_context(near(port)) for port in ports]
        workers = [stack.enter_context(far.accept()) for far in kinds]
        for engine, worker in zip(engines, workers, strict=True):
            assert passed_on(worker, engine, b"a")
        beats, unanswered, before = (stack.enter_context(far.accept()) for far in kinds)
        assert [read(watch, 9) for watch in (beats, unanswered, before)] == [WATCH] * 3
        before.sendall(b"r")
        before.close()
        stack.enter_context(kinds[2].accept())  # asked again, it says nothing
        end = time.monotonic() + 15
        while not select.select([engines[2]], [], [], 0)[0] and time.monotonic() < end:
            beats.sendall(b"r")
            assert read(beats, 1) == b"?"
        assert engines[2].recv(1) == b""
        lost = next(event for event in child if isinstance(event, Lost))
        assert lost.endpoint == kinds[2].endpoint
        assert lost.error.message.endswith("was lost: it does not answer any more.")
        for engine, worker in zip(engines[:2], workers[:2], strict=True):
            assert passed_on(worker, engine, b"b")


def test_the_relay_ends_with_its_parent() -> None:
    far = Far()
    with relayed(far) as (child, (port,)):
        pid = child.pid
    with pytest.raises(OSError):
        os.kill(pid, 0)
    with pytest.raises(ConnectionRefusedError):
        near(port)
