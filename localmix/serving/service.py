"""`localmix serve` as one program: the gateway, the engines behind it, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import filelock

from localmix.errors import LocalmixError
from localmix.serving.engine import Engine, EngineEvent
from localmix.serving.gateway import Access, Gateway
from localmix.serving.policy import Policy

DRAIN_SECONDS = 60.0
_SAID_AFTER_SECONDS = 0.3  # what ends sooner needs no word
_FOLDER, _LOCK = "localmix-serve-", "lock"
_SETTLED_SECONDS = 10.0  # a folder that is younger may not have its lock yet
_OTHER_FILES = 256  # of this program, beside two for each client: its own connection and that to an engine
_LONGEST_SOCKET = 100  # bytes; the system's structures have room for 104 to 108


@dataclass(frozen=True)
class Listening:
    """The gateway listens; nothing answers yet."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """What to type into a browser on this machine."""
        address = ipaddress.ip_address(self.host.partition("%")[0])
        if address.is_unspecified:
            return f"http://localhost:{self.port}"
        return f"http://[{self.host}]:{self.port}" if address.version == 6 else f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Loading:
    """A model is being read: the share that is done, 0 to 1."""

    model: str
    share: float


@dataclass(frozen=True)
class Ready:
    """Everything answers.

    Attributes:
        page: whether there is a chat page.
    """

    url: str
    models: tuple[str, ...]
    page: bool


@dataclass(frozen=True)
class Draining:
    """No request is taken any more, and those that run come to their end."""


@dataclass(frozen=True)
class Stopped:
    """The end.

    Attributes:
        cut: requests that did not come to theirs.
    """

    cut: int


Event = Listening | Loading | Ready | Draining | Stopped | EngineEvent


class Stop:
    """Somebody wants the program to end: a first call lets requests end, a second one does not wait."""

    def __init__(self) -> None:
        self.politely = asyncio.Event()
        self.at_once = asyncio.Event()

    def __call__(self) -> None:
        (self.at_once if self.politely.is_set() else self.politely).set()


async def run(
    engines: Sequence[Engine],
    policy: Policy,
    log: Callable[[Access], None],
    tell: Callable[[Event], None],
    stop: Stop,
) -> None:
    """Serve until somebody calls `stop`.

    Args:
        engines: not started yet; they are loaded one after the other.
        policy: who may talk to the gateway.
        log: gets a record of every request.
        tell: gets what happens.

    Raises:
        UsageError: nothing can listen there.
        LocalmixError: an engine does not start, or all of them were given up.
    """
    allow_files(2 * policy.connections + _OTHER_FILES)
    gateway = Gateway(engines, policy, log)
    try:
        listening = Listening(*await gateway.start())
        tell(listening)
        for engine in engines:
            if not await _unless(stop.politely, _load(engine, tell)):
                break
        else:
            tell(Ready(listening.url, tuple(engine.name for engine in engines), await _has_page(engines)))
            await _unless(stop.politely, _until_all_failed(engines))
            tell(Stopped(await _drain(gateway, tell, stop)))
    finally:
        await gateway.stop()
        await asyncio.gather(*(engine.stop() for engine in engines))


@contextlib.contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP call `stop`, in a running loop; those that are ignored stay so."""
    loop = asyncio.get_running_loop()

    def take(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)

    numbers = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this user alone for sockets; what killed runs left of theirs goes."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + 40 > _LONGEST_SOCKET:
        base = Path("/tmp")
    for left in base.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError, filelock.Timeout):
            if time.time() - left.stat().st_mtime > _SETTLED_SECONDS:
                with filelock.FileLock(left / _LOCK, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=base))
    try:
        # the system's: it goes with its process, however that ends, and counts between containers, too
        with filelock.FileLock(folder / _LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def allow_files(count: int) -> None:
    """Let this program have so many files open, if the system does: usual limits are 256 and 1024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        more = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))


def new_key() -> str:
    """A key that nobody guesses."""
    return secrets.token_urlsafe(24)


async def _load(engine: Engine, tell: Callable[[Event], None]) -> None:
    tell(Loading(engine.name, 0.0))
    await engine.start(lambda share: tell(Loading(engine.name, share)))


async def _has_page(engines: Sequence[Engine]) -> bool:
    talkers = [engine for engine in engines if not engine.embeddings]
    return bool(talkers) and await talkers[0].ask("/") == 200


async def _until_all_failed(engines: Sequence[Engine]) -> None:
    await asyncio.gather(*(engine.wait_failed() for engine in engines))
    error = engines[0].error
    assert isinstance(error, LocalmixError)
    raise error


async def _unless(event: asyncio.Event, work: Coroutine[object, object, None]) -> bool:
    """Do some work, unless an event comes first; whether it was done.

    Raises:
        What the work raises.
    """
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def _drain(gateway: Gateway, tell: Callable[[Event], None], stop: Stop) -> int:
    """Let what runs end, till somebody does not want to wait; how many requests were cut."""
    draining = asyncio.create_task(gateway.drain(DRAIN_SECONDS))
    hurry = asyncio.create_task(stop.at_once.wait())
    try:
        done, _ = await asyncio.wait((draining, hurry), timeout=_SAID_AFTER_SECONDS)
        if not done:
            tell(Draining())
            await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            return draining.result()
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        return await gateway.drain(0)
    finally:
        hurry.cancel()
