"""`localmix info`: see `localmix.inspection`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from localmix.cli.console import Console
from localmix.cli.parameters import MODEL, examples, json_option


@click.command()
@click.argument("model", metavar="[FILE|DIR|REPO]", type=MODEL, required=False)
@click.option("--tensors", "all_tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template.")
@click.option("--sha256", is_flag=True, help="Compute the checksum of every file with weights.")
@json_option
@examples(
    "localmix info tinymix:Q4_K_M",
    "localmix info examples/tinymix --tensors",
    "localmix info model.gguf --sha256",
    "localmix info mistralai/Mixtral-8x7B-v0.1",
)
def command(model: str | None, all_tensors: bool, template: bool, sha256: bool, json: bool) -> None:
    """Show what a GGUF file or a checkpoint holds: metadata, types, tensors, chat template, checksums.

    Of a model of the hub only the heads of the files are read; its checksums are those that the hub has.
    """
    from localmix import library
    from localmix.cli.model_argument import located
    from localmix.inspection import FileSummary, inspect
    from localmix.presentation.table import Column, Table, number
    from localmix.sizes import size, size_unit

    console = Console(json)
    with located(console, model, library.Purpose.ANY) as at, console.progress() as progress:
        found = inspect(at.path, sha256=sha256 and not at.files, progress=progress)
    if at.files:
        files = tuple(FileSummary(Path(file.name), file.bytes, file.sha256 or None) for file in at.files)
        found = replace(found, path=Path(at.name), files=files)

    def draw() -> None:
        for note in found.notes:
            console.warn(note)
        console.fields(
            {
                "path": str(found.path),
                "model": f"{found.architecture}, {found.parameters:,} parameters in {len(found.tensors)} tensors",
                "weights": f"{size(found.bytes)}, {number(found.bpw, 2)} bits per weight",
                **{f"sha256 {file.path.name}": file.sha256 for file in found.files if file.sha256 is not None},
            }
        )
        console.line()
        console.fields({key: _shown(value) for key, value in found.metadata.items()})
        console.line()
        unit, unit_name = size_unit(kind.bytes for kind in found.types)
        columns = (Column("Type", number=False), Column("Tensors"), Column("Parameters"), Column(unit_name))
        console.table(
            Table(
                columns,
                tuple(
                    (kind.type, str(kind.tensors), f"{kind.parameters:,}", f"{kind.bytes / unit:.2f}")
                    for kind in found.types
                ),
            )
        )
        if all_tensors:
            console.line()
            columns = (
                Column("Tensor", number=False),
                Column("Shape"),
                Column("Type", number=False),
                Column("Bytes"),
            )
            console.table(
                Table(
                    columns,
                    tuple(
                        (tensor.name, " x ".join(map(str, tensor.shape)), tensor.type, f"{tensor.bytes:,}")
                        for tensor in found.tensors
                    ),
                )
            )
        if template:
            console.line()
            console.line(found.chat_template or "There is no chat template.")
        elif found.chat_template:
            console.note("It has a chat template: --template prints it.")

    console.result(found, draw)


def _shown(value: Any) -> str:
    """A metadata value on one line; of a long one the beginning."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = ", ".join(str(item) for item in value[:6])
        return f"[{items}, …] ({len(value)})" if len(value) > 6 else f"[{items}]"
    text = str(value).replace("\n", "⏎")
    return text if len(text) <= 100 else f"{text[:99]}…"
