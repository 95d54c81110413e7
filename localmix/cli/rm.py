"""`localmix rm`: delete from the library."""

from __future__ import annotations

import click

from localmix.cli.console import Console
from localmix.cli.parameters import MODEL, examples, json_option


@click.command()
@click.argument("name", type=MODEL)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@examples("localmix rm tinymix:Q2_K", "localmix rm tinymix --yes")
def command(name: str, yes: bool, json: bool) -> None:
    """Delete a model, or one file of it, from the library.

    A checkpoint that came from the hub goes with its model; files outside the library are never touched.
    """
    from localmix import library
    from localmix.errors import Interrupted, UsageError
    from localmix.sizes import size

    console = Console(json)
    removal = library.plan_removal(name)
    names = [path.name for path in removal.files]
    what = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} and {len(names) - 10} more files"
    if not yes:
        if not console.can_ask:
            raise UsageError(f"{name} is not deleted without being asked.", f"Run `localmix rm {name} --yes`.")
        if not console.confirm(f"Delete {what} ({size(removal.bytes)})?"):
            raise Interrupted("Nothing was deleted.")
    library.remove(removal)
    console.result(
        {"name": name, "files": removal.files, "bytes": removal.bytes},
        lambda: console.line(f"Deleted {what} ({size(removal.bytes)})."),
    )
