"""`localmix quantize`: see `localmix.quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, MODEL, TYPES, examples, json_option, parse_types, threads_option


@click.command()
@click.argument("types", metavar="TYPE[,TYPE…]", type=TYPES)
@click.argument("model", metavar="[SRC]", type=MODEL, required=False)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE|DIR",
    help="Write here; into the model library by default.",
)
@click.option(
    "--imatrix",
    type=FILE,
    metavar="FILE",
    help="Importance matrix; the one in the library is used by itself.",
)
@click.option("--no-imatrix", is_flag=True, help="Quantize without the library's importance matrix.")
@click.option(
    "--tensor-type",
    "rules",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="The type of tensors whose name matches the regular expression; the first match decides.",
)
@click.option("--dry-run", is_flag=True, help="Check and show what would be written.")
@threads_option
@json_option
@examples(
    "localmix quantize Q4_K",
    "localmix quantize Q8_0,Q4_K,IQ2_XS ~/models/Mixtral-8x7B-v0.1",
    "localmix quantize chinese-mixtral tinymix",
    "localmix quantize Q4_K tinymix --tensor-type attn_v=Q8_0 -o tinymix-custom.gguf",
)
def command(
    types: str,
    model: str | None,
    output: Path | None,
    imatrix: Path | None,
    no_imatrix: bool,
    rules: tuple[str, ...],
    dry_run: bool,
    threads: int | None,
    json: bool,
) -> None:
    """Make smaller models: one type, several, or a whole set of types from one read.

    SRC is a checkpoint folder or a GGUF file in BF16, F16 or F32. Q3_K, Q4_K and Q5_K mean the _M mixture.
    """
    from localmix import library
    from localmix.errors import UsageError
    from localmix.presets import load_presets
    from localmix.quantize import parse_rule, quantize
    from localmix.table import Column, Table, number, size, size_unit

    console = Console(json)
    names = parse_types(types)
    if imatrix is not None and no_imatrix:
        raise UsageError("--imatrix and --no-imatrix contradict each other.")
    path = library.resolve(model, library.Purpose.SOURCE)
    if output is not None and len(names) > 1 and not output.is_dir():
        raise UsageError(
            f"{len(names)} types make {len(names)} files, and {output} is not a folder.",
            f"Make it with `mkdir -p {output}`.",
        )
    presets = [load_presets().find(name) for name in names]
    outputs = [(preset, _output(path, output, preset.name)) for preset in presets]
    if not dry_run:
        library.make_room(outputs[0][1])
    if imatrix is None and not no_imatrix and any(preset.imatrix != "unused" for preset in presets):
        imatrix = library.find_imatrix(path)
        if imatrix is not None:
            console.note(f"With the importance matrix {imatrix}")
    with console.progress() as progress:
        quantized = quantize(
            path,
            outputs,
            imatrix=imatrix,
            rules=[parse_rule(rule) for rule in rules],
            threads=threads,
            dry_run=dry_run,
            progress=progress,
        )
    if not dry_run:
        # of several files none is the one used last: then the model as a whole is
        one = len(quantized.outputs) == 1
        library.remember(quantized.outputs[0].path if one else quantized.outputs[0].path.parent)

    for note in quantized.notes:
        console.warn(note)
    for summary in quantized.outputs:
        if summary.fallbacks:
            console.warn(
                f"{summary.type}: {len(summary.fallbacks)} tensors have columns that do not fit its blocks"
                f" and take another type ({summary.fallbacks[0]}{', …' if len(summary.fallbacks) > 1 else ''})."
            )

    def draw() -> None:
        unit, unit_name = size_unit(summary.bytes for summary in quantized.outputs)
        columns = (
            Column("Type", number=False),
            Column(f"Size {unit_name}"),
            Column("BPW"),
            Column("File", number=False),
        )
        rows = tuple(
            (summary.type, f"{summary.bytes / unit:.2f}", number(summary.bpw, 2), str(summary.path))
            for summary in quantized.outputs
        )
        total = size(sum(summary.bytes for summary in quantized.outputs))
        done = "planned; nothing was written" if dry_run else f"in {quantized.seconds:.1f} s"
        console.table(Table(columns, rows, f"{total} {done}"))

    console.result({"outputs": quantized.outputs, "seconds": quantized.seconds}, draw)


def _output(source: Path, output: Path | None, kind: str) -> Path:
    from localmix import library

    if output is None:
        return library.output_path(source, kind)
    return output / f"{library.model_name(source)}-{kind}.gguf" if output.is_dir() else output
