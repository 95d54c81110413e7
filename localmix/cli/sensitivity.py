"""`localmix sensitivity`: see `localmix.optimization.probing`."""

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
    multiple=True,
    help="A UTF-8 text, best a calibration text; several are read one after the other.",
)
@click.option("-o", "--output", type=FILE, metavar="FILE", required=True, help="Write here.")
@click.option("--imatrix", type=FILE, metavar="FILE", help="Importance matrix; the one beside the model by default.")
@click.option("--no-imatrix", is_flag=True, help="Use none: for quantizing without one.")
@click.option("--ctx", "context", type=click.IntRange(min=4), default=512, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--chunks", type=click.IntRange(min=1), default=32, show_default=True, help="Read so many chunks at most."
)
@click.option(
    "--per-layer",
    is_flag=True,
    help="Probe each class in each layer, too: better mixtures, for a time that grows with the layers.",
)
@click.option("--resume", is_flag=True, help="Go on from what a stopped run left as FILE.partial.")
@threads_option
@json_option
@examples(
    "localmix sensitivity tinymix:BF16 --corpus examples/tinymix/calibration.txt -o tinymix.sensitivities.json",
    "localmix sensitivity mixtral:Q8_0 --corpus calibration.txt -o mixtral.sensitivities.json --resume",
    "localmix quantize --target 12GiB --sensitivity mixtral.sensitivities.json",
)
def command(
    model: str | None,
    corpora: tuple[Path, ...],
    output: Path,
    imatrix: Path | None,
    no_imatrix: bool,
    context: int,
    chunks: int,
    per_layer: bool,
    resume: bool,
    threads: int | None,
    json: bool,
) -> None:
    """Measure how much a model suffers when each class of its tensors loses precision.

    MODEL is a GGUF file in BF16, F16, F32 or Q8_0, the most precise one of the library by default. Its weights are
    read into memory, on the processor. The result is a small file for `quantize --target` and `plan --target`, which
    may be shared like an importance matrix. Each finished probe is kept as OUTPUT.partial.
    """
    from localmix import library
    from localmix.errors import Interrupted, UsageError
    from localmix.importance import load_importance
    from localmix.measurement.corpus import read_corpus
    from localmix.optimization.probing import journal_path, measure
    from localmix.output import check_outputs
    from localmix.presentation.table import Column, Table, number

    console = Console(json)
    if not corpora:
        raise UsageError("No text was named.", "Name one with --corpus FILE.")
    if imatrix is not None and no_imatrix:
        raise UsageError("--imatrix and --no-imatrix contradict each other.")
    path = library.resolve(model, library.Purpose.PRECISE)
    used = None if no_imatrix else imatrix or library.find_imatrix(path)
    check_outputs([(output, 0)], [path, *corpora, *([used] if used else [])])
    corpus = read_corpus(corpora)
    try:
        with console.progress() as progress:
            measured = measure(
                path,
                corpus,
                output,
                load_importance(used) if used else None,
                ctx=context,
                chunks=chunks,
                per_layer=per_layer,
                resume=resume,
                threads=threads,
                progress=progress,
            )
    except KeyboardInterrupt:
        if (kept := journal_path(output)).exists():
            raise Interrupted("Stopped.", f"The same command with --resume goes on from {kept}.") from None
        raise
    library.remember(path)

    for note in corpus.notes:
        console.warn(note)
    if used is None:
        console.warn("Measured without an importance matrix: good for quantizing without one.")

    def draw() -> None:
        console.fields(
            {
                "file": str(output),
                "measured on": f"{measured.model}, with {measured.chunks} chunks of {measured.corpus}",
                "imatrix": str(used) if used else "none",
                "probes": f"all tensors of a class in {measured.probes}",
            }
        )
        console.line()
        columns = (
            Column("Class", number=False),
            Column("Tensors"),
            Column("Relative error"),
            Column("KLD"),
            Column("KLD at error 0.1"),
            Column("Exponent"),
        )
        damages = {kind: value.nats * value.tensors * 0.1**value.exponent for kind, value in measured.classes.items()}
        rows = tuple(
            (
                kind,
                str(value.tensors),
                number(value.relative_error, 4),
                number(value.divergence, 5),
                f"{number(damages[kind], 5)} ± {number(damages[kind] * value.error, 5)}",
                number(value.exponent, 2),
            )
            for kind, value in sorted(measured.classes.items(), key=lambda item: -damages[item[0]])
        )
        first = measured.probes.partition(",")[0]
        caption = (
            f"Relative error, KLD: of the probe in {first}. KLD at error 0.1: expected when the class loses a tenth of"
            " its energy; it grows by the relative error to the power of the exponent."
        )
        console.table(Table(columns, rows, caption))

    document = {
        "path": output,
        "model": path,
        "imatrix": used,
        "chunks": measured.chunks,
        "classes": measured.classes,
        "by_layer": {f"{kind} of layer {layer}": value for (kind, layer), value in measured.by_layer.items()},
    }
    console.result(document, draw)
