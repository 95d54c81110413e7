"""The ggml-rpc-server process behind `localmix worker`: found, started on a private port, watched."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from localmix.distribution.protocol import Endpoint, devices_of
from localmix.errors import InputError, NetworkError, UsageError
from localmix.serving import launcher
from localmix.serving.server_binary import HOW_TO_GET_IT, built_tools
from localmix.worker import WAITING, last_words

PROGRAM = "ggml-rpc-server"
_OTHER_NAMES = ("rpc-server", "llama-rpc-server")  # in packages of other versions
_START_SECONDS = 60.0  # a GPU's driver takes its time
_STOP_SECONDS = 2.0
_END_SECONDS = 0.5  # its connections end a little before it does
_POLL_SECONDS = 0.05
_KEPT_LINES = 100

# "  CUDA0: NVIDIA H200 (143156 MiB, 142500 MiB free)"
_DEVICE = re.compile(r"^  (\S+): (.+) \((\d+) MiB, (\d+) MiB free\)$")
_UNKNOWN = re.compile(r"unknown device: (\S+)")


@dataclass(frozen=True)
class ServedDevice:
    """What a worker computes on: ggml's name, and the product's."""

    name: str
    description: str

    @property
    def is_processor(self) -> bool:
        """Whether it computes in this machine's own memory, of which ggml takes all for free."""
        return self.name == "CPU"


def find_rpc_server() -> Path:
    """The ggml-rpc-server to use: the one that was built, else the one on PATH.

    Raises:
        InputError: there is none.
    """
    found = built_tools()
    built = found[0] / (f"{PROGRAM}.exe" if sys.platform == "win32" else PROGRAM) if found else None
    if built is not None and built.is_file():
        return built
    for name in (PROGRAM, *_OTHER_NAMES):
        if path := shutil.which(name):
            return Path(path)
    raise InputError(f"The program {PROGRAM} of llama.cpp is not here.", HOW_TO_GET_IT)


class RpcServer:
    """A running ggml-rpc-server that listens on loopback; a context manager.

    Args:
        program: `find_rpc_server()`.
        threads: for the processor.
        devices: names of those to offer; empty for llama.cpp's choice, the GPUs or else the processor.
        cache: a folder where it keeps large tensors, so that they need not be sent again; None for no such thing.

    Attributes:
        devices: what it offers.
        endpoint: where it listens.

    Raises (when entered):
        InputError: it does not start; the sentence holds its reason.
        UsageError: there is no such device.
    """

    def __init__(self, program: Path, *, threads: int, devices: Sequence[str] = (), cache: Path | None = None) -> None:
        self._arguments = [str(program), "--threads", str(threads)]
        if devices:
            self._arguments += ["--device", ",".join(devices)]
        self._environment = {**WAITING, **os.environ, "GGML_NO_BACKTRACE": "1"}
        if cache is not None:
            self._arguments.append("--cache")
            self._environment["LLAMA_CACHE"] = str(cache)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.devices: tuple[ServedDevice, ...] = ()
        self.endpoint = Endpoint("127.0.0.1", 0)

    def __enter__(self) -> RpcServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def activity(self) -> tuple[bool, float]:
        """Whether the process was told to stop for a while, as with `kill -STOP`; how many seconds it has computed."""
        process = self._process  # another thread starts it again
        with contextlib.suppress(psutil.Error):
            if process is not None:
                seen = psutil.Process(process.pid)
                times = seen.cpu_times()
                return seen.status() == psutil.STATUS_STOPPED, times.user + times.system
        return False, 0.0

    def ends(self) -> bool:
        """Whether the process is gone, or about to be."""
        end = time.monotonic() + _END_SECONDS
        while self.alive and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return not self.alive

    def start(self, port: int = 0) -> None:
        """Start it, again too, and wait until it answers; port 0 for any free one."""
        with socket.create_server(("127.0.0.1", port)) as probe:
            self.endpoint = Endpoint("127.0.0.1", probe.getsockname()[1])
        command = [*self._arguments, "--host", self.endpoint.host, "--port", str(self.endpoint.port)]
        if sys.platform == "linux":
            command = [sys.executable, "-I", str(launcher.__file__), str(os.getpid()), *command]
        self._lines.clear()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for its parent, which ends it
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it; it keeps nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join()
        if process.stdout is not None:
            process.stdout.close()

    def words(self) -> str:
        """The line of its log that says why it ended."""
        if self._reader is not None:
            self._reader.join(_STOP_SECONDS)
        return last_words("\n".join(self._lines))

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while self.alive:
            try:
                count = len(devices_of(self.endpoint))
            except NetworkError as error:
                if time.monotonic() > end:
                    raise InputError(f"{PROGRAM} does not start: {error.message}", HOW_TO_GET_IT) from error
                time.sleep(_POLL_SECONDS)
                continue
            # it writes to a pipe, and so in one piece, when the first client comes
            while self.alive and len(found := self._listed()) < count and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            self.devices = tuple(found)
            return
        words = self.words()
        if unknown := _UNKNOWN.search(words):
            raise UsageError(f"This machine has no device {unknown[1]}.", "`localmix doctor` names those that it has.")
        raise InputError(f"{PROGRAM} does not start: {words or 'it says nothing'}.", HOW_TO_GET_IT)

    def _listed(self) -> list[ServedDevice]:
        found = (_DEVICE.match(line) for line in list(self._lines))
        return [ServedDevice(match[1], match[2]) for match in found if match]

    def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        for line in process.stdout:
            self._lines.append(line.rstrip())
