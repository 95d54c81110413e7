"""`localmix bench`: see `localmix.measurement.speed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.bench_types import ALL, bench_types
from localmix.cli.console import Console, Progress
from localmix.cli.parameters import MODEL, TYPES, examples, json_option, markdown_option, parse_types

if TYPE_CHECKING:
    from localmix.measurement.comparison import Subject
    from localmix.measurement.speed import Settings, SpeedPoint
    from localmix.presentation.table import Table


def _numbers(least: int, most: int, words: Mapping[str, int | None] | None = None) -> Callable[..., Any]:
    """A click callback that reads `1,2,4`, each number once; `words` are allowed in the place of a number."""
    known = words or {}

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int | None] | None:
        if value is None:
            return None
        found: dict[int | None, None] = {}
        for word in (word.strip() for word in value.split(",")):
            if word in known:
                found[known[word]] = None
            elif word.isascii() and word.isdigit() and least <= int(word) <= most:
                found[int(word)] = None
            else:
                also = "".join(f", or {name}" for name in known)
                raise click.BadParameter(f"{word!r} is not a number from {least} to {most}{also}.", ctx, param)
        return list(found)

    return read


def _kv_types(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    from localmix.measurement.speed import KV_TYPES

    names = [word.strip() for word in value.split(",")]
    for name in names:
        if name not in KV_TYPES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(KV_TYPES)}.", ctx, param)
    return list(dict.fromkeys(names))


@click.command()
@click.argument("models", metavar="[MODEL]…", nargs=-1, type=MODEL)
@click.option(
    "-p",
    "--prompt",
    metavar="N[,N…]",
    default="512",
    show_default=True,
    callback=_numbers(0, 1 << 20),
    help="Read prompts of so many tokens; 0 for none.",
)
@click.option(
    "-n",
    "--gen",
    metavar="N[,N…]",
    default="128",
    show_default=True,
    callback=_numbers(0, 1 << 20),
    help="Generate so many tokens; 0 for none.",
)
@click.option(
    "--pg", metavar="P,G", multiple=True, help="Read P tokens and generate G after them, timed as one; may be repeated."
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1, 1000), default=5, show_default=True, help="Runs of each test."
)
@click.option(
    "-d",
    "--depth",
    metavar="N[,N…]",
    default="0",
    show_default=True,
    callback=_numbers(0, 1 << 24),
    help="Tokens in the context before a run.",
)
@click.option(
    "-t", "--threads", metavar="N[,N…]", callback=_numbers(1, 512), help="Threads; the physical cores by default."
)
@click.option(
    "-b",
    "--batch",
    metavar="N[,N…]",
    default="2048",
    show_default=True,
    callback=_numbers(1, 1 << 20),
    help="Most tokens given to the engine at once.",
)
@click.option(
    "--ubatch",
    metavar="N[,N…]",
    default="512",
    show_default=True,
    callback=_numbers(1, 1 << 20),
    help="Most tokens computed at once.",
)
@click.option(
    "--kv-type",
    "kv_types",
    metavar="T[,T…]",
    default="f16",
    show_default=True,
    callback=_kv_types,
    help="Types of the KV cache: f16, q8_0, q4_0, and the others of llama.cpp.",
)
@click.option(
    "--gpu-layers",
    metavar="auto|N[,N…]",
    default="auto",
    show_default=True,
    callback=_numbers(0, 100_000, {"auto": None}),
    help="Layers on the GPU; 0 for no GPU at all.",
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda|metal|NAME",
    default="auto",
    show_default=True,
    help="Where to compute: a kind of device, or names from `localmix doctor` with commas between.",
)
@click.option(
    "--types",
    metavar="[TYPE[,TYPE…]]",
    type=TYPES,
    is_flag=False,
    flag_value=ALL,
    help="These types of each model, or a set of them. Without a model: how fast this processor generates with"
    " weights of these tensor types; all of them if none is named.",
)
@click.option("--force", is_flag=True, help="Load the models even if memory seems too small.")
@click.option("--again", is_flag=True, help="Measure the types anew that were measured before; without a model.")
@click.option("--csv", is_flag=True, help="The rows as CSV, with llama-bench's names.")
@markdown_option
@json_option
@examples(
    "localmix bench",
    "localmix bench tinymix --types Q8_0,Q4_K_M,Q2_K",
    "localmix bench tinymix:Q4_K_M --threads 1,2,4 --depth 0,4096 --kv-type f16,q8_0",
    "localmix bench --types",
    "localmix bench --types Q4_K,IQ4_XS,IQ3_S --threads 4 --again",
    "localmix bench model.gguf -p 512,2048 -n 0 --ubatch 128,512 --csv > prompt.csv",
)
def command(
    models: tuple[str, ...],
    prompt: list[int],
    gen: list[int],
    pg: tuple[str, ...],
    repetitions: int,
    depth: list[int],
    threads: list[int] | None,
    batch: list[int],
    ubatch: list[int],
    kv_types: list[str],
    gpu_layers: list[int | None],
    device: str,
    types: str | None,
    force: bool,
    again: bool,
    csv: bool,
    markdown: bool,
    json: bool,
) -> int:
    """Measure how fast models read prompts and generate, as llama.cpp's llama-bench does.

    Random tokens, a warm-up, then repetitions: tokens per second, mean and standard deviation. An option with
    several values makes a row for each; several options make one for each combination. A row that fails says
    so; the exit code is then 3. Models for whose longest context there is no memory are refused before any runs.

    With --types and no model it measures types of tensors instead: a matrix of each times a vector, as every
    token needs it. The figures are kept for this processor and for `quantize --types fast`.
    """
    from localmix.capacity.fit import find_gpus
    from localmix.errors import InputError, UsageError
    from localmix.measurement.comparison import look_at
    from localmix.measurement.speed import SpeedTest, bench, sweep
    from localmix.native.devices import default_threads

    console = Console(json)
    if types is not None and not models:
        _refuse_others("only a model is measured so", "types", "threads", "again", "csv", "markdown", "json")
        if threads is not None and len(threads) > 1:
            raise UsageError("Types are measured with one number of threads.")
        bench_types(console, types, threads[0] if threads else None, again, csv, markdown)
        return 0
    if types == ALL or again:
        raise UsageError("A model is measured in types that are named, and always anew.", "Name them after --types.")
    tests = [SpeedTest(count, 0) for count in prompt if count]
    tests += [SpeedTest(0, count) for count in gen if count]
    tests += [SpeedTest(*_pair(words)) for words in pg]
    if not tests:
        raise UsageError("There is nothing to measure.", "Give -p, -n or --pg.")
    names: tuple[str, ...] = ()
    if device == "cpu":
        gpu_layers = [0]
    elif device != "auto":
        names = tuple(gpu.name for gpu in find_gpus(device))
    subjects = {path: look_at(path) for path in _paths(models, types)}
    longest = max(depth) + max(test.prompt + test.generated for test in tests)
    for subject in subjects.values():
        if longest > subject.trained_context:
            console.warn(f"{subject.path.name} was trained for a context of {subject.trained_context}, not {longest}.")
    settings = sweep(threads or [default_threads()], batch, ubatch, depth, kv_types, gpu_layers)
    _check_memory(console, list(subjects), settings, longest, device, force)

    done: list[SpeedPoint] = []

    def draw() -> None:
        table = _table(done, subjects)
        if csv:
            console.raw(table.csv())
        else:
            console.table(table, markdown)

    bars: list[Progress] = []
    points = bench(
        list(subjects), tests, settings, repetitions, lambda runs, total, label: bars[-1](runs, total, label), names
    )
    try:
        while True:
            with console.progress() as progress:  # a bar for each row, so that rows can be told between them
                bars.append(progress)
                point = next(points, None)
            if point is None:
                break
            done.append(point)
            _tell(console, point, subjects[point.path], settings)
    except KeyboardInterrupt:
        if done and not json:
            draw()
        raise
    _remember(list(subjects))
    console.result({"rows": [_record(point, subjects[point.path]) for point in done]}, draw)
    return InputError.exit_code if any(point.failure for point in done) else 0


def _refuse_others(reason: str, *allowed: str) -> None:
    """Refuse the options that were given and are none of these."""
    from localmix.errors import UsageError

    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == click.core.ParameterSource.COMMANDLINE
        if given and parameter.name not in (*allowed, "models"):
            raise UsageError(f"{parameter.opts[-1]} does not go with --types alone: {reason}.", "Name a model.")


def _pair(words: str) -> tuple[int, int]:
    prompt, comma, generated = words.partition(",")
    if not (comma and prompt.strip().isdigit() and generated.strip().isdigit() and int(prompt) + int(generated)):
        raise click.BadParameter(f"{words!r} is not P,G: two numbers of tokens.", param_hint="'--pg'")
    return int(prompt), int(generated)


def _paths(models: Sequence[str], types: str | None) -> list[Path]:
    """The files to measure, each once."""
    from localmix import library

    if types is None:
        found = [library.resolve(model, library.Purpose.MEASURE) for model in models or (None,)]
    else:
        names = [library.model_name(library.resolve(model, library.Purpose.ANY)) for model in models or (None,)]
        found = [
            library.resolve(f"{name}:{kind}", library.Purpose.MEASURE) for name in names for kind in parse_types(types)
        ]
    return list(dict.fromkeys(found))


def _check_memory(
    console: Console, paths: Sequence[Path], settings: Sequence[Settings], context: int, device: str, force: bool
) -> None:
    """Refuse a model that has no room with the settings that take most of the processor's memory."""
    from localmix.cli.memory_check import MemoryCheck
    from localmix.tensor_types import TensorType, bits

    layers = min((choice.gpu_layers for choice in settings if choice.gpu_layers is not None), default=None)
    check = MemoryCheck(
        console,
        context,
        kv_type=max((choice.kv_type for choice in settings), key=lambda kind: bits(TensorType[kind.upper()])),
        device=device,
        gpu_layers=layers,
        experts="gpu",
        generation=False,
        batch=max(min(choice.batch, choice.micro_batch) for choice in settings),
    )
    fewer = ", or fewer layers with --gpu-layers" if layers else ""
    for path in paths:
        check.admit(path, force, f"Ask for less with --depth, --prompt, --gen, --pg or --ubatch{fewer}.")


def _remember(paths: list[Path]) -> None:
    from localmix import library

    library.remember(paths)


def _tell(console: Console, point: SpeedPoint, subject: Subject, sweep: Sequence[Settings]) -> None:
    """A finished row, in a line."""
    varied = [f"{name} {of(point.settings)}" for name, (of, _) in _SETTINGS.items() if len(set(map(of, sweep))) > 1]
    title = ", ".join((f"{subject.model} {subject.type}", *varied, point.name))
    if point.failure:
        console.warn(f"{title}: {point.failure}")
    else:
        console.note(f"{title}: {point.tps:.2f} ± {point.deviation:.2f} tokens/s")


def _record(point: SpeedPoint, subject: Subject) -> dict[str, Any]:
    """A row as data: llama-bench's fields under its names, then ours."""
    import statistics

    settings, test = point.settings, point.test
    spread = statistics.stdev(point.nanoseconds) if len(point.nanoseconds) > 1 else 0.0
    return {
        "build_commit": point.machine.engine.removeprefix("llama.cpp "),
        "cpu_info": point.machine.processor,
        "gpu_info": ", ".join(point.machine.gpus),
        "model_filename": str(point.path),
        "model_type": point.description,
        "model_size": point.weight_bytes,
        "model_n_params": point.parameters,
        "n_batch": settings.batch,
        "n_ubatch": settings.micro_batch,
        "n_threads": settings.threads,
        "type_k": settings.kv_type,
        "type_v": settings.kv_type,
        "n_gpu_layers": -1 if settings.gpu_layers is None else settings.gpu_layers,
        "n_prompt": test.prompt,
        "n_gen": test.generated,
        "n_depth": settings.depth,
        "avg_ns": round(statistics.mean(point.nanoseconds)) if point.nanoseconds else None,
        "stddev_ns": round(spread) if point.nanoseconds else None,
        "avg_ts": point.tps,
        "stddev_ts": point.deviation,
        "samples_ns": point.nanoseconds,
        "samples_ts": point.samples,
        "model": subject.model,
        "type": subject.type,
        "file_bytes": subject.bytes,
        "bpw": subject.bpw,
        "ms_per_token": point.ms_per_token,
        "memory_bytes": point.memory_bytes,
        "failure": point.failure,
    }


# name: (where it is found, the default, which needs no mention)
_SETTINGS: Mapping[str, tuple[Callable[[Settings], object], object]] = {
    "threads": (lambda settings: settings.threads, None),
    "batch": (lambda settings: settings.batch, 2048),
    "ubatch": (lambda settings: settings.micro_batch, 512),
    "KV": (lambda settings: settings.kv_type, "f16"),
    "GPU layers": (lambda settings: "auto" if settings.gpu_layers is None else settings.gpu_layers, "auto"),
}


def _table(points: Sequence[SpeedPoint], subjects: Mapping[Path, Subject]) -> Table:
    """A row for each point; what is the same for all stands in the caption."""
    from localmix.presentation.table import Column, Table, number
    from localmix.sizes import size_unit

    unit, unit_name = size_unit(subject.bytes for subject in subjects.values())
    several = len({subject.model for subject in subjects.values()}) > 1
    same = {name for name, (of, _) in _SETTINGS.items() if len({of(point.settings) for point in points}) == 1}
    varied = {name: of for name, (of, _) in _SETTINGS.items() if name not in same}
    columns = [
        *([Column("Model", number=False)] if several else []),
        Column("Type", number=False),
        Column(f"Size {unit_name}", rank=2),
        *(Column(name[0].upper() + name[1:]) for name in varied),
        Column("Test", number=False),
        Column("Tokens/s"),
        Column("±"),
        Column("ms/token", rank=1),
        Column(f"Memory {unit_name}", rank=3),
    ]
    rows = []
    for point in points:
        subject = subjects[point.path]
        rows.append(
            (
                *([subject.model] if several else []),
                subject.type,
                f"{subject.bytes / unit:.2f}",
                *(str(of(point.settings)) for of in varied.values()),
                point.name,
                "failed" if point.failure else number(point.tps, 2),
                number(point.deviation, 2),
                number(point.ms_per_token, 2),
                number(None if point.memory_bytes is None else point.memory_bytes / unit, 2),
            )
        )
    machine = next((point.machine for point in points if point.machine.processor), points[0].machine)
    repetitions = max(len(point.nanoseconds) for point in points)
    first = points[0].settings
    fixed = [f"{name} {of(first)}" for name, (of, usual) in _SETTINGS.items() if name in same and of(first) != usual]
    runs = f"{repetitions} run{'s' * (repetitions != 1)}"
    caption = "; ".join(filter(None, (*machine.gpus, machine.processor, *fixed, runs, machine.engine)))
    records = tuple(
        {name: value for name, value in _record(point, subjects[point.path]).items() if not name.startswith("samples")}
        for point in points
    )
    return Table(tuple(columns), tuple(rows), f"{caption}.", records=records)
