"""`localmix imatrix`: see `localmix.imatrix`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option, threads_option

if TYPE_CHECKING:
    from localmix.presentation.table import Table

_MOST_EXPERTS = 16  # of more, a row for each layer could not be read


@click.command()
@click.argument("model", metavar="[MODEL]", type=MODEL, required=False)
@click.option(
    "--corpus",
    "corpora",
    type=FILE,
    multiple=True,
    help="A UTF-8 calibration text; several are read one after the other.",
)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Write here; into the model library by default.")
@click.option("--ctx", "context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=click.IntRange(min=1), help="Read so many chunks at most.")
@click.option("--output-weight", is_flag=True, help="Collect for output.weight too.")
@click.option(
    "--resume",
    type=FILE,
    metavar="FILE",
    help="Go on from a stopped run's OUTPUT.partial, or from a matrix of fewer chunks.",
)
@click.option(
    "--merge",
    "parts",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Instead of collecting, add up finished matrices of one model.",
)
@threads_option
@json_option
@examples(
    "localmix imatrix --corpus examples/tinymix/calibration.txt",
    "localmix imatrix mixtral-Q8_0.gguf --corpus a.txt --corpus b.txt --chunks 200 -o mixtral.imatrix.gguf",
    "localmix imatrix mixtral-Q8_0.gguf --corpus a.txt --resume mixtral.imatrix.gguf.partial",
    "localmix imatrix --merge english.gguf --merge chinese.gguf -o both.imatrix.gguf",
)
def command(
    model: str | None,
    corpora: tuple[Path, ...],
    output: Path | None,
    context: int,
    chunks: int | None,
    output_weight: bool,
    resume: Path | None,
    parts: tuple[Path, ...],
    threads: int | None,
    json: bool,
) -> None:
    """Measure which weights matter, on a calibration text.

    MODEL is a GGUF file, the most precise one of the library by default. The result lies beside the model,
    and `quantize` uses it by itself: all types below 3 bits need it, and most others gain. What a long run has
    so far is saved every minute as OUTPUT.partial.
    """
    from localmix import library
    from localmix.errors import Interrupted, UsageError
    from localmix.imatrix import collect, partial_path
    from localmix.output import check_outputs
    from localmix.presentation.table import number

    console = Console(json)
    if parts:
        if corpora or output is None:
            raise UsageError("--merge takes finished matrices and -o FILE, and no --corpus.")
        _merge(console, parts, output)
        return
    if not corpora:
        raise UsageError("No calibration text was named.", "Name one with --corpus FILE.")
    path = library.resolve(model, library.Purpose.PRECISE)
    output = output or library.imatrix_output_path(path)
    try:
        with library.room_for(output), console.progress() as progress:
            check_outputs([(output, 0)], [path, *corpora])  # minutes or hours before it is written
            result = collect(
                path,
                corpora,
                output,
                context,
                chunks,
                threads,
                progress,
                resume=resume,
                output_weight=output_weight,
            )
    except KeyboardInterrupt:
        if (kept := partial_path(output)).exists():
            raise Interrupted("Stopped.", f"The same command with --resume {kept} goes on from there.") from None
        raise
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
            "perplexity": f"{number(result.perplexity, 4)} ± {number(result.error, 4)}"
            + (" (of the chunks of this run)" if resume else ""),
            "weights": str(result.entries),
        }
        if result.coverage.tokens:
            fields["coverage"] = result.coverage.summary
        console.fields(fields)
        if result.coverage.tokens:
            console.line()
            console.table(_coverage_table(result.coverage.tokens))

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


def _coverage_table(tokens: Mapping[int, Sequence[int]]) -> Table:
    """How evenly the experts of each layer were used; of few experts, and where there is room, each of them."""
    from statistics import median

    from localmix.presentation.table import Column, Table

    count = max(map(len, tokens.values()))
    experts = range(count if count <= _MOST_EXPERTS else 0)
    columns = (
        *(Column("Tokens of layer"), Column("fewest"), Column("median", rank=1), Column("most")),
        *(Column(f"expert {expert}", rank=2) for expert in experts),
    )
    rows = []
    for layer, counts in tokens.items():
        cells = (min(counts), round(median(counts)), max(counts), *(counts[expert] for expert in experts))
        rows.append((str(layer), *(f"{cell:,}" for cell in cells)))
    return Table(columns, tuple(rows))


def _merge(console: Console, parts: tuple[Path, ...], output: Path) -> None:
    from localmix.imatrix import merge
    from localmix.output import check_outputs

    check_outputs([(output, 0)], parts)
    merged = merge(parts, output)
    document = {
        "path": output,
        "chunks": merged.chunk_count,
        "datasets": merged.datasets,
        "entries": len(merged.entries),
    }

    def draw() -> None:
        console.fields(
            {
                "file": str(output),
                "read": f"{merged.chunk_count} chunks of {', '.join(merged.datasets)}",
                "weights": str(len(merged.entries)),
            }
        )

    console.result(document, draw)
