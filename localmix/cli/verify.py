"""`localmix verify`: see `localmix.verify`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import BYTES, Console
from localmix.cli.parameters import MODEL, examples, json_option, threads_option


@click.command()
@click.argument("model", metavar="[FILE|DIR]", type=MODEL, required=False)
@click.option("--deep", is_flag=True, help="Decode every weight, and look for NaN and Inf.")
@click.option("--online", is_flag=True, help="Ask the hub for the checksums of what came from there.")
@click.option("--repo", metavar="ORG/NAME", help="Ask the hub for the checksums of this repository's files.")
@threads_option
@json_option
@examples(
    "localmix verify tinymix",
    "localmix verify mixtral-8x7b.Q4_K_M.gguf --deep",
    "localmix verify ~/models/Mixtral-8x7B-v0.1 --repo mistralai/Mixtral-8x7B-v0.1",
)
def command(model: str | None, deep: bool, online: bool, repo: str | None, threads: int | None, json: bool) -> int:
    """Check that the files of a model are whole, the right ones, and hold numbers only.

    Heads, sizes, index and shards are always checked. Checksums are compared with those that `localmix pull` noted,
    with a file SHA256SUMS in the same folder, or with the hub's. A name of the library without a type means all of
    its files. Every problem is one line; the exit code is then 3.
    """
    from localmix.errors import InputError
    from localmix.sizes import size
    from localmix.verify import verify

    console = Console(json)
    path = _meant(model)
    with console.progress(BYTES) as progress:
        found = verify(path, deep=deep, online=online, repository=repo, threads=threads, progress=progress)

    def draw() -> None:
        for note in found.notes:
            console.warn(note)
        for problem in found.problems:
            console.line(f"{problem.path}: {problem.what}", "red")
        hashed = sum(file.sha256 is not None for file in found.files)
        compared = f"{hashed} of {len(found.files)} files" if len(found.files) > 1 else "1 file" if hashed else "none"
        console.fields(
            {
                "path": str(found.path),
                "files": f"{len(found.files)}, {size(sum(file.bytes for file in found.files))},"
                f" {found.tensors:,} tensors",
                "checksums": f"{compared} compared",
                "weights": f"{found.weights:,} decoded" if deep else "not decoded (--deep does)",
                "problems": str(len(found.problems)) if found.problems else "none",
            }
        )

    console.result({**vars(found), "ok": not found.problems}, draw)
    return InputError.exit_code if found.problems else 0


def _meant(model: str | None) -> Path:
    """A model of the library as a whole when it is named so, else what every command takes it for."""
    from localmix import library

    if model is not None and ":" not in model and library.is_name(model):
        whole = library.find(model)
        if whole is not None:
            return whole.folder
    return library.resolve(model, library.Purpose.ANY)
