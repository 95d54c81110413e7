"""Target: how large an output may become, as the user says it: `12GiB`, `2799104B` or `3.5bpw`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from localmix.errors import UsageError

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SPELLED = {"B": "B", "KB": "KB", "MB": "MB", "GB": "GB", "KIB": "KiB", "MIB": "MiB", "GIB": "GiB"}
_TARGET = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,15})?)\s*(?P<unit>BPW|[KMG]I?B?|B)", re.IGNORECASE)


class Sized(Protocol):
    """What has the size of an output, such as a plan."""

    @property
    def file_bytes(self) -> int:
        """Bytes of its files."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of its tensors."""


@dataclass(frozen=True)
class Target:
    """The most that an output may have: bytes of its files, or bits of a weight.

    Attributes:
        name: as files are called after it: `12.0GiB`, `3.50bpw`.
        bytes: of all files, heads and padding counted; None for bits.
        bits: mean bits of a weight, as `llama-quantize` counts them: without head and padding; None for bytes.
        room: what it is to fit into, for people; empty for a target that the user named.
    """

    name: str
    bytes: int | None = None
    bits: float | None = None
    room: str = ""

    def limit(self, parameters: int) -> int:
        """The bytes that `measure` may give."""
        return self.bytes if self.bytes is not None else int((self.bits or 0) * parameters / 8)

    def measure(self, output: Sized) -> int:
        """The bytes of an output that count."""
        return output.file_bytes if self.bytes is not None else output.weight_bytes

    def describe(self, counted: int, parameters: int) -> str:
        """So many bytes as the target is given: bits of a weight, or a size."""
        if self.bits is not None:
            return f"{counted * 8 / parameters:.3f} bpw"
        unit, name = (2**30, "GiB") if counted >= 2**30 else (2**20, "MiB")
        return f"{counted / unit:.3f} {name} ({counted:,} bytes)"


def parse_target(text: str) -> Target:
    """A target as it is written on the command line; a bare K, M or G is decimal, as in llama.cpp's tools.

    Raises:
        UsageError: it is neither a size nor bits of a weight.
    """
    match = _TARGET.fullmatch(text.strip())
    if match is None or not float(match["number"]):
        raise UsageError(
            f"{text!r} is no target.", "Write a size such as 12GiB or 2799104B, or bits of a weight such as 3.5bpw."
        )
    unit = match["unit"].upper()
    if unit == "BPW":
        bits = float(match["number"])
        return Target(f"{_with_decimals(match['number'], 2)}bpw", bits=bits)
    unit = unit if unit.endswith("B") else f"{unit}B"
    size = int(float(match["number"]) * _BYTES[unit])
    number = str(size) if unit == "B" else _with_decimals(match["number"], 1)
    return Target(f"{number}{_SPELLED[unit]}", bytes=size)


def _with_decimals(number: str, least: int) -> str:
    """`12` as `12.0`, `3.5000` as `3.50`."""
    whole, _, decimals = number.partition(".")
    return f"{int(whole)}.{decimals.rstrip('0').ljust(least, '0')}"
