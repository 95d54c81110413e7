"""`localmix ls`: the models of the library."""

from __future__ import annotations

import click

from localmix.cli.console import Console
from localmix.cli.parameters import examples, json_option


@click.command()
@json_option
@examples("localmix ls")
def command(json: bool) -> None:
    """List the models of the library, with the size of each file."""
    from localmix import library
    from localmix.presentation.table import Column, Table
    from localmix.sizes import size

    console = Console(json)
    models = library.models()

    def draw() -> None:
        if not models:
            console.note(f"The library {library.home()} is empty. `localmix convert FOLDER` makes the first model.")
            return
        rows = []
        for model in models:
            rows += [(file.name, size(file.bytes), file.path.name) for file in model.files]
            if model.pulled_bytes:
                whole = model.checkpoint and not any(library.pulled_folder(model.name).glob(".*.part"))
                what = "checkpoint" if whole else "unfinished"
                rows.append((f"{model.name} ({what})", size(model.pulled_bytes), f"{model.name}/"))
            if model.imatrix:
                taken = size(model.imatrix.stat().st_size)
                rows.append((f"{model.name} (imatrix)", taken, model.imatrix.name))
        columns = (Column("Model", number=False), Column("Size"), Column("File", number=False))
        total = size(sum(model.bytes for model in models))
        console.table(Table(columns, tuple(rows), f"{total} in {library.home()}"))

    console.result({"path": library.home(), "models": models}, draw)
