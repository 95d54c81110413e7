"""`localmix fit`: see `localmix.capacity.fit`."""

from __future__ import annotations

import click

from localmix.cli.console import Console
from localmix.cli.parameters import (
    SET,
    TypesOrModel,
    examples,
    json_option,
    markdown_option,
)


@click.command()
@click.argument("words", metavar="[MODEL] [TYPE]…", nargs=-1, type=TypesOrModel())
@click.option("--set", "set_name", metavar="NAME", type=SET, help="All types of a named set.")
@click.option(
    "--ctx",
    "contexts",
    type=click.IntRange(1, 2**24),
    multiple=True,
    help="A column; may be given several times. Powers of two up to the trained context by default.",
)
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache.",
)
@click.option("--ram", metavar="SIZE", help="For a machine sold with so much memory; for this one by default.")
@markdown_option
@json_option
@examples(
    "localmix fit tinymix",
    "localmix fit ~/models/Mixtral-8x7B-v0.1 --set chinese-mixtral --ram 16",
    "localmix fit mixtral --kv-type q8_0 --ctx 8192 --ctx 32768",
)
def command(
    words: tuple[str, ...],
    set_name: str | None,
    contexts: tuple[int, ...],
    kv_type: str,
    ram: str | None,
    markdown: bool,
    json: bool,
) -> None:
    """Show which types of a model fit into memory, with which context.

    MODEL is a checkpoint folder, a folder with nothing but a config.json, a GGUF file, a name of the library, or a
    model of the hub such as mistralai/Mixtral-8x7B-v0.1, of which only the heads of the files are read.
    A cell says how much memory is needed, and "well" when everything stays there, "loads" when weights are read from
    the file again and again, which is slow, or "no".
    """
    from localmix import library
    from localmix.capacity import memory
    from localmix.capacity.fit import fit_table
    from localmix.cli.model_argument import located
    from localmix.cli.plan import sort_out
    from localmix.presentation.table import Column, Table
    from localmix.sizes import size_unit

    console = Console(json)
    model, names = sort_out(words, set_name)
    room = memory.machine(memory.parse_gigabytes(ram)) if ram else memory.available()
    # a model may have quantized files only
    purposes = (library.Purpose.SOURCE,) if names else (library.Purpose.SOURCE, library.Purpose.ANY)
    with located(console, model, *purposes) as at:
        found = fit_table(at.path, room, names=names or None, contexts=sorted(set(contexts)), kv_type=kv_type)

    document = {
        "path": at.name,
        "download_bytes": at.download_bytes,
        "available": found.room,
        "kv_type": kv_type,
        "simulated": found.simulated,
        "contexts": found.contexts,
        "types": [
            {
                "type": row.type,
                "weights": row.weights,
                "in_library": row.in_library,
                "cells": [
                    {"ctx": context, "total": need.total, "anonymous": need.anonymous, "verdict": verdict.value}
                    for context, need, verdict in zip(found.contexts, row.needs, row.verdicts, strict=True)
                ],
            }
            for row in found.rows
        ],
    }

    def draw() -> None:
        unit, unit_name = size_unit(need.total for row in found.rows for need in row.needs)
        columns = [Column("Type", number=False), *(Column(_short(context)) for context in found.contexts)]
        words = {memory.Verdict.RUNS_WELL: "well", memory.Verdict.LOADS: "loads", memory.Verdict.NO: "no"}
        rows = [
            (
                row.type + (" *" if row.in_library else ""),
                *(
                    f"{words[verdict]} {need.total / unit:.1f}"
                    for need, verdict in zip(row.needs, row.verdicts, strict=True)
                ),
            )
            for row in found.rows
        ]
        there = " * is in the library." if any(row.in_library for row in found.rows) else ""
        caption = (
            f"{unit_name} of memory by context, KV cache in {kv_type}{'' if found.simulated else ', by formula'}. There"
            f" are {room.bytes / 2**30:.1f} GiB: {room.limit}. well: all of it stays in memory; loads: weights are read"
            f" from the disk again and again; no: it does not load.{there}"
        )
        console.table(Table(tuple(columns), tuple(rows), caption), markdown)

    console.result(document, draw)


def _short(context: int) -> str:
    """2048 as 2K; what is no multiple of 1024 as it is."""
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)
