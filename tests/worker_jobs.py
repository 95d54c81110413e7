"""Jobs that tests/test_worker.py runs in real children: module-level, and cheap to import."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import InputError
from localmix.worker import Channel


@dataclass(frozen=True)
class Square:
    number: int
    square: int


def squares(channel: Channel, limit: int) -> int:
    total = 0
    for number in range(limit):
        channel.emit(Square(number, number * number))
        channel.progress(number + 1, limit, "squares")
        total += number * number
    return total


def echo(channel: Channel) -> None:
    """Answer each message, one character at a time, until cancelled."""
    while True:
        message = channel.receive()
        if message is None:
            return
        for character in message:
            if channel.cancelled():
                break
            channel.emit(character)
            if message.isupper():
                time.sleep(0.05)
        channel.emit("")


def die_by(channel: Channel, number: int, path: Path) -> None:
    os.write(2, b"/build/src/llama-vocab.cpp:12: GGML_ASSERT(size == other) failed\n")
    os.kill(os.getpid(), number)
    time.sleep(10)


def read_beyond_the_file(channel: Channel, path: Path) -> int:
    """What llama.cpp meets when a file shrinks while it is mapped: SIGBUS, from real memory."""
    import mmap

    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0)
        os.truncate(path, 0)
        return view[100_000]


def follow_a_null_pointer(channel: Channel, path: Path) -> None:
    ctypes.string_at(8)


def print_and_abort(channel: Channel, path: Path) -> None:
    print("noise on stdout", flush=True)
    os.write(1, b"noise on fd 1\n")
    os.write(2, b"terminate called after throwing an instance of 'std::out_of_range'\n  what():  no such token\n")
    ctypes.CDLL(None).abort()


def fail_with(channel: Channel, kind: str) -> None:
    if kind == "input":
        raise InputError("config.json is empty.", "Copy it again.")
    if kind == "memory":
        raise MemoryError
    raise KeyError("a bug")


def sleep_forever(channel: Channel) -> None:
    channel.emit(os.getpid())
    while True:
        time.sleep(0.05)
        channel.check()


def sleep_deaf(channel: Channel) -> None:
    channel.emit(os.getpid())
    while True:
        time.sleep(1)


def report_signals(channel: Channel) -> tuple[bool, bool]:
    os.kill(os.getpid(), signal.SIGINT)
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "__mp_main__" in sys.modules


def own_environment(channel: Channel) -> tuple[dict[str, str], list[str]]:
    return dict(os.environ), sorted(sys.modules)


def load_native(channel: Channel) -> float:
    from localmix.native.library import api

    api()
    return time.time()
