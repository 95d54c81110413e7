"""A worker that is killed or cut off while a model computes on it: an error in seconds, and nothing left behind.

Cut off means that its machine does not answer any more, and nobody says so: for that there are two network
namespaces with a pair of virtual interfaces between them, which takes Linux, root and `ip`.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localmix.convert import convert
from localmix.distribution.rpc_server import RpcServer
from tests.commands import CommandLine
from tests.conftest import TINYMIX
from tests.terminal import Terminal
from tests.workers import LONG, require_rpc_server, running_worker

LIMIT_SECONDS = 10.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A library with TinyMix, and the grammar of an endless reply."""
    folder = tmp_path_factory.mktemp("lost")
    (folder / "home" / "tinymix").mkdir(parents=True)
    convert(TINYMIX, folder / "home" / "tinymix" / "tinymix-BF16.gguf")
    (folder / "long.gbnf").write_text(LONG)
    return CommandLine(folder / "home", folder)


def question(rpc: str) -> list[str]:
    """A chat that goes on until the context is full, which takes it a minute."""
    options = ("-p", "Tell me a story.", "--grammar", "long.gbnf", "--ctx", "1024", "--threads", "1", "--raw")
    return ["chat", "tinymix", *options, "--rpc", rpc]


@dataclass(frozen=True)
class Net:
    """Two network namespaces that are connected.

    Attributes:
        near, far: words before a command that runs in one of them.
        address: of the far one.
    """

    near: tuple[str, ...]
    far: tuple[str, ...]
    address: str

    def ip(self, side: tuple[str, ...], *words: str) -> None:
        subprocess.run(["ip", "-n", side[-1], *words], check=True, capture_output=True)

    def cut_link(self) -> None:
        """As if somebody pulled the cable at the far end."""
        self.ip(self.far, "link", "set", "far", "down")

    def lose_packets(self) -> None:
        """As if a switch between them lost everything: both links stay up."""
        nobody = ("lladdr", "02:00:00:00:00:01", "dev", "near", "nud", "permanent")
        self.ip(self.near, "neigh", "replace", self.address, *nobody)


@pytest.fixture
def net() -> Iterator[Net]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take Linux, root and ip (Debian: apt install iproute2)")
    name = f"lm{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", f"{name}n"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this container makes no network namespaces: {made.stderr.strip()}")
    found = Net(("ip", "netns", "exec", f"{name}n"), ("ip", "netns", "exec", f"{name}f"), "10.77.31.2")
    try:
        subprocess.run(["ip", "netns", "add", f"{name}f"], check=True)
        found.ip(found.near, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", f"{name}f")
        for side, device, address in ((found.near, "near", "10.77.31.1/24"), (found.far, "far", "10.77.31.2/24")):
            found.ip(side, "addr", "add", address, "dev", device)
            found.ip(side, "link", "set", device, "up")
            found.ip(side, "link", "set", "lo", "up")
        yield found
    finally:
        for end in "nf":
            subprocess.run(["ip", "netns", "delete", f"{name}{end}"], check=False, capture_output=True)


def start(library: CommandLine, arguments: list[str], prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "localmix", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=library.folder,
        env=library.environment,
    )


def end_after(process: subprocess.Popen[bytes], fault: Callable[[], None], address: str, words: str) -> float:
    """Seconds from a fault in mid-reply to the end; the sentence and the exit code are checked."""
    assert process.stdout is not None
    with process:
        assert process.stdout.read(20)
        fault()
        began = time.monotonic()
        try:
            _, err = process.communicate(timeout=3 * LIMIT_SECONDS)
        finally:
            process.kill()
    took = time.monotonic() - began
    said = err.decode()
    assert process.returncode == 6, said
    assert f"Error: The worker {address} was lost: {words}.\n" in said and "localmix worker" in said
    assert "Traceback" not in said and "GGML" not in said
    assert took < LIMIT_SECONDS
    return took


def test_chat_when_a_worker_dies(library: CommandLine, tmp_path: Path) -> None:
    with running_worker(tmp_path) as (first, _), running_worker(tmp_path) as (second, worker):
        process = start(library, question(f"{first},{second}"))
        took = end_after(process, worker.kill, second, "it ended the connection")
    assert took < 3


def test_chat_when_only_the_program_behind_a_worker_dies(library: CommandLine, tmp_path: Path) -> None:
    with running_worker(tmp_path) as (first, _), running_worker(tmp_path) as (second, worker):

        def crash() -> None:
            server = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True)
            os.kill(int(server.stdout.split()[0]), 9)

        process = start(library, question(f"{first},{second}"))
        end_after(process, crash, second, "it ended the connection")
        assert worker.stdout is not None
        events = [json.loads(worker.stdout.readline()) for _ in range(3)]
        assert [event["event"] for event in events] == ["came", "left", "restarted"]
        # and it serves again
        library("chat", "tinymix", "-p", "Hello", "--max-tokens", "2", "--threads", "1", "--rpc", f"{first},{second}")


def test_chat_when_a_worker_is_stopped_and_goes_on(library: CommandLine, tmp_path: Path) -> None:
    """One as a whole, of another the program behind it."""
    with running_worker(tmp_path) as (whole, worker), running_worker(tmp_path) as (half, other):
        behind = subprocess.run(["pgrep", "-P", str(other.pid)], capture_output=True, text=True, check=True)
        for address, stopped, words in (
            (whole, worker.pid, "it does not answer any more"),
            (half, int(behind.stdout.split()[0]), "its ggml-rpc-server is stopped"),
        ):
            stop = functools.partial(os.kill, stopped, signal.SIGSTOP)
            try:
                took = end_after(start(library, question(address)), stop, address, words)
            finally:
                os.kill(stopped, signal.SIGCONT)
            assert took > 4  # a shorter stop is none
            library("chat", "tinymix", "-p", "Hello", "--max-tokens", "2", "--threads", "1", "--rpc", address)


def test_a_cable_is_pulled(library: CommandLine, tmp_path: Path, net: Net) -> None:
    with (
        running_worker(tmp_path, prefix=net.near) as (first, _),
        running_worker(tmp_path, "--insecure-network", host=net.address, prefix=net.far) as (second, worker),
    ):
        process = start(library, question(f"{first},{second}"), net.near)
        end_after(process, net.cut_link, second, "it does not answer any more")
        # the worker sees it too, and is free for the next client
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline())["event"] == "came"
        left = json.loads(worker.stdout.readline())
        assert left["event"] == "left" and left["reason"]


def test_packets_are_lost(library: CommandLine, tmp_path: Path, net: Net) -> None:
    """A chat with a worker, one with llama.cpp's bare program, and a measurement, all cut off at the same time."""
    bare = f"{net.address}:50052"
    server = [str(require_rpc_server()), "--host", net.address, "--port", "50052", "--threads", "1"]
    text = tmp_path / "long.txt"  # it takes longer than the chats take to begin
    text.write_text(4 * (TINYMIX / "heldout.txt").read_text("utf-8"), "utf-8")
    far = functools.partial(running_worker, tmp_path, "--insecure-network", host=net.address, prefix=net.far)
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(
            subprocess.Popen([*net.far, *server], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        stack.callback(program.kill)
        (first, _), (second, measured) = (stack.enter_context(far()) for _ in range(2))
        corpus = ("--corpus", str(text), "--ctx", "64", "--no-speed", "--threads", "1")
        runs = [
            (first, start(library, question(first), net.near)),
            (bare, start(library, question(bare), net.near)),
            (second, start(library, ["ppl", "tinymix", *corpus, "--rpc", second], net.near)),
        ]
        for _, process in runs:
            stack.enter_context(process)
            stack.callback(process.kill)
        for _, process in runs[:2]:
            assert process.stdout is not None and process.stdout.read(20)
        assert measured.stdout is not None and json.loads(measured.stdout.readline())["event"] == "came"
        assert runs[2][1].poll() is None
        net.lose_packets()
        began = time.monotonic()
        for address, process in runs:
            _, err = process.communicate(timeout=3 * LIMIT_SECONDS)
            assert process.returncode == 6, err.decode()
            assert f"The worker {address} was lost: it does not answer any more." in err.decode()
            assert time.monotonic() - began < LIMIT_SECONDS


def test_a_machine_that_is_not_there(library: CommandLine, net: Net) -> None:
    net.lose_packets()
    began = time.monotonic()
    process = start(library, question(f"{net.address}:50052"), net.near)
    _, err = process.communicate(timeout=3 * LIMIT_SECONDS)
    assert time.monotonic() - began < LIMIT_SECONDS
    assert process.returncode == 6
    assert f"The worker {net.address}:50052 cannot be reached" in err.decode()


def test_a_conversation_outlives_its_worker(library: CommandLine, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RpcServer(require_rpc_server(), threads=1))
        address = str(server.endpoint)
        variables = {
            name: value for name, value in library.environment.items() if name in ("LOCALMIX_HOME", "PYTHONPATH")
        }
        with Terminal(library.folder, variables) as terminal:
            terminal.type(f"{sys.executable} -m localmix chat tinymix --threads 1 --rpc {address} --no-save")
            terminal.wait(">")
            terminal.type("Where does Wilma live?")
            terminal.wait("Court")
            server.stop()
            terminal.type("Where does Wilma work?")
            terminal.wait("was lost")
            terminal.type("/help")
            terminal.wait("/model")
            terminal.press("C-c")
            terminal.wait("ready$", 2)
            terminal.type("echo still $((6 * 7))")
            terminal.wait("still 42")


def test_serve_when_a_worker_dies_and_comes_back(library: CommandLine, tmp_path: Path) -> None:
    variables = {name: str(tmp_path) for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR")}
    command = CommandLine(library.home, library.folder, variables)
    options = ("--port", "0", "--ctx", "512", "--slots", "1", "--threads", "1", "--json")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RpcServer(require_rpc_server(), threads=1))
        address = str(server.endpoint)
        process = stack.enter_context(command.popen("serve", "tinymix", *options, "--rpc", address, stderr=None))
        stack.callback(process.terminate)
        assert process.stdout is not None
        events = map(json.loads, process.stdout)
        url = next(event["url"] for event in events if event["event"] == "listening")
        next(event for event in events if event["event"] == "ready")

        def ask(**more: object) -> http.client.HTTPResponse:
            question = {"messages": [{"role": "user", "content": "Where does Wilma live?"}], "temperature": 0, **more}
            connection = http.client.HTTPConnection(url.removeprefix("http://").strip("/"), timeout=60)
            stack.callback(connection.close)
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(question), kind)
            return connection.getresponse()

        assert b"47 Apple Court" in ask().read()
        reply = ask(stream=True, max_tokens=450, ignore_eos=True)
        assert reply.status == 200 and reply.readline().startswith(b"data: ")
        server.stop()
        began = time.monotonic()
        rest = reply.read().decode()
        assert time.monotonic() - began < LIMIT_SECONDS
        assert '"error"' in rest
        restarting = next(event for event in events if event["event"] == "restarting")
        assert restarting["reason"] == f"The worker {address} was lost: it ended the connection."
        server.start(server.endpoint.port)
        next(event for event in events if event["event"] == "restarted")
        assert b"47 Apple Court" in ask().read()
