"""`localmix bench --types` without a model: see `localmix.measurement.type_speed`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmix.cli.console import Console

if TYPE_CHECKING:
    from localmix.measurement.type_speed import TypeSpeeds
    from localmix.presentation.table import Table
    from localmix.tensor_types import TensorType

ALL = "all"


def bench_types(console: Console, words: str, threads: int | None, again: bool, csv: bool, markdown: bool) -> None:
    """Measure tensor types and print a table of them.

    Args:
        words: types with commas between, or `ALL`.

    Raises:
        UsageError: a word is no type.
        As `type_speed.measure`.
    """
    from localmix.measurement.type_speed import measure
    from localmix.tensor_types import TensorType

    types = _types(words)
    with console.progress() as progress:
        found = measure({*types, TensorType.Q4_K}, threads, again, progress)
    table = _table(types, found)

    def draw() -> None:
        if csv:
            console.raw(table.csv())
        else:
            console.table(table, markdown)

    machine = {"processor": found.processor, "engine": found.engine, "threads": found.threads}
    state = {"kept": found.kept, "others": found.others, "busy": found.busy}
    console.result({**machine, **state, "rows": table.records}, draw)
    if found.busy:
        console.warn(
            f"Other programs used {found.others:.0%} of the processor, and the figures did not settle: some may be far"
            " too slow. They are not kept."
        )


def _types(words: str) -> list[TensorType]:
    """The types that are meant, each once; all of them from the largest to the smallest."""
    from localmix.errors import UsageError
    from localmix.presets import tensor_type
    from localmix.tensor_types import ENCODABLE, bits

    if words.strip().lower() == ALL:
        return sorted(ENCODABLE, key=lambda kind: (-bits(kind), kind))
    types = list(dict.fromkeys(tensor_type(word.strip()) for word in words.split(",") if word.strip()))
    if not types:
        raise UsageError("No type was named.", "`localmix bench --types` measures all of them.")
    return types


def _table(types: list[TensorType], found: TypeSpeeds) -> Table:
    from localmix.native.weight_ring import COLUMNS, ROWS
    from localmix.presentation.table import Column, Table
    from localmix.tensor_types import TensorType, bits

    base = found.seconds[TensorType.Q4_K]
    records: tuple[dict[str, str | float | None], ...] = tuple(
        {
            "type": kind.name,
            "bpw": bits(kind),
            "gb_per_s": bits(kind) / 8 / found.seconds[kind] / 1e9,
            "ns_per_1000_weights": 1e12 * found.seconds[kind],
            "against_q4_k": found.seconds[kind] / base,
        }
        for kind in types
    )
    columns = (
        Column("Type", number=False),
        Column("BPW"),
        Column("GB/s"),
        Column("ns/1000 weights"),
        Column("Time ÷ Q4_K"),
    )
    rows = tuple(
        (
            kind.name,
            f"{bits(kind):.2f}",
            f"{bits(kind) / 8 / found.seconds[kind] / 1e9:.1f}",
            f"{1e12 * found.seconds[kind]:.1f}",
            f"{found.seconds[kind] / base:.2f}",
        )
        for kind in types
    )
    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    how = f"a vector times matrices of {ROWS} × {COLUMNS} that no cache holds, the quickest of many turns"
    kept = " Measured earlier; --again measures anew." if found.kept else ""
    return Table(columns, rows, f"{found.processor}; {threads}; {found.engine}; {how}.{kept}", records=records)
