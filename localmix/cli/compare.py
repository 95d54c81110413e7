"""`localmix compare`: see `localmix.measurement.comparison`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from localmix.cli.console import Console
from localmix.cli.memory_check import placement_options
from localmix.cli.parameters import MODEL, examples, json_option, markdown_option, rope_options, threads_option
from localmix.cli.ppl import LEAST_CONTEXT, cache_options, placer, warn

if TYPE_CHECKING:
    from localmix.measurement.comparison import Measured
    from localmix.measurement.reference import Cache
    from localmix.rope_scaling import RopeScaling


@click.command()
@click.argument("first", type=MODEL)
@click.argument("second", type=MODEL)
@click.option(
    "--corpus", metavar="FILE|NAME", required=True, help="A UTF-8 text the models were not trained on, or wikitext-2."
)
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(min=LEAST_CONTEXT),
    help="Tokens of a chunk; 4096 by default, less if a model was trained for less.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Measure so many chunks at most.")
@click.option(
    "--kld",
    "reference",
    metavar="MODEL",
    type=MODEL,
    help="Measure how far both are from this one; without it, how far SECOND is from FIRST.",
)
@cache_options
@click.option("--speed/--no-speed", default=False, help="Measure milliseconds per generated token too.")
@rope_options
@placement_options
@threads_option
@markdown_option
@json_option
@examples(
    "localmix compare tinymix:Q8_0 tinymix:Q4_K --corpus heldout.txt",
    "localmix compare tinymix:Q4_0 tinymix:Q4_K --kld tinymix:BF16 --corpus heldout.txt --ctx 512",
)
def command(
    first: str,
    second: str,
    corpus: str,
    context: int | None,
    chunks: int | None,
    reference: str | None,
    cache: Cache | None,
    speed: bool,
    rope: RopeScaling | None,
    device: str,
    gpu_layers: int | None,
    experts: str,
    kv_type: str,
    threads: int | None,
    markdown: bool,
    json: bool,
) -> int:
    """Compare two models on a text, token by token.

    Both predict the same tokens, so the error of their difference is much smaller than that of each
    perplexity. The verdict goes by their divergence from the model of --kld, else by perplexity, and takes two
    standard errors for a difference.
    """
    from localmix.measurement.measuring_child import MeasuringChild

    console = Console(json)
    with MeasuringChild() as child:  # gets ready while this process imports and looks
        from localmix import library
        from localmix.errors import InputError, UsageError
        from localmix.measurement.comparison import common_context, compare, judge, look_at
        from localmix.measurement.corpus import find_corpora
        from localmix.measurement.perplexity import Conditions
        from localmix.measurement.provenance import Provenance
        from localmix.presentation.table import quantization_table

        texts = find_corpora([corpus])
        if len(texts) > 1:
            raise UsageError(f"{corpus} holds {len(texts)} texts, and two models are compared on one.")
        subjects = [look_at(library.resolve(model, library.Purpose.MEASURE)) for model in (first, second)]
        if subjects[0].path.samefile(subjects[1].path):
            raise UsageError(f"{first} and {second} are the same file.", "Name two models.")
        against = look_at(library.resolve(reference, library.Purpose.PRECISE)) if reference else subjects[0]
        ctx = context or common_context([*subjects, against])
        conditions = Conditions(ctx, chunks, threads, rope, kv_type=kv_type)
        place = placer(console, ctx, kv_type, device, gpu_layers, experts)
        subjects = [place(subject) for subject in subjects]
        against = place(against)

        done: list[Measured] = []
        with console.progress() as progress:
            done.extend(compare(subjects, texts[0], conditions, speed, against, cache, progress, child))
        library.remember([subject.path for subject in subjects])
        pair = [next((one for one in done if one.row.path == subject.path), None) for subject in subjects]
        alike = all(one and (one.row.is_reference or one.row.divergence) and not one.row.failed for one in pair)
        verdict = judge(pair[0], pair[1]) if alike else None  # type: ignore[arg-type]
        scored = [(texts[0].name, one.row.tokens, one.row.chunks) for one in done if one.row.tokens]
        devices = [name for subject in (*subjects, against) for name in subject.devices]
        provenance = Provenance.of(texts, scored, conditions, reference=against.path.name, devices=devices)

        def draw() -> None:
            console.table(quantization_table([one.row for one in done], provenance.caption), markdown)
            if verdict is not None:
                console.line()
                console.sentence(verdict.sentence, "bold")

        rows = [one.row for one in done]
        console.result({"ctx": ctx, **asdict(provenance), "rows": rows, "verdict": verdict}, draw)
        if verdict is not None and not verdict.better and verdict.kld_difference is None:
            console.note("--kld with the original of both tells smaller differences apart.")
        warn(console, done)
        return InputError.exit_code if verdict is None else 0
