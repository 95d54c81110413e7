"""`localmix ppl`: see `comparison`, `divergence` and `context_curve` in `localmix.measurement`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.memory_check import placement_options, rpc_option
from localmix.cli.parameters import (
    FILE,
    MODEL,
    SET,
    TYPES,
    Command,
    examples,
    json_option,
    markdown_option,
    parse_size,
    parse_types,
    rope_options,
    threads_option,
)

if TYPE_CHECKING:
    from localmix.distribution.protocol import Endpoint
    from localmix.measurement.comparison import Measured, Subject
    from localmix.measurement.corpus import Corpus
    from localmix.measurement.measuring_child import MeasuringChild
    from localmix.measurement.perplexity import Conditions
    from localmix.measurement.reference import Cache
    from localmix.native.devices import Device
    from localmix.presentation.published import PublishedTable
    from localmix.presentation.table import ContextPoint, QuantizationRow, Table
    from localmix.rope_scaling import RopeScaling

# of corpus.split
LEAST_CONTEXT = 8


def _contexts(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """One context or several, with commas between."""
    if value is None:
        return None
    try:
        found = sorted({int(word) for word in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number of tokens, and no list such as 512,1024.") from None
    if found[0] < LEAST_CONTEXT:
        raise click.BadParameter(f"{found[0]} tokens are too few to measure; {LEAST_CONTEXT} is the least.")
    return found


def cache_options(function: Command) -> Command:
    """Options for where a reference's predictions are kept; the command gets one argument `cache`."""

    @click.option("--cache/--no-cache", default=True, help="Keep what the reference predicts on disk.")
    @click.option("--cache-limit", metavar="SIZE", default="20GiB", show_default=True, help="Keep no more than this.")
    @functools.wraps(function)
    def wrapped(*args: Any, cache: bool, cache_limit: str, **others: Any) -> Any:
        from localmix.measurement.reference import Cache

        limit = parse_size(cache_limit)
        return function(*args, cache=Cache.of_user(limit) if cache else None, **others)

    return cast(Command, wrapped)


@click.command()
@click.argument("models", metavar="[MODEL]…", nargs=-1, type=MODEL)
@click.option(
    "--corpus",
    "corpora",
    metavar="FILE|FOLDER|NAME",
    required=True,
    multiple=True,
    help="A UTF-8 text the models were not trained on, a folder of them, or wikitext-2; may be repeated.",
)
@click.option(
    "--ctx",
    "contexts",
    metavar="N[,N…]",
    callback=_contexts,
    help="Tokens of a chunk; 4096 by default, less if the model was trained for less. Several give a curve.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Measure so many chunks at most.")
@click.option("--types", metavar="TYPE[,TYPE…]", type=TYPES, help="Measure these types of the model.")
@click.option("--set", "set_name", metavar="NAME", type=SET, help="Measure all types of a named set.")
@click.option(
    "--kld",
    "reference",
    metavar="MODEL",
    type=MODEL,
    help="Also measure how far the others are from this one: F16, BF16 or Q8_0 of the same model.",
)
@cache_options
@click.option("--paired", is_flag=True, help="With several contexts: score the same tokens at each.")
@click.option("--speed/--no-speed", default=True, help="Measure milliseconds per generated token too.")
@click.option(
    "--published",
    metavar="chinese-mixtral|chinese-llama-2",
    help="Show this published table beside what is measured.",
)
@click.option("--html", type=FILE, help="Write a page with the table and the plots.")
@click.option("--plot", type=FILE, help="Write the plots as FILE.png or FILE.svg.")
@click.option("--csv", is_flag=True, help="The table as CSV.")
@rope_options
@placement_options
@rpc_option
@threads_option
@markdown_option
@json_option
@examples(
    "localmix ppl --corpus heldout.txt",
    "localmix ppl tinymix:Q8_0 tinymix:Q2_K other.gguf --corpus heldout.txt --ctx 512",
    "localmix ppl --set chinese-mixtral --kld tinymix:BF16 --corpus heldout.txt --html table.html",
    "localmix ppl tinymix:Q4_K --corpus heldout.txt --ctx 256,512,1024,2048 --paired",
)
def command(
    models: tuple[str, ...],
    corpora: tuple[str, ...],
    contexts: list[int] | None,
    chunks: int | None,
    types: str | None,
    set_name: str | None,
    reference: str | None,
    cache: Cache | None,
    paired: bool,
    speed: bool,
    published: str | None,
    html: Path | None,
    plot: Path | None,
    csv: bool,
    rope: RopeScaling | None,
    device: str,
    gpu_layers: int | None,
    experts: str,
    kv_type: str,
    rpc: tuple[Endpoint, ...],
    threads: int | None,
    markdown: bool,
    json: bool,
) -> int:
    """Measure perplexity, and print the quantization table.

    With --types or --set, MODEL is a checkpoint or a file in full precision, and the types that the library
    lacks are quantized first. A model that fails is a row that says so; the exit code is then 3.

    With --kld the table also has the difference of each perplexity to the reference's, with the error of the
    paired differences, the Kullback-Leibler divergence of the predictions, and how often both hold the same
    token likeliest. Memory is the peak of the process that measured, mapped weights included. Generation is
    timed over 3 runs of 128 tokens after an empty prompt; `localmix bench` does it at length.
    """
    from localmix.errors import UsageError
    from localmix.measurement.measuring_child import MeasuringChild
    from localmix.presentation.published import find

    console = Console(json)
    curve = contexts is not None and len(contexts) > 1
    if paired and not curve:
        raise UsageError("--paired needs several contexts.", "For example --ctx 512,1024,2048.")
    if curve and reference is not None:
        raise UsageError("--kld takes one context.", "Measure the curve without it.")
    if csv and (markdown or json):
        raise UsageError("--csv is another form than --markdown and --json.", "Choose one.")
    outputs = _Outputs(console, html, plot, markdown, csv)
    beside = find(published) if published else None
    names = parse_types(types) if types else []
    if set_name:
        from localmix.presets import load_presets

        names += [name for name in load_presets().find_set(set_name) if name not in names]
    if names and len(models) > 1:
        raise UsageError("--types and --set take one model.", "Name the other files without them.")

    with ExitStack() as stack:
        child = stack.enter_context(MeasuringChild())  # gets ready while this process imports and looks
        from localmix import library
        from localmix.errors import InputError
        from localmix.measurement.comparison import common_context, look_at
        from localmix.measurement.corpus import find_corpora
        from localmix.measurement.perplexity import Conditions

        texts = find_corpora(corpora)  # before anything is quantized for it
        if names:
            paths = _all_types(console, models[0] if models else None, names, threads)
        else:
            paths = [library.resolve(model, library.Purpose.MEASURE) for model in models or (None,)]
        subjects = [look_at(path) for path in paths]
        compared = look_at(library.resolve(reference, library.Purpose.PRECISE)) if reference is not None else None
        if contexts is None:
            contexts = [common_context([*subjects, *([compared] if compared else [])])]
        conditions = Conditions(contexts[0], chunks, threads, rope, kv_type=kv_type)
        remote: tuple[Device, ...] = ()
        if rpc:
            from localmix.distribution.machines import Machines

            remote = stack.enter_context(Machines(rpc)).devices
        place = placer(console, contexts[-1], kv_type, device, gpu_layers, experts, remote)
        subjects = [place(subject) for subject in subjects]
        compared = place(compared) if compared else None

        if curve:
            code = _measure_curve(outputs, subjects, texts, contexts, conditions, paired, beside, child)
            library.remember(paths)
            return code
        done = _measure_table(outputs, subjects, texts, conditions, speed, compared, cache, beside, child)
        library.remember(paths)
        warn(console, done)
        return InputError.exit_code if any(measured.row.failed for measured in done) else 0


def warn(console: Console, done: Sequence[Measured]) -> None:
    """Say what is unusual about the rows of a table, and why some have no numbers."""
    for note in sorted({note for measured in done if measured.perplexity for note in measured.perplexity.notes}):
        console.warn(note)
    for row in (measured.row for measured in done if measured.row.failed):
        name = row.path.name if row.path else row.title
        reason = row.failure or "the perplexity is not a number."
        console.warn(reason if name in reason else f"{name}: {reason}")


def placer(
    console: Console,
    ctx: int,
    kv_type: str,
    device: str,
    gpu_layers: int | None,
    experts: str,
    remote: tuple[Device, ...] = (),
) -> Callable[[Subject], Subject]:
    """What finds out where a model's layers lie when it is measured, and warns where memory is too small for it."""
    from localmix.cli.memory_check import MemoryCheck
    from localmix.measurement.perplexity import Layout

    cells = Layout.for_chunks(ctx).cells
    check = MemoryCheck(
        console, cells, kv_type=kv_type, device=device, gpu_layers=gpu_layers, experts=experts, remote=remote
    )

    def place(subject: Subject) -> Subject:
        choice = check.advise(subject.path)
        return replace(subject, placement=choice.placement, repack=choice.repack, devices=choice.devices)

    return place


class _Outputs:
    """Where the result goes: the terminal or stdout in one form, and files."""

    def __init__(self, console: Console, html: Path | None, plot: Path | None, markdown: bool, csv: bool) -> None:
        from localmix.output import check_outputs

        self.console = console
        self._html = html
        self._plot = plot
        self._markdown = markdown
        self._csv = csv
        check_outputs([(path, 0) for path in (html, plot) if path is not None], [])
        if plot is not None:
            from localmix.presentation import plots

            plots.check(plot)

    def draw(self, table: Table) -> None:
        """A table in the form that was asked for."""
        if self._csv:
            self.console.raw(table.csv())
        else:
            self.console.table(table, self._markdown)

    def write(
        self,
        title: str,
        provenance: dict[str, str],
        rows: Sequence[QuantizationRow],
        points: Sequence[ContextPoint],
        notes: Sequence[str] = (),
    ) -> None:
        """The page and the plots."""
        if self._html is None and self._plot is None:
            return
        from localmix.presentation.report import Report, write_html

        report = Report(title, provenance, tuple(rows), tuple(points), tuple(notes))
        if self._html is not None:
            write_html(self._html, report)
            self.console.note(f"Wrote {self._html}")
        if self._plot is not None:
            from localmix.presentation import plots

            plots.write_plot(self._plot, report)
            self.console.note(f"Wrote {self._plot}")


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


def _measure_table(
    outputs: _Outputs,
    subjects: Sequence[Subject],
    corpora: Sequence[Corpus],
    conditions: Conditions,
    speed: bool,
    reference: Subject | None,
    cache: Cache | None,
    published: PublishedTable | None,
    child: MeasuringChild,
) -> list[Measured]:
    """Measure a row for each model and corpus, and show them."""
    from localmix.errors import NetworkError
    from localmix.measurement.comparison import averages, compare
    from localmix.measurement.provenance import Provenance
    from localmix.presentation.table import quantization_table

    done: list[Measured] = []
    devices = [name for subject in (*subjects, *([reference] if reference else [])) for name in subject.devices]

    def rows() -> list[QuantizationRow]:
        found = [measured.row for measured in done]
        return [*found, *(averages(found) if len(corpora) > 1 else ()), *(published.rows if published else ())]

    def provenance() -> Provenance:
        scored = ((row.corpus, row.tokens, row.chunks) for row in (measured.row for measured in done) if row.tokens)
        name = reference.path.name if reference else ""
        return Provenance.of(corpora, scored, conditions, reference=name, devices=devices)

    def draw() -> None:
        outputs.draw(
            quantization_table(rows(), " ".join((provenance().caption, *(published.about if published else ()))))
        )

    try:
        with outputs.console.progress() as progress:
            for number, corpus in enumerate(corpora):
                report = _within(progress, corpus) if len(corpora) > 1 else progress
                # a model's speed is the same on every text
                timed = speed and number == 0
                for measured in compare(subjects, corpus, conditions, timed, reference, cache, report, child):
                    done.append(measured)
    except (KeyboardInterrupt, NetworkError):
        if done and not outputs.console.json:
            draw()
        raise
    outputs.console.result({"ctx": conditions.ctx, **asdict(provenance()), "rows": rows()}, draw)
    outputs.write(
        f"{subjects[0].model}: what each type costs",
        provenance().fields,
        rows(),
        published.points if published else (),
        published.about if published else (),
    )
    return done


def _measure_curve(
    outputs: _Outputs,
    subjects: Sequence[Subject],
    corpora: Sequence[Corpus],
    contexts: Sequence[int],
    conditions: Conditions,
    paired: bool,
    published: PublishedTable | None,
    child: MeasuringChild,
) -> int:
    """Measure a point for each model, corpus and context, and show them; the exit code."""
    from localmix.errors import InputError, Interrupted, LocalmixError, NetworkError
    from localmix.measurement.context_curve import curve_table, measure_contexts
    from localmix.measurement.provenance import Provenance

    done: list[ContextPoint] = []

    def points() -> list[ContextPoint]:
        return [*done, *(published.points if published else ())]

    def provenance() -> Provenance:
        devices = (name for subject in subjects for name in subject.devices)
        return Provenance.of(corpora, (), conditions, contexts, devices=devices)

    def draw() -> None:
        way = "Each context scores the second halves of its own chunks"
        if paired:
            way = "Every context scores the same tokens, those in the second halves of the longest chunks"
        outputs.draw(
            curve_table(points(), " ".join((f"{way}.", provenance().caption, *(published.about if published else ()))))
        )

    failures: list[str] = []
    try:
        with outputs.console.progress() as progress:
            for corpus, subject in itertools.product(corpora, subjects):
                report = _within(progress, corpus) if len(corpora) > 1 else progress
                names = (subject.model, subject.type)
                try:
                    own = subject.conditions(conditions)
                    for point in measure_contexts(subject.path, corpus, contexts, own, paired, *names, report, child):
                        done.append(point)
                except (Interrupted, NetworkError):
                    raise
                except LocalmixError as error:
                    if len(corpora) == len(subjects) == 1:
                        raise
                    failures.append(f"{subject.path.name}, {corpus.name}: {error.message}")
    except (KeyboardInterrupt, NetworkError):
        if done and not outputs.console.json:
            draw()
        raise
    outputs.console.result({**asdict(provenance()), "points": points()}, draw)
    outputs.write(
        f"{subjects[0].model}: perplexity over context",
        provenance().fields,
        (),
        points(),
        published.about if published else (),
    )
    for failure in failures:
        outputs.console.warn(failure)
    return InputError.exit_code if failures else 0


def _within(progress: Callable[[int, int, str], None], corpus: Corpus) -> Callable[[int, int, str], None]:
    """A `progress` that names the corpus first."""
    return lambda done, total, label: progress(done, total, f"{corpus.name}: {label}")
