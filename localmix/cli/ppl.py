"""`localmix ppl`: see `localmix.comparison` and `localmix.perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.parameters import (
    FILE,
    MODEL,
    SET,
    TYPES,
    examples,
    json_option,
    markdown_option,
    parse_types,
    threads_option,
)

if TYPE_CHECKING:
    from localmix.comparison import Measured


@click.command()
@click.argument("models", metavar="[MODEL]…", nargs=-1, type=MODEL)
@click.option("--corpus", type=FILE, required=True, help="A UTF-8 text the model was not trained on.")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(min=2),
    help="Tokens of a chunk; 4096 by default, less if the model was trained for less.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Measure so many chunks at most.")
@click.option("--types", metavar="TYPE[,TYPE…]", type=TYPES, help="Measure these types of the model.")
@click.option("--set", "set_name", metavar="NAME", type=SET, help="Measure all types of a named set.")
@click.option("--speed/--no-speed", default=True, help="Measure milliseconds per generated token too.")
@threads_option
@markdown_option
@json_option
@examples(
    "localmix ppl --corpus heldout.txt",
    "localmix ppl tinymix:Q8_0 tinymix:Q2_K other.gguf --corpus heldout.txt --ctx 512",
    "localmix ppl --set chinese-mixtral --corpus examples/tinymix/heldout.txt",
)
def command(
    models: tuple[str, ...],
    corpus: Path,
    context: int | None,
    chunks: int | None,
    types: str | None,
    set_name: str | None,
    speed: bool,
    threads: int | None,
    markdown: bool,
    json: bool,
) -> int:
    """Measure perplexity, and print the quantization table.

    With --types or --set, MODEL is a checkpoint or a file in full precision, and the types that the library
    lacks are quantized first. A model that fails is a row that says so; the exit code is then 3.
    """
    from localmix import library
    from localmix.comparison import common_context, compare, look_at
    from localmix.corpus import read_corpus
    from localmix.errors import InputError, UsageError
    from localmix.presets import load_presets
    from localmix.table import quantization_table

    console = Console(json)
    text = read_corpus([corpus])  # before anything is quantized for it
    names = parse_types(types) if types else []
    names += [name for name in (load_presets().find_set(set_name) if set_name else ()) if name not in names]
    if names:
        if len(models) > 1:
            raise UsageError("--types and --set take one model.", "Name the other files without them.")
        paths = _all_types(console, models[0] if models else None, names, threads)
    else:
        paths = [library.resolve(model, library.Purpose.MEASURE) for model in models or (None,)]
    subjects = [look_at(path) for path in paths]
    if context is None:
        context = common_context(subjects)

    done: list[Measured] = []

    def draw() -> None:
        table = quantization_table([measured.row for measured in done], _caption(done, context or 0))
        console.table(table, markdown)

    try:
        with console.progress() as progress:
            for measured in compare(subjects, text, context, chunks, threads, speed, progress):
                done.append(measured)
    except KeyboardInterrupt:
        if done and not json:
            draw()
        raise
    library.remember(paths)

    shown = {note for measured in done if measured.perplexity for note in measured.perplexity.notes}
    for note in sorted(shown):
        console.warn(note)
    for measured in done:
        if measured.row.failed:
            name = measured.row.path.name if measured.row.path else measured.row.title
            console.warn(f"{name}: {measured.row.failure or 'the perplexity is not a number.'}")
    document = {
        "corpus": {"name": text.name, "files": text.files},
        "ctx": context,
        "rows": [measured.row for measured in done],
    }
    console.result(document, draw)
    return InputError.exit_code if any(measured.row.failed for measured in done) else 0


def _all_types(console: Console, model: str | None, names: list[str], threads: int | None) -> list[Path]:
    """The source, if it is a GGUF file, and a file of each type; those missing or older than it are made."""
    from localmix import library
    from localmix.presets import load_presets
    from localmix.quantize import quantize

    source = library.resolve(model, library.Purpose.SOURCE)
    imatrix = library.find_imatrix(source)
    inputs = [path for path in (source, imatrix) if path is not None]
    found = {name: library.output_path(source, name) for name in names}
    missing = [
        (load_presets().find(name), path)
        for name, path in found.items()
        if path != source and not library.is_newer(path, inputs)
    ]
    if missing:
        console.note(f"Quantizing {', '.join(preset.name for preset, _ in missing)}")
        if imatrix is not None:
            console.note(f"With the importance matrix {imatrix}")
        with library.room_for(missing[0][1]), console.progress(WEIGHTS) as progress:
            quantized = quantize(source, missing, imatrix=imatrix, threads=threads, progress=progress)
        # before the measuring, which may be stopped
        library.remember([path for _, path in missing], source=source)
        for note in quantized.notes:
            console.warn(note)
    reference = [source] if source.suffix == ".gguf" else []
    return list(dict.fromkeys([*reference, *found.values()]))


def _caption(done: list[Measured], context: int) -> str:
    """What was measured and how: a perplexity says nothing without it."""
    found = next((measured.perplexity for measured in done if measured.perplexity), None)
    if found is None:
        return ""
    checksums = ", ".join(checksum[:12] for checksum in found.sha256)
    return (
        f"{found.corpus} (sha256 {checksums}…): {found.tokens:,} tokens scored in {found.chunks} chunks of {context}."
    )
