"""`localmix convert`: see `localmix.convert`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option, threads_option


@click.command()
@click.argument("model", metavar="[SRC]", type=MODEL, required=False)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Write here; into the model library by default.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["auto", "bf16", "f16", "f32"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="The type of the weights; auto keeps the checkpoint's own.",
)
@click.option(
    "--pre", metavar="NAME", help="The tokenizer's pre-tokenizer by llama.cpp's name, if it is not recognised."
)
@threads_option
@json_option
@examples(
    "localmix convert examples/tinymix",
    "localmix convert ~/models/Mixtral-8x7B-v0.1 -o mixtral.gguf --type f16",
)
def command(
    model: str | None, output: Path | None, kind: str, pre: str | None, threads: int | None, json: bool
) -> None:
    """Make a GGUF file from a checkpoint folder.

    SRC is a Hugging Face folder with safetensors files, its config and its tokenizer. The weights stay as
    they are; nothing that the checkpoint brings is executed.
    """
    from localmix import library
    from localmix.convert import convert, weight_type
    from localmix.sources.open import open_source
    from localmix.table import size

    console = Console(json)
    path = library.resolve(model, library.Purpose.CHECKPOINT)
    if output is None or output.is_dir():
        with open_source(path, pre=pre) as source:
            name = weight_type(source) if kind == "auto" else kind.upper()
        if output is None:
            output = library.output_path(path, name)
        else:
            output = output / f"{library.model_name(path)}-{name}.gguf"
    with library.room_for(output), console.progress(WEIGHTS) as progress:
        converted = convert(path, output, kind, pre=pre, threads=threads, progress=progress)
    library.remember([output], source=path)

    for note in converted.notes:
        console.warn(note)
    console.result(
        converted,
        lambda: console.fields(
            {
                "file": str(converted.path),
                "model": f"{converted.architecture}, {converted.parameters:,} parameters"
                f" in {converted.tensors} tensors",
                "size": f"{size(converted.bytes)} in {converted.type}",
            }
        ),
    )
