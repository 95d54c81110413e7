"""Bytes as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

MIB = 2**20
GIB = 2**30


def size(count: int) -> str:
    """Bytes for people, unit named: GiB, or MiB and KiB for what is too small for it to say anything."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1024:.1f} KiB"


def size_unit(counts: Iterable[int]) -> tuple[int, str]:
    """The one unit for a column of sizes: (bytes, name). GiB unless the largest is below a tenth of it."""
    return (GIB, "GiB") if max(counts, default=GIB) >= GIB / 10 else (MIB, "MiB")


def size_column(counts: Sequence[int]) -> tuple[str, Callable[[int], str]]:
    """The unit of a column of sizes and how its cells are written.

    Without a unit in common, for a file of 3 MiB beside one of 11 GiB, the unit is empty and the cells name theirs.
    """
    unit, name = size_unit(counts)
    if min(counts, default=unit) < unit / 100:
        return "", size
    return name, lambda count: f"{count / unit:.2f}"
