"""Jobs that tests run in a `MeasuringChild`: module-level, and cheap to import."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from localmix.errors import InputError
from localmix.measurement import peak_memory
from localmix.worker import Channel


def process_id(channel: Channel) -> int:
    return os.getpid()


def count(channel: Channel, limit: int) -> int:
    for number in range(limit):
        channel.emit(number)
        channel.progress(number + 1, limit, "numbers")
    return limit


def refuse(channel: Channel, path: Path) -> None:
    raise InputError(f"{path} is refused.")


def complain_and_die(channel: Channel, path: Path, complaint: str) -> None:
    os.write(2, complaint.encode())
    os.abort()


def complain(channel: Channel, complaint: str) -> None:
    os.write(2, complaint.encode())


def fail(channel: Channel) -> None:
    raise ZeroDivisionError


def hold(channel: Channel, megabytes: int) -> int:
    """The peak while so much is held."""
    held = np.ones(megabytes << 20, np.uint8)  # zeros would not be touched
    assert held[-1]
    return peak_memory.peak()
