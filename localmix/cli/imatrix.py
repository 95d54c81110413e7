"""`localmix imatrix`: see `localmix.imatrix`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option, threads_option


@click.command()
@click.argument("model", metavar="[MODEL]", type=MODEL, required=False)
@click.option(
    "--corpus",
    "corpora",
    type=FILE,
    required=True,
    multiple=True,
    help="A UTF-8 calibration text; several are read one after the other.",
)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Write here; into the model library by default.")
@click.option("--ctx", "context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=click.IntRange(min=1), help="Read so many chunks at most.")
@threads_option
@json_option
@examples(
    "localmix imatrix --corpus examples/tinymix/calibration.txt",
    "localmix imatrix mixtral-Q8_0.gguf --corpus a.txt --corpus b.txt --chunks 200 -o mixtral.imatrix.gguf",
)
def command(
    model: str | None,
    corpora: tuple[Path, ...],
    output: Path | None,
    context: int,
    chunks: int | None,
    threads: int | None,
    json: bool,
) -> None:
    """Measure which weights matter, on a calibration text.

    MODEL is a GGUF file, the most precise one of the library by default. The result lies beside the model,
    and `quantize` uses it by itself: all types below 3 bits need it, and most others gain.
    """
    from localmix import library
    from localmix.imatrix import collect
    from localmix.output import check_outputs
    from localmix.table import number

    console = Console(json)
    path = library.resolve(model, library.Purpose.PRECISE)
    output = library.make_room(output or library.imatrix_output_path(path))
    check_outputs([(output, 0)], [path, *corpora])  # minutes or hours before it is written
    with console.progress() as progress:
        result = collect(path, corpora, output, context, chunks, threads, progress)
    library.remember(path)

    for note in result.notes:
        console.warn(note)
    coverage = {
        "experts": {str(layer): counts for layer, counts in result.coverage.tokens.items()},
        "unreached": result.coverage.unreached,
    }

    def draw() -> None:
        fields = {
            "file": str(result.path),
            "read": f"{result.tokens:,} tokens in {result.chunks} chunks of {', '.join(result.datasets)}",
            "perplexity": f"{number(result.perplexity, 4)} ± {number(result.error, 4)}",
            "weights": str(result.entries),
        }
        if result.coverage.least:
            layer, expert, tokens = result.coverage.least
            fields["coverage"] = f"the least used expert ({expert} of layer {layer}) saw {tokens:,} tokens"
        console.fields(fields)

    console.result(
        {
            "path": result.path,
            "chunks": result.chunks,
            "tokens": result.tokens,
            "perplexity": result.perplexity,
            "error": result.error,
            "entries": result.entries,
            "datasets": result.datasets,
            "coverage": coverage,
        },
        draw,
    )
