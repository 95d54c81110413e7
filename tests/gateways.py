"""A gateway on a free port of the loopback, before real llama-servers, and clients that send any bytes."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.serving.engine_client import EngineAddress, EngineState
from localmix.serving.gateway import Access, Gateway
from localmix.serving.policy import Policy

SLOTS = 4
# without an end of its own: llama-server drops the oldest half of a full context
ENDLESS = {"prompt": "Once upon a time", "stream": True, "ignore_eos": True, "n_predict": -1}


@dataclass
class Server:
    """A llama-server on a Unix socket, as the gateway sees it."""

    name: str
    address: EngineAddress
    process: subprocess.Popen[bytes]
    state: EngineState = "ready"
    failure: str | None = None
    embeddings: bool = False

    def ask(self, path: str) -> Any:
        """What it answers when it is asked without a gateway."""
        client = _UnixConnection(self.address.socket)
        try:
            client.request("GET", path)
            return json.loads(client.getresponse().read())
        finally:
            client.close()

    def busy_slots(self) -> int:
        """How many slots work for somebody."""
        return sum(slot["is_processing"] for slot in self.ask("/slots"))

    def wait_until_idle(self, seconds: float = 10, pause: float = 0.05) -> None:
        """Until no slot works any more, which is looked at in pauses."""
        deadline = time.monotonic() + seconds
        while busy := self.busy_slots():
            assert time.monotonic() < deadline, f"{busy} slots are busy for nobody"
            time.sleep(pause)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path | None) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


@pytest.fixture(scope="session")
def tinymix_q8_0(tinymix_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TinyMix as it is served here: small, and quick enough on one thread."""
    path = tmp_path_factory.mktemp("served") / "tinymix-Q8_0.gguf"
    quantize(tinymix_bf16, [(load_presets().find("Q8_0"), path)], threads=1)
    return path


@contextmanager
def running_server(tools: Path, model: Path, name: str, *arguments: str) -> Iterator[Server]:
    """llama-server with one thread and four slots."""
    with tempfile.TemporaryDirectory(prefix="lm") as folder:  # a socket's path has to be short
        path = Path(folder, "engine.sock")
        fixed = ("-t", "1", "-np", str(SLOTS), "-c", "2048", "--context-shift", "--no-warmup", "--cache-ram", "0")
        process = subprocess.Popen(
            [tools / "llama-server", "-m", model, "--host", path, "--alias", name, *fixed, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        server = Server(name, EngineAddress(path), process)
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    if server.ask("/health") == {"status": "ok"}:
                        break
                except OSError:
                    pass
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            yield server
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


@dataclass
class Answer:
    """One response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """OpenAI's error, with nothing missing."""
        error = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"} and error["message"]
        return error


@dataclass
class Front:
    """A gateway that runs in a thread of its own."""

    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    host: str = ""
    port: int = 0
    records: list[Access] = field(default_factory=list)

    def run(self, work: Any, seconds: float = 30) -> Any:
        """Run a coroutine of the gateway's."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def open(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((self.host, self.port), timeout=20)

    def send(self, raw: bytes) -> bytes:
        """What comes back on those bytes till the gateway closes."""
        with self.open() as client:
            client.sendall(raw)
            return read_all(client)

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request; a body that is no bytes is sent as JSON."""
        client = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            client.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            reply = client.getresponse()
            return Answer(reply.status, reply.headers, reply.read())
        finally:
            client.close()

    def begin_stream(self, body: Mapping[str, Any], receive_buffer: int = 0) -> socket.socket:
        """A connection on which a completion streams; its first event has come."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect((self.host, self.port))
        client.sendall(post("/v1/completions", body))
        seen = b""
        while b"data: " not in seen:
            piece = client.recv(1024)
            assert piece, seen
            seen += piece
        assert seen.startswith(b"HTTP/1.1 200"), seen
        return client


def post(path: str, body: Mapping[str, Any], *headers: str, host: str = "localhost") -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_all(client: socket.socket) -> bytes:
    """Everything till the other side closes."""
    pieces = []
    try:
        while piece := client.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def events(body: bytes) -> list[Any]:
    """The data of a stream's events, `[DONE]` as it is."""
    data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


@contextmanager
def running_gateway(engines: Sequence[Any], policy: Policy) -> Iterator[Front]:
    """A gateway on the policy's port, or any free one where it is 0."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    records: list[Access] = []
    front = Front(Gateway(engines, policy, records.append), loop, records=records)
    try:
        front.host, front.port = front.run(front.gateway.start())
        yield front
    finally:
        front.run(front.gateway.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
