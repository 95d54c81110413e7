"""`localmix serve` as a user runs it: what it says, how it ends, and what it keeps to itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from localmix.cli.serve import command
from localmix.errors import LocalmixError
from tests.commands import CommandLine
from tests.model_families import write_model
from tests.random_model import write_random_model
from tests.terminal import Terminal

pytestmark = [pytest.mark.upstream, pytest.mark.skipif(os.name == "nt", reason="signals and terminals")]

SMALL = ("--threads", "1", "--slots", "1", "--ctx", "512", "--port", "0")
# a random model babbles: without an end of its own, until its slot's context is full
ENDLESS = {"prompt": "The quick", "stream": True, "ignore_eos": True, "n_predict": -1, "temperature": 0}


@pytest.fixture(autouse=True)
def needs_llama_server(upstream: Path) -> None:
    """All of this runs the real one."""


@pytest.fixture
def serve(localmix: CommandLine) -> CommandLine:
    """The command line with the model `fox`, and a folder of its own for logs."""
    return CommandLine(localmix.home, localmix.folder, {"XDG_STATE_HOME": str(localmix.folder / "state")})


class Running:
    """A `localmix serve --json` whose events are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def wait(self, name: str) -> dict[str, Any]:
        """Read on to an event of this name."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no event {name!r} after {self.events}")

    @property
    def servers(self) -> list[psutil.Process]:
        """Its llama-servers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "llama-server" in child.name()]

    def end(self, *numbers: signal.Signals) -> int:
        """Send signals, and wait for its end; the exit code."""
        for number in numbers:
            self.process.send_signal(number)
        with contextlib.suppress(AssertionError):
            self.wait("nothing more")
        return self.process.wait(timeout=20)


@contextlib.contextmanager
def running(serve: CommandLine, *arguments: str | Path) -> Iterator[Running]:
    with serve.popen("serve", *arguments, "--json", stderr=subprocess.DEVNULL) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def ask(url: str, document: object = None, key: str = "") -> Any:
    """What an address answers, as JSON."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if document is None else json.dumps(document).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as reply:
        return json.load(reply)


@contextlib.contextmanager
def streaming(port: int, document: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """A reply whose first piece has come."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
        client.request("POST", "/v1/completions", json.dumps(document), {"Content-Type": "application/json"})
        with client.getresponse() as reply:
            assert reply.status == 200 and reply.readline().startswith(b"data: ")
            yield reply


def test_serving_and_ctrl_c_at_a_terminal(serve: CommandLine) -> None:
    with Terminal(serve.folder, serve.environment) as terminal:
        terminal.type(f"{sys.executable} -m localmix serve {' '.join(SMALL)}; echo code=$?")
        screen = terminal.wait("Ctrl-C ends it.")
        url = screen.partition("API")[2].split()[0]
        assert (
            "models     fox:BF16, one request at a time, 512 positions each" in screen and "Loading" not in screen
        )  # the progress line is gone
        assert f"chat page  {url.removesuffix('v1')}\n" in screen and "serve.log" in screen
        assert ask(f"{url}/models")["data"][0]["id"] == "fox:BF16"
        terminal.press("C-c")
        screen = terminal.wait("code=0")
        assert "Stopped." in screen and "Traceback" not in screen


def test_a_terminal_sees_how_far_loading_is(serve: CommandLine) -> None:
    import pty  # not on Windows

    master, slave = pty.openpty()
    with serve.popen(
        "serve", *SMALL, stderr=slave, stdout=slave, env={**serve.environment, "NO_COLOR": "1"}
    ) as process:
        os.close(slave)
        shown = b""
        while b"Ctrl-C ends it." not in shown:
            shown += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal ends whose programs are gone
            while data := os.read(master, 65536):
                shown += data
    os.close(master)
    assert process.returncode == 0
    lines = shown.decode().split("\r\x1b[K")
    assert "Loading fox:BF16: 0%" in lines and "fox:BF16 is loaded; it gets ready …" in lines


def test_the_chat_page_is_opened(serve: CommandLine) -> None:
    script = serve.folder / "browser"
    script.write_text('#!/bin/sh\necho "$1" > opened\n')
    script.chmod(0o755)
    browsing = CommandLine(serve.home, serve.folder, {**serve.variables, "BROWSER": f"{script} %s"})
    with running(browsing, *SMALL, "--open") as run:
        ready = run.wait("ready")
        opened = serve.folder / "opened"
        deadline = time.monotonic() + 10
        while ready["page"] and not (opened.exists() and opened.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not ready["page"] or opened.read_text() == f"{ready['url']}/\n"
        assert run.end(signal.SIGINT) == 0


def test_ctrl_c_while_it_loads(serve: CommandLine) -> None:
    with running(serve, *SMALL) as run:
        run.wait("listening")
        servers = run.servers
        assert run.end(signal.SIGINT) == 130
        assert "ready" not in [event["event"] for event in run.events]
        assert run.events[-1]["event"] == "error" and run.events[-1]["exit_code"] == 130
        assert not psutil.wait_procs(servers, timeout=5)[1]


def test_a_crash_is_repaired(serve: CommandLine) -> None:
    with running(serve, *SMALL) as run:
        url = run.wait("ready")["url"]
        (server,) = run.servers
        server.kill()
        event = run.wait("restarting")
        assert event["attempt"] == 1 and "llama-server was killed" in event["reason"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(f"{url}/v1/completions", {"prompt": "x"})
        assert caught.value.code == 503
        caught.value.close()
        run.wait("restarted")
        assert run.servers != [server]
        assert ask(f"{url}/v1/completions", {"prompt": "The", "max_tokens": 3})["usage"]["completion_tokens"] == 3
        assert run.end(signal.SIGINT) == 0


def test_sigterm_lets_a_running_request_end(serve: CommandLine) -> None:
    with running(serve, *SMALL, "--ctx", "8192") as run:
        port = run.wait("listening")["port"]
        run.wait("ready")
        with streaming(port, {**ENDLESS, "n_predict": 3000}) as reply:
            run.process.send_signal(signal.SIGTERM)
            run.wait("draining")
            with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                pass  # nobody is let in any more
            lines = reply.readlines()
        assert lines[-2] == b"data: [DONE]\n", lines[-5:]
        assert json.loads(lines[-4].removeprefix(b"data: "))["usage"]["completion_tokens"] == 3000
        run.wait("stopped")
        assert run.events[-1]["cut"] == 0
        assert run.end() == 0


def test_a_second_ctrl_c_does_not_wait(serve: CommandLine) -> None:
    with running(serve, *SMALL, "--ctx", "100000") as run:
        port = run.wait("listening")["port"]
        run.wait("ready")
        with streaming(port, ENDLESS) as reply:
            reading = threading.Thread(target=_read_to_the_end, args=(reply,))
            reading.start()
            run.process.send_signal(signal.SIGINT)
            run.wait("draining")
            started = time.monotonic()
            assert run.end(signal.SIGINT) == 0
            assert time.monotonic() - started < 5 and run.events[-1] == {"event": "stopped", "cut": 1}
            reading.join(timeout=10)
            assert not reading.is_alive()


def _read_to_the_end(reply: http.client.HTTPResponse) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        reply.read()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere llama-server sees its stdin end")
def test_no_llama_server_outlives_it(serve: CommandLine) -> None:
    with running(serve, *SMALL) as run:
        run.wait("ready")
        servers = run.servers
        run.process.kill()
        assert len(servers) == 1 and not psutil.wait_procs(servers, timeout=5)[1]


def test_several_models_and_their_kinds(serve: CommandLine) -> None:
    write_model(serve.folder / "minibert", "bert")
    serve("convert", "minibert")
    with running(serve, "fox", "minibert", *SMALL) as run:
        ready = run.wait("ready")
        assert [name.partition(":")[0] for name in ready["models"]] == ["fox", "minibert"]
        url = ready["url"]
        assert [model["id"] for model in ask(f"{url}/v1/models")["data"]] == ready["models"]
        text = ask(f"{url}/v1/completions", {"model": "fox", "prompt": "The", "max_tokens": 2})
        assert text["usage"]["completion_tokens"] == 2
        vector = ask(f"{url}/v1/embeddings", {"model": "minibert", "input": "Hello"})["data"][0]["embedding"]
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-3)
        assert len(run.servers) == 2
        assert run.end(signal.SIGTERM) == 0


def test_a_model_without_a_template_goes_on_with_the_text(serve: CommandLine) -> None:
    bare = write_random_model(serve.folder / "bare.gguf", chat_template="")
    turns = [("system", "Be brief."), ("user", "One"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with running(serve, bare, *SMALL) as run:
        url = run.wait("ready")["url"]
        assert ask(f"{url}/apply-template", {"messages": messages})["prompt"] == "Be brief.\nOne\ntwo\nthree"
        reply = ask(f"{url}/v1/chat/completions", {"messages": messages, "max_tokens": 3})
        assert reply["usage"]["completion_tokens"] == 3
        assert run.end(signal.SIGINT) == 0


def test_another_host_has_a_key_that_nobody_else_sees(serve: CommandLine) -> None:
    with running(serve, *SMALL, "--host", "0.0.0.0", "--log-json") as run:
        listening = run.wait("listening")
        ready = run.wait("ready")
        key, url = ready["api_key"], listening["url"]
        assert len(key) >= 32
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(f"{url}/v1/models")
        assert caught.value.code == 401
        caught.value.close()
        assert ask(f"{url}/v1/models", key=key)["data"]
        ask(f"{url}/v1/completions", {"prompt": "a private word", "max_tokens": 1}, key=key)
        for process in (psutil.Process(run.process.pid), *run.servers):
            assert key not in " ".join(process.cmdline()) and key not in str(process.environ())
        assert run.end(signal.SIGINT) == 0
    log = Path(ready["log"])
    assert log.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line.get("path") == "/v1/completions"] == [200]
    assert key not in log.read_text() and "private" not in log.read_text()


def test_a_key_of_the_users_own(serve: CommandLine) -> None:
    (serve.folder / "key.txt").write_text("correct-horse\n")
    given = CommandLine(serve.home, serve.folder, {**serve.variables, "LOCALMIX_API_KEY": "from-the-variable"})
    for arguments, key in ((("--api-key-file", "key.txt"), "correct-horse"), ((), "from-the-variable")):
        with running(given, *SMALL, *arguments) as run:
            ready = run.wait("ready")
            assert "api_key" not in ready
            assert ask(f"{ready['url']}/v1/models", key=key)["data"]
            (server,) = run.servers
            assert key not in str(server.environ())
            assert run.end(signal.SIGINT) == 0


WRONG = [
    (("nobody",), 2, "There is no model 'nobody'"),
    (("fox", "fox"), 2, "fox:BF16 is named twice"),
    (("fox", "--", "--host", "0.0.0.0"), 2, "llama-server does not get --host from here"),
    (("fox", "--", "--no-such-thing"), 2, "llama-server does not know the argument --no-such-thing"),
    (("fox", "--api-key", "short"), 2, "--api-key: an API key is 8 to 256"),
    (("fox", "--api-key", "long-enough", "--api-key-file", "key.txt"), 2, "name two keys"),
    (("fox", "--api-key-file", "none.txt"), 5, "none.txt"),
    (("fox", "--cors", "chat.example"), 2, "--cors chat.example: no origin"),
    (("fox", "--draft-tokens", "3"), 2, "--draft-tokens needs --draft"),
    (("fox", "--chat-template", "none.jinja"), 5, "no file none.jinja"),
    (("fox", "--device", "cuda"), 2, "cuda"),
    (("corpus.txt",), 3, "corpus.txt"),
    (("fox", "--ctx", "100000000"), 4, "--ctx"),
    (("fox", "--host", "203.0.113.7"), 2, "Nothing can listen on 203.0.113.7"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_arguments(
    serve: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    monkeypatch.chdir(serve.folder)
    monkeypatch.setenv("LOCALMIX_HOME", str(serve.home))
    monkeypatch.setenv("XDG_STATE_HOME", str(serve.folder / "state"))
    with pytest.raises(LocalmixError) as caught:
        command.main(["--threads", "1", "--port", "0", *arguments], standalone_mode=False)
    assert caught.value.exit_code == code and words in str(caught.value)


def test_a_port_that_is_taken(serve: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve("serve", *SMALL, "--port", str(port), expect=2)
        assert f"Nothing can listen on 127.0.0.1, port {port}: address already in use." in result.err
        (line,) = serve("serve", *SMALL, "--port", str(port), "--json", expect=2).out.splitlines()
        error = json.loads(line)
        assert error["event"] == "error" and error["exit_code"] == 2 and "--port" in error["hint"]


def test_without_a_llama_server_it_says_how_to_get_one(serve: CommandLine) -> None:
    bare = {**serve.variables, "LOCALMIX_CACHE": str(serve.folder / "none"), "PATH": str(serve.folder)}
    result = CommandLine(serve.home, serve.folder, bare)("serve", "fox", expect=3)
    assert "The program llama-server of llama.cpp is not here." in result.err
    for way in ("localmix doctor --build-server", "make vendor", "package"):
        assert way in result.err


def test_a_llama_server_of_the_system_is_used(serve: CommandLine, upstream: Path) -> None:
    (serve.folder / "bin").mkdir()
    (serve.folder / "bin" / "llama-server").symlink_to(upstream / "llama-server")
    path = f"{serve.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    other = {**serve.variables, "LOCALMIX_CACHE": str(serve.folder / "none"), "PATH": path}
    with running(CommandLine(serve.home, serve.folder, other), *SMALL) as run:
        assert run.wait("ready")["models"] == ["fox:BF16"]
        assert run.end(signal.SIGINT) == 0
