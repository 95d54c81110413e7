"""Asking workers what they have: real connections to real servers, and to ones that behave otherwise."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from localmix.distribution import protocol
from localmix.distribution.protocol import Endpoint, devices_of, parse_endpoints
from localmix.distribution.rpc_server import RpcServer
from localmix.errors import NetworkError, UsageError
from tests.workers import require_rpc_server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.2:50052", [("10.0.0.2", 50052)]),
        ("desk", [("desk", 50052)]),
        ("desk.home:1, [::1]:2", [("desk.home", 1), ("::1", 2)]),
        ("[fe80::1%eth0]:7,[::1]", [("fe80::1%eth0", 7), ("::1", 50052)]),
    ],
)
def test_addresses(text: str, expected: list[tuple[str, int]]) -> None:
    assert parse_endpoints(text) == tuple(Endpoint(*each) for each in expected)


def test_an_address_is_written_as_it_is_read() -> None:
    for text in ("10.0.0.2:50052", "[::1]:2"):
        assert str(parse_endpoints(text)[0]) == text


@pytest.mark.parametrize("text", ["", "a,,b", "::1", "a:0", "a:65536", "a:b", "http://a:1", "a b:1", "a:1,a:1", "u@a"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_endpoints(text)


def test_a_real_server_says_what_it_has() -> None:
    with RpcServer(require_rpc_server(), threads=1) as server:
        (device,) = devices_of(server.endpoint)
        assert device.total == psutil.virtual_memory().total
        assert [each.name for each in server.devices] == ["CPU"]


def test_the_version_is_that_of_the_source(upstream: Path) -> None:
    header = (upstream.parent / "src" / "ggml" / "include" / "ggml-rpc.h").read_text()
    found = [re.search(rf"RPC_PROTO_{part}_VERSION +(\d+)", header) for part in ("MAJOR", "MINOR")]
    assert tuple(int(match[1]) for match in found if match) == protocol.VERSION


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """A server that does what a test wants with its first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield Endpoint("127.0.0.1", listener.getsockname()[1])
        thread.join()


def greet(*version: int) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(struct.pack("<Q4B24x", 28, *version, 0))
        connection.recv(100)

    return serve


def sends(data: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(data)

    return serve


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (greet(8, 0, 0), "version 8.0.0"),
        (greet(6, 9, 9), "version 6.9.9"),
        (greet(7, 1, 0), "version 7.1.0"),
        (greet(*protocol.BUSY), "busy"),
        (sends(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak"),
        (sends(b""), "does not speak"),
    ],
)
def test_servers_that_llama_cpp_would_die_of(serve: Callable[[socket.socket], None], words: str) -> None:
    with listening(serve) as endpoint, pytest.raises(NetworkError, match=words):
        devices_of(endpoint)


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_SECONDS", 0.2)

    def serve(connection: socket.socket) -> None:
        while connection.recv(1000):
            pass

    with listening(serve) as endpoint, pytest.raises(NetworkError, match=r"does not answer within 0\.2 seconds"):
        devices_of(endpoint)


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(NetworkError, match="No worker listens"):
        devices_of(endpoint)
    with pytest.raises(NetworkError, match="no machine of the name"):
        devices_of(Endpoint("nowhere.invalid", 1))
