"""`localmix export`: see `localmix.export`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option

DEFAULT = Path("Modelfile")


@click.command()
@click.argument("program", metavar="ollama", type=click.Choice(["ollama"]))
@click.argument("model", metavar="[MODEL]", type=MODEL, required=False)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Write here; ./Modelfile by default.")
@click.option("--system", metavar="TEXT", help="System prompt to set.")
@click.option("--ctx", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Positions of context; 4096 by default.")
@json_option
@examples(
    "localmix export ollama tinymix:Q4_K_M",
    'localmix export ollama mixtral:Q4_K_M -o mixtral.Modelfile --ctx 8192 --system "Answer briefly."',
)
def command(
    program: str, model: str | None, output: Path | None, system: str | None, ctx: int | None, json: bool
) -> None:
    """Write a Modelfile, with which Ollama runs a model: file, template, system prompt, settings.

    The model's chat template becomes a Go template with the same text around each turn. One that does more, such
    as listing tools, cannot be carried over in full: then there is no TEMPLATE, and a note says so.
    """
    from localmix import library
    from localmix.errors import UsageError
    from localmix.export import ollama
    from localmix.output import write_atomically

    console = Console(json)
    if output is None and DEFAULT.exists():
        raise UsageError(f"There is a {DEFAULT} here already.", "Name another file with -o.")
    path = library.resolve(model, library.Purpose.RUN)
    modelfile = ollama(path, system=system, context=ctx)
    target = output or DEFAULT
    if target.is_dir():
        target = target / DEFAULT
    write_atomically(target, modelfile.text.encode("utf-8", "surrogateescape"))
    for note in modelfile.notes:
        console.warn(note)
    name = library.model_name(path)
    console.result(
        {
            "path": target,
            "model": modelfile.model,
            "template": modelfile.template,
            "parameters": [{"name": key, "value": value} for key, value in modelfile.parameters],
            "notes": modelfile.notes,
        },
        lambda: console.fields(
            {
                "file": str(target),
                "model": str(modelfile.model),
                "template": "converted" if modelfile.template else "none",
                "next": f"ollama create {name.lower()} -f {target}",
            }
        ),
    )
