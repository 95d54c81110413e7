"""Run a native job in a child process: events out, messages and cancel in, deaths turned into sentences.

llama.cpp aborts on a bad vocabulary, the kernel kills what outgrows memory, and a file truncated under
mmap raises SIGBUS: Python cannot catch any of them. So whatever loads a model runs in a child. The parent
owns the terminal and the signals, the child owns the model, and dies with its parent.

    def count(channel: Channel, limit: int) -> int:      # a module-level function
        for number in range(limit):
            channel.check()                              # raises Interrupted after Worker.cancel()
            channel.emit(number)
        return limit

    with Worker(count, 3) as worker:
        for event in worker:
            ...
    worker.result
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from localmix.errors import CapacityError, InputError, Interrupted, LocalmixError

Result = TypeVar("Result")
Report = Callable[[int, int, str], None]

GRACE_SECONDS = 2.0  # how long a cancelled child may take before it is killed
POLL_SECONDS = 0.2  # a blocked wait cannot be interrupted by Ctrl-C on Windows
LOG_BYTES = 65536  # how much of the child's output is searched for its last words
READY = b"localmix worker ready\n"
LESS_MEMORY = "Close other programs, or choose a smaller type or context."
ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # else an abort starts a debugger, where one is installed
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would spin on the cores that llama.cpp's threads need
}
# The user's own value of these counts. llama.cpp's threads wait for each other hundreds of times per token. libgomp has
# them spin for milliseconds first, on cores that other programs may want, or that the thread waited for may want: on a
# machine with much to do that is 20 times as slow. This many rounds, some 60 µs, cost a few percent alone at most
# (docs/chat.md).
WAITING = {"GOMP_SPINCOUNT": "2000"}
STOP = sys.maxsize  # a cancel that covers every message to come

# asked first why a child died: for what children depend on outside of this machine
death_reasons: list[Callable[[], LocalmixError | None]] = []


@dataclass(frozen=True)
class Progress:
    """An event that says how far a job is: `done` of `total` units of what `label` names."""

    done: int
    total: int
    label: str


class WorkerFailure(Exception):
    """A bug in the child, or a death that nothing explains; the text holds the child's traceback or log."""


class Channel:
    """The child's end: what a job uses to tell and to listen."""

    def __init__(self, requests: IO[bytes], events: IO[bytes]) -> None:
        self._requests = requests
        self._events = events
        self._write_lock = threading.Lock()
        self._messages: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._current = 0  # the message being worked on; 0 is the call itself
        self._cancelled = -1  # the last message that a cancel covers

    def emit(self, event: object) -> None:
        """Send an event (anything that pickles) to the parent, which iterates over them."""
        self._write("event", event)

    def progress(self, done: int, total: int, label: str) -> None:
        """Send a `Progress` event; has the signature of every `progress` argument in localmix."""
        self.emit(Progress(done, total, label))

    def receive(self) -> Any:
        """The next message of `Worker.send`, waiting for it; a cancel of earlier ones no longer counts.

        Raises:
            Interrupted: the parent wants the job to end.
        """
        number, message = self._messages.get()
        self._current = number
        if number == STOP:
            raise Interrupted("The job was stopped.")
        return message

    def cancelled(self) -> bool:
        """Whether the parent called `cancel` since it sent the message being worked on."""
        return self._cancelled >= self._current

    def check(self) -> None:
        """Raise Interrupted if the parent called `cancel`: for loops that should end early."""
        if self.cancelled():
            raise Interrupted("The run was stopped.")

    def _write(self, kind: str, value: object) -> None:
        data = pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
        with self._write_lock:
            try:
                self._events.write(data)
                self._events.flush()
            except OSError:  # the parent is gone
                os._exit(1)

    def _listen(self) -> None:
        """Take requests until the parent's end closes, which it does by dying: then die too."""
        while True:
            try:
                kind, number, value = pickle.load(self._requests)
            except Exception:
                os._exit(1)
            if kind == "message":
                self._messages.put((number, value))
                continue
            self._cancelled = max(self._cancelled, number)
            if number == STOP:
                self._messages.put((STOP, None))


def child_main() -> None:
    """Entry of the child: read the call, run it, write its result. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    requests = os.fdopen(os.dup(0), "rb")
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the parent gave a file as stderr: native prints never reach the terminal
    _make_expendable()
    events.write(READY)
    channel = Channel(requests, events)
    try:
        _write_log_through()
        function, args, kwargs = pickle.load(requests)
        threading.Thread(target=channel._listen, daemon=True).start()
        result = function(channel, *args, **kwargs)
        channel._write("result", result)
    except LocalmixError as error:
        channel._write("error", error)
    except MemoryError:
        channel._write("error", CapacityError("Not enough memory.", LESS_MEMORY))
    except BaseException:
        channel._write("bug", traceback.format_exc())
    # No interpreter teardown: models are freed by their context managers, and the rest is the system's.
    os._exit(0)


def _make_expendable() -> None:
    """No core file of a process that maps a whole model, and on Linux the first to go when memory ends."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/oom_score_adj").write_text("500")


def _write_log_through() -> None:
    """Have llama.cpp's log also go to stderr, the parent's file: it must survive an abort."""
    from localmix.native import library

    class WrittenLog(library.LogBuffer):
        def add(self, level: int, text: str) -> None:
            if level >= library.LOG_INFO:
                os.write(2, text.encode("utf-8", "replace"))
            super().add(level, text)

    library.log = WrittenLog()


class Worker:
    """A module-level function running in a child process; iterate over it to get its events.

    The iterator may be left and entered again (after Ctrl-C, say): no event is lost. When it ends, `result`
    holds what the function returned. Leaving the `with` block stops the child: cancel, two seconds, kill.

    Args:
        function: called in the child as `function(channel, *args, **kwargs)`; importable by its name.
        args, kwargs: anything that pickles.
        subject: the file that error sentences name; by default the first Path among `args`. It may be set later.

    Raises (while iterating):
        LocalmixError: raised by the function itself, unchanged.
        InputError: the child aborted or crashed in native code.
        CapacityError: the child was killed, most likely for want of memory.
        WorkerFailure: any other exception in the child: a bug.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, subject: str | Path | None = None, **kwargs: Any
    ) -> None:
        if function.__module__ == "__main__":
            raise ValueError(f"{function.__qualname__} must be in an importable module, not in __main__")
        self._call = pickle.dumps((function, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        if subject is None:
            subject = next((value for value in args if isinstance(value, Path)), None)
        self.subject = str(subject) if subject is not None else ""
        # simple: a signal in the middle of a Queue's get leaves it locked, and its reader waits for ever
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._sent = 0
        self._logged = 0
        self._finished = False
        self._reason: LocalmixError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.result: Any = None

    def __enter__(self) -> Worker:
        path = [entry or os.getcwd() for entry in sys.path]
        # Not multiprocessing's spawn: it would import the parent's __main__ again in the child.
        program = f"import sys; sys.path[:] = {path!r}; from localmix.worker import child_main; child_main()"
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**WAITING, **os.environ, **ENVIRONMENT},
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        running.add(self)
        self._request(self._call)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        process = self._started()
        try:
            if process.poll() is None and not self._finished:
                self._cancel(STOP)
            self._wait()
        finally:
            running.discard(self)
            if process.poll() is None:
                process.kill()
                process.wait()
            self._reader.join()
            for stream in (process.stdin, process.stdout, self._log):
                with contextlib.suppress(OSError):  # a request that the dead child never took
                    stream.close()  # type: ignore[union-attr]

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._started().pid

    def send(self, message: object) -> None:
        """Give the child a message, for its `channel.receive`.

        What it logged before does not count as its last words any more.
        """
        self._sent += 1
        self._logged = os.fstat(self._log.fileno()).st_size
        self._request(pickle.dumps(("message", self._sent, message), protocol=pickle.HIGHEST_PROTOCOL))

    def kill(self) -> None:
        """End the child where it stands; safe from any thread."""
        self._started().kill()

    def condemn(self, reason: LocalmixError, seconds: float) -> None:
        """Name what the child dies of, and end it after so long, if it lives on; safe from any thread."""
        self._reason = reason
        timer = threading.Timer(seconds, self.kill)
        timer.daemon = True
        timer.start()

    def cancel(self) -> None:
        """Ask the child to stop what it does for the last message (or for the call, if none was sent)."""
        self._cancel(self._sent)

    def post(self, event: object) -> None:
        """Put an event of the parent's own behind those of the child that have come; safe from any thread."""
        self._events.put(("event", event))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._finished:
            raise StopIteration
        while True:
            try:
                kind, value = self._events.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                continue
        if kind == "event":
            return value
        self._finished = True
        if kind == "result":
            self.result = value
            raise StopIteration
        if kind == "error":
            raise value
        if kind == "bug":
            raise WorkerFailure(f"in the worker:\n{value}")
        raise self._explain_death()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("a Worker runs inside its with block")
        return self._process

    def _cancel(self, number: int) -> None:
        self._request(pickle.dumps(("cancel", number, None), protocol=pickle.HIGHEST_PROTOCOL))

    def _request(self, data: bytes) -> None:
        stream = self._started().stdin
        assert stream is not None
        try:
            stream.write(data)
            stream.flush()
        except OSError:  # the child is dead: the iteration says why
            pass

    def _read(self) -> None:
        """Move the child's events to the queue; a thread, so that Ctrl-C never tears a message apart."""
        stream = self._started().stdout
        assert stream is not None
        try:
            # anything that start-up hooks of the interpreter print comes before the mark
            while (line := stream.readline()) and line != READY:
                pass
            while True:
                self._events.put(pickle.load(stream))
        except (EOFError, OSError, pickle.UnpicklingError):
            self._events.put(("end", None))
        except Exception:
            self._events.put(("bug", traceback.format_exc()))

    def _wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._started().wait(timeout=GRACE_SECONDS)

    def _explain_death(self) -> Exception:
        self._wait()
        process = self._started()
        if process.poll() is None:  # it closed its end without dying
            process.kill()
        if self._reason is not None:
            return self._reason
        for explain in death_reasons:
            if (reason := explain()) is not None:
                return reason
        self._log.seek(max(self._logged, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        log = self._log.read().decode("utf-8", "replace")
        return explain_death(process.wait(), log, self.subject)


# the children there are
running: set[Worker] = set()

# The same deaths on Windows, by exit status: abort, access violation, fast fail, in-page error.
WINDOWS_STATUS = {3: "SIGABRT", 0xC0000005: "SIGSEGV", 0xC0000409: "SIGABRT", 0xC0000006: "SIGBUS"}


def explain_death(status: int, log: str, subject: str) -> Exception:
    """The error for a child that died without a result.

    Args:
        status: the exit status as subprocess gives it: negative for a signal.
        log: what the child and llama.cpp wrote last.
        subject: the file to name, or "".
    """
    try:
        name = signal.Signals(-status).name if status < 0 else WINDOWS_STATUS.get(status, "")
    except ValueError:
        name = f"signal {-status}"
    file = subject or "The model"
    words = last_words(log)
    said = f": {words}" if words else ""
    check = "Check the file with `localmix info`, or convert it again."
    if name in ("SIGABRT", "SIGILL", "SIGFPE"):
        return InputError(f"{file} makes llama.cpp abort{said}.", check)
    if name == "SIGKILL":
        return CapacityError(
            f"{file}: the worker was killed, most likely because memory ran out.",
            LESS_MEMORY,
        )
    if name == "SIGBUS":
        return InputError(f"{file} could not be read to its end: it is truncated, or its disk failed.", check)
    if name == "SIGSEGV":
        return InputError(
            f"{file} makes llama.cpp crash (SIGSEGV{said}).",
            f"{check} If it is sound, this is a bug: report it.",
        )
    if name in ("SIGTERM", "SIGHUP", "SIGINT"):
        return Interrupted(f"{file}: the worker was stopped ({name}).")
    return WorkerFailure(f"the worker ended with status {name or status}; its last output:\n{log[-4000:]}")


REASON = re.compile(r"GGML_ASSERT|GGML_ABORT|what\(\):|error loading model|error: |failed", re.IGNORECASE)


def last_words(log: str) -> str:
    """The line of a native log that says why the process died, without the build machine's folders."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reasons = [line for line in lines if REASON.search(line)]
    words = (reasons or lines or [""])[-1]
    words = re.sub(r"^\S*[/\\](\S+?:\d+: )", r"\1", words)
    return words.removeprefix("what():").strip().rstrip(".")


def run(
    function: Callable[..., Result],
    *args: Any,
    progress: Report | None = None,
    subject: str | Path | None = None,
    **kwargs: Any,
) -> Result:
    """Run `function(channel, *args, **kwargs)` in a child to its end.

    Args:
        progress: called here, in the parent, for each `channel.progress` there.
        subject: as in `Worker`.

    Returns:
        What the function returned.

    Raises:
        As `Worker`, and KeyboardInterrupt after Ctrl-C, when the child is gone.
    """
    with Worker(function, *args, subject=subject, **kwargs) as worker:
        for event in worker:
            if progress is not None and isinstance(event, Progress):
                progress(event.done, event.total, event.label)
    result: Result = worker.result
    return result
