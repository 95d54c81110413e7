"""A llama-server process for one model: started, watched, started again when it crashed, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import CapacityError, FileError, InputError, LocalmixError, UsageError
from localmix.native.model import NO_MEMORY
from localmix.serving.engine_client import EngineAddress, EngineState, open_socket
from localmix.serving.engine_options import EngineOptions, environment
from localmix.serving.server_binary import HOW_TO_GET_IT
from localmix.worker import LESS_MEMORY, explain_death, last_words

# before each new start of an engine that crashed; after these it is given up
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
STEADY_SECONDS = 600.0  # an engine that lived so long starts counting anew
# It answers between two computations, each of at most a batch of a prompt, which may take minutes on a small machine.
PATIENCE_SECONDS = 600.0
STOP_SECONDS = 1.0
_LAUNCHER = Path(__file__).with_name("launcher.py")  # Linux only, so it is not imported
_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0
_LOOK_SECONDS = 10.0
_KEPT_LINES = 200
_LINE_BYTES = 8192
_UNIX_SOCKETS = sys.platform != "win32"
# what a llama-server and its router say to each other (server-models.cpp)
_EXIT = b"cmd_router_to_child:exit\n"
_STATE_LINE = b"cmd_child_to_router:state:"

Report = Callable[[float], None]


@dataclass(frozen=True)
class Restarting:
    """An engine crashed and is started again.

    Attributes:
        reason: a sentence.
        attempt: counted from 1.
        attempts: after so many it is given up.
        pause: seconds till then.
    """

    model: str
    reason: str
    attempt: int
    attempts: int
    pause: float


@dataclass(frozen=True)
class Restarted:
    """An engine that crashed answers again."""

    model: str


@dataclass(frozen=True)
class GivenUp:
    """An engine crashed too often."""

    model: str
    reason: str


EngineEvent = Restarting | Restarted | GivenUp


class Engine:
    """One model in a llama-server that only this program can reach.

    Args:
        program: llama-server.
        options: how it is started.
        folder: of this user alone, for its socket.
        write: gets the lines of its log.
        tell: gets what happens to it after the first start.
        pauses: seconds before each new start.
        patience: seconds after which an engine that answers nothing is ended, and started again.
        blame: asked first why the process ended, from a thread: for what it depends on outside of this machine.

    Attributes:
        state: whether it answers.
        failure: the sentence that says why it does not.
        error: what `failure` is of.
    """

    def __init__(
        self,
        program: Path,
        options: EngineOptions,
        folder: Path,
        write: Callable[[str], None] = lambda line: None,
        tell: Callable[[EngineEvent], None] = lambda event: None,
        pauses: tuple[float, ...] = PAUSES,
        patience: float = PATIENCE_SECONDS,
        blame: Callable[[], LocalmixError | None] = lambda: None,
    ) -> None:
        self.options = options
        self.state: EngineState = "loading"
        self.error: LocalmixError | None = None
        self._program = program
        self._folder = folder
        self._write = write
        self._tell = tell
        self._pauses = pauses
        self._patience = patience
        self._blame = blame
        self._address = EngineAddress()
        self._process: asyncio.subprocess.Process | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._report: Report = lambda share: None
        self._ready = asyncio.Event()
        self._over = asyncio.Event()
        self._supervision: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.options.name

    @property
    def embeddings(self) -> bool:
        """Whether it makes vectors instead of text."""
        return self.options.embeddings

    @property
    def address(self) -> EngineAddress:
        """Where it listens."""
        return self._address

    @property
    def failure(self) -> str | None:
        """Why it does not answer."""
        return self.error.message if self.error else None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, report: Report = lambda share: None) -> None:
        """Load the model; comes back when it answers, and from then on starts it again when it crashes.

        Args:
            report: called with the loaded share, 0 to 1.

        Raises:
            LocalmixError: llama-server ended before it answered; the sentence says why.
        """
        self._report = report
        self._supervision = asyncio.create_task(self._supervise(), name=f"engine {self.name}")
        self._supervision.add_done_callback(lambda _: self._over.set())
        await self.wait_ready()

    async def wait_ready(self) -> None:
        """Wait until it answers.

        Raises:
            LocalmixError: it does not, and will not.
        """
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._over.is_set():
            await self.wait_failed()
        if self.state == "failed" and self.error is not None:
            raise self.error

    async def wait_failed(self) -> None:
        """Wait until it is given up; a bug in its supervision is raised here."""
        await self._over.wait()
        if self._supervision is not None:
            await self._supervision

    async def stop(self) -> None:
        """End the process; harmless when it never started."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        await self._end_process()

    async def _supervise(self) -> None:
        crashes = 0
        while True:
            started = time.monotonic()
            try:
                await self._run(again=crashes > 0)
            except LocalmixError as error:
                self.error = error
            first_start = not self._ready.is_set() and crashes == 0
            self._ready.clear()
            if time.monotonic() - started > STEADY_SECONDS:
                crashes = 0
            if first_start or crashes == len(self._pauses):
                self.state = "failed"
                if not first_start:
                    self._tell(GivenUp(self.name, self.failure or ""))
                return
            self.state = "restarting"
            pause = self._pauses[crashes]
            crashes += 1
            self._tell(Restarting(self.name, self.failure or "", crashes, len(self._pauses), pause))
            await asyncio.sleep(pause)

    async def _run(self, again: bool) -> None:
        """One life of the process, from its start to its end.

        Raises:
            LocalmixError: why it ended.
        """
        self._lines.clear()
        process = await self._launch()
        reading = asyncio.create_task(self._read(process))
        try:
            answering = asyncio.create_task(self._until_healthy())
            ended = asyncio.create_task(process.wait())
            await asyncio.wait((answering, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                answering.cancel()
            else:
                self.state, self.error = "ready", None
                self._ready.set()
                if again:
                    self._tell(Restarted(self.name))
                await self._until_hung(ended)
                if not ended.done():
                    raise InputError(
                        f"{self.name}: its llama-server has answered nothing for {self._patience:g} seconds.",
                        "A grammar or a JSON schema that can be read in very many ways does that.",
                    )
            status = await ended
        finally:
            await self._end_process()
            await reading
        reason = await asyncio.to_thread(self._blame)
        raise reason or explain_end(status, list(self._lines), self.options.model, answered=self._ready.is_set())

    async def _launch(self) -> asyncio.subprocess.Process:
        if not os.access(self._program, os.X_OK):
            raise FileError(f"{self._program} cannot be started: it is gone, or no program.", HOW_TO_GET_IT)
        self._address = self._new_address()
        command = [str(self._program), *self.options.arguments(self._address)]
        if sys.platform == "linux":
            command = [sys.executable, "-I", str(_LAUNCHER), str(os.getpid()), *command]
        # it takes whoever started it for its router: it says how far it is, and ends when its stdin does
        variables = {**environment(self._address), "LLAMA_SERVER_ROUTER_PORT": "0"}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=variables,
                # Ctrl-C reaches a whole group; this program decides what it means
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            raise FileError(f"{self._program} cannot be started: {error.strerror}.", HOW_TO_GET_IT) from error
        return self._process

    def _new_address(self) -> EngineAddress:
        if _UNIX_SOCKETS:
            # a new name each time: a process that is going may still hold the old one
            return EngineAddress(self._folder / f"{secrets.token_hex(4)}.sock")
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            return EngineAddress(None, chosen.getsockname()[1], secrets.token_urlsafe(32))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Take the process's output to its end, line by line."""
        assert process.stdout is not None
        rest = b""
        while data := await process.stdout.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            rest = rest[-_LINE_BYTES:]
        self._take(rest)

    def _take(self, line: bytes) -> None:
        if line.startswith(_STATE_LINE):
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                payload = json.loads(line[len(_STATE_LINE) :]).get("payload")
                self._report(float(payload["value"]) if isinstance(payload, dict) and "value" in payload else 1.0)
            return
        text = line[:_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            self._write(text)

    async def _until_healthy(self) -> None:
        pause = _POLL_SECONDS
        while await self.ask("/health") != 200:
            await asyncio.sleep(pause)
            pause = min(pause * 1.1, _SLOWEST_POLL_SECONDS)

    async def _until_hung(self, ended: asyncio.Task[int]) -> None:
        """Wait until the process ends, or has answered nothing for too long; /health would not tell."""
        if any(argument.startswith("--sleep-idle-seconds") for argument in self.options.further):
            await asyncio.wait((ended,))  # questions would keep it awake
        while not ended.done():
            await asyncio.wait((ended,), timeout=_LOOK_SECONDS)
            try:
                await asyncio.wait_for(self._ask("/slots"), self._patience)
            except (TimeoutError, asyncio.TimeoutError):
                return
            except (OSError, ValueError):  # it is ending, or this program has too many files open
                continue

    async def ask(self, path: str) -> int:
        """The status that llama-server answers a GET with; 0 where it does not answer."""
        with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            return await asyncio.wait_for(self._ask(path), _ASK_SECONDS)
        return 0

    async def _ask(self, path: str) -> int:
        address = self._address
        if address.socket is not None:
            reader, writer = await asyncio.open_unix_connection(sock=await open_socket(address.socket, self._patience))
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
        try:
            key = f"Authorization: Bearer {address.key}\r\n" if address.key else ""
            # the chat page's files are compressed, and refused to who does not take that
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n{key}Connection: close\r\n\r\n"
            writer.write(head.encode())
            _, status, *_ = (await reader.readline()).split(maxsplit=2)
            return int(status)
        finally:
            writer.close()

    def _send(self, command: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(command)

    async def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        # while it loads it listens to signals only, later to its router; other versions know signals only
        loading = self.state == "loading"
        for end in (process.terminate if loading else lambda: self._send(_EXIT), process.terminate, process.kill):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    end()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), STOP_SECONDS)
        process.stdin.close()
        if self._address.socket is not None:
            self._address.socket.unlink(missing_ok=True)


# 0.00.023.133 E llama_model_load: error loading model: …
_LOGGED = re.compile(r"^(?:[\d.]+ (?P<level>[A-Z]) )?(?:\w+: +)?(?P<text>.*)$")
_FATAL = re.compile(r"GGML_ASSERT|GGML_ABORT|what\(\):|^terminate called")
_ARGUMENT = re.compile(r"^error: invalid argument: (.+)|^error while handling argument (.+)|^error: (.+)")


def explain_end(status: int, lines: Sequence[str], model: Path, answered: bool = False) -> LocalmixError:
    """Why a llama-server ended that nobody stopped.

    Args:
        status: as subprocess gives it: negative for a signal.
        lines: the last ones of its log.
        answered: whether it had loaded the model, so that its file and the settings are not to blame.
    """
    name, words = model.name, _reason(lines)
    if status in (-signal.SIGTERM, -signal.SIGINT) or not status:
        return InputError(f"{name}: somebody stopped its llama-server.")
    if status == -9:
        return CapacityError(f"{name}: llama-server was killed, most likely because memory ran out.", LESS_MEMORY)
    if any(phrase in line for line in lines for phrase in NO_MEMORY):
        return CapacityError(f"{name} does not fit into memory: {words}.", LESS_MEMORY)
    if answered:
        fatal = next((f": {last_words(line)}" for line in lines if _FATAL.search(line)), "")
        how = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
        return InputError(f"{name}: its llama-server crashed while it answered ({how}{fatal}).", "Its log has more.")
    found = next(filter(None, map(_ARGUMENT.match, lines)), None)
    if found and not found[3]:
        said = f"does not know the argument {found[1]}" if found[1] else f"refuses the argument {found[2]}"
        return UsageError(f"llama-server {said.rstrip('.')}.", "What stands behind -- goes to llama-server as it is.")
    error = explain_death(status, words, str(model))
    if isinstance(error, LocalmixError):
        return error
    if found:
        return InputError(
            f"llama-server refuses how {name} is to be served: {found[3].rstrip('.')}.", "Its log has more."
        )
    if words:
        return InputError(f"llama-server ended with {name}: {words}.", "Check the file with `localmix info`.")
    last = f": {lines[-1].strip().rstrip('.')}" if lines else ""
    return InputError(f"llama-server ended with {name}, status {status}{last}.", "Its log may say more.")


def _reason(lines: Sequence[str]) -> str:
    """The line that says why, without llama-server's time and place; empty where there is none."""
    for line in lines:
        if _FATAL.search(line):
            return last_words(line)
    for line in lines:
        found = _LOGGED.match(line)
        if found and found["level"] == "E":
            return found["text"].removeprefix("error loading model: ").strip().rstrip(".")
    return ""
