"""`localmix pull`: see `localmix.downloads.pull`."""

from __future__ import annotations

import click

from localmix.cli.console import BYTES, Console
from localmix.cli.parameters import examples, json_option


@click.command()
@click.argument("repository", metavar="REPO")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit; main by default.")
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Only files whose name matches, such as '*Q4_K_M*'; may be given several times.",
)
@json_option
@examples(
    "localmix pull mistralai/Mixtral-8x7B-v0.1",
    "localmix pull TheBloke/Mixtral-8x7B-v0.1-GGUF:Q4_K_M",
    "localmix pull sentence-transformers/all-MiniLM-L6-v2 --revision main",
)
def command(repository: str, revision: str | None, include: tuple[str, ...], json: bool) -> None:
    """Fetch a model of the Hugging Face hub into the library, and check every file.

    REPO is a checkpoint such as mistralai/Mixtral-8x7B-v0.1; with :TYPE it is one of the repository's GGUF files.
    A run that was stopped goes on where it was when the same command is given again. `localmix quantize TYPE REPO`
    quantizes while it fetches, and needs no room for the checkpoint.

    The hub's own variables are heeded: HF_TOKEN for gated and private models, HF_ENDPOINT for a mirror,
    HF_HUB_OFFLINE to stay off the network.
    """
    from localmix.downloads.pull import pull
    from localmix.errors import Interrupted
    from localmix.sizes import size

    console = Console(json)
    try:
        with console.progress(BYTES) as progress:
            pulled = pull(repository, revision=revision, include=include, progress=progress)
    except KeyboardInterrupt as stopped:
        raise Interrupted("Stopped; what has come stays.", "The same command goes on from there.") from stopped
    fetched = sum(file.bytes for file in pulled.files if file.fetched)

    def draw() -> None:
        files = "1 file, checked" if len(pulled.files) == 1 else f"{len(pulled.files)} files, all checked"
        here = "" if fetched == pulled.bytes else f", {size(pulled.bytes - fetched)} of it was here already"
        console.fields(
            {
                "path": str(pulled.path),
                "model": f"{pulled.name}, from {pulled.repository} at {pulled.commit[:12]}",
                "size": f"{size(pulled.bytes)} in {files}{here}",
            }
        )

    document = {
        "path": pulled.path,
        "repository": pulled.repository,
        "commit": pulled.commit,
        "name": pulled.name,
        "files": pulled.files,
        "bytes": pulled.bytes,
        "fetched": fetched,
        "sha256": {file.name: file.sha256 for file in pulled.files},
    }
    console.result(document, draw)
