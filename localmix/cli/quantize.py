"""`localmix quantize`: see `localmix.quantize`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.mixture_options import MixtureWish, mixture_options, rated_document
from localmix.cli.parameters import (
    FILE,
    MODEL,
    TYPES,
    examples,
    json_option,
    lora_option,
    parse_size,
    parse_types,
    presets_option,
    threads_option,
)

if TYPE_CHECKING:
    from localmix.optimization.target import Target
    from localmix.presets import Preset, Presets
    from localmix.quantize import MixtureSummary, OutputSummary
    from localmix.sources.adapter import Lora
    from localmix.sources.remote import Remote


@click.command()
@click.argument("types", metavar="[TYPE[,TYPE…]]", type=TYPES, required=False)
@click.argument("model", metavar="[SRC]", type=MODEL, required=False)
@click.argument("more", metavar="", nargs=-1)
@mixture_options
@click.option(
    "--save-recipe",
    type=FILE,
    metavar="FILE",
    help="With --target: write the mixture as a preset for --presets, with --dry-run too.",
)
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(min=1),
    help="With --fit: positions of context that are to fit, too; 4096 by default.",
)
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="With --fit: type of the KV cache.",
)
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
@click.option("--output-type", metavar="TYPE", help="The type of output.weight.")
@click.option("--embedding-type", metavar="TYPE", help="The type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="Give every tensor the base type, without llama.cpp's mixture.")
@click.option("--split-max-size", metavar="SIZE", help="Write files of at most this size, such as 20GiB.")
@click.option(
    "--override-kv", "overrides", multiple=True, metavar="KEY=TYPE:VALUE", help="Set a metadata entry of the output."
)
@click.option("--allow-requantize", is_flag=True, help="Take a source that is already quantized; loses twice.")
@click.option(
    "--upstream-imatrix",
    is_flag=True,
    help="Weigh experts that no calibration token reached as llama.cpp does, instead of by the others' mean.",
)
@lora_option
@click.option("--keep", is_flag=True, help="Keep a checkpoint that comes from the hub, as `localmix pull` does.")
@click.option("--dry-run", is_flag=True, help="Check and show what would be written.")
@click.option("--list", "show_list", is_flag=True, help="Show all types with what they cost on Mixtral-8x7B.")
@presets_option
@threads_option
@json_option
@examples(
    "localmix quantize Q4_K",
    "localmix quantize Q8_0,Q4_K,IQ2_XS ~/models/Mixtral-8x7B-v0.1",
    "localmix quantize chinese-mixtral tinymix",
    "localmix quantize Q4_K tinymix --tensor-type attn_v=Q8_0 -o tinymix-custom.gguf",
    "localmix quantize Q8_0 ~/models/Mixtral-8x7B-v0.1 --split-max-size 20GiB -o /mnt/usb",
    "localmix quantize Q4_K mistralai/Mixtral-8x7B-v0.1",
    "localmix quantize Q4_K ~/models/Mixtral-8x7B-v0.1 --lora ~/adapters/chinese-mixtral-lora",
    "localmix quantize tinymix --target 3.5bpw --save-recipe tinymix-recipe.yaml",
    "localmix quantize ~/models/Mixtral-8x7B-v0.1 --target 12GiB --sensitivity mixtral.sensitivities.json",
    "localmix quantize tinymix --fit 16 --ctx 8192 --min output=Q6_K --types fast",
    "localmix quantize --list",
)
def command(
    types: str | None,
    model: str | None,
    more: tuple[str, ...],
    wish: MixtureWish,
    save_recipe: Path | None,
    context: int | None,
    kv_type: str,
    output: Path | None,
    imatrix: Path | None,
    no_imatrix: bool,
    rules: tuple[str, ...],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    split_max_size: str | None,
    overrides: tuple[str, ...],
    allow_requantize: bool,
    upstream_imatrix: bool,
    loras: tuple[str, ...],
    keep: bool,
    dry_run: bool,
    show_list: bool,
    presets_file: Path | None,
    threads: int | None,
    json: bool,
) -> None:
    """Make smaller models: one type, several, or a whole set of types from one read.

    SRC is a checkpoint folder or a GGUF file in BF16, F16 or F32. Q3_K, Q4_K and Q5_K mean the _M mixture.
    A run that was killed goes on where it was when the same command is given again.

    With --target or --fit the type of each tensor is chosen, so that as little as possible is lost for the size: no
    TYPE is needed then. How much each type would lose is sampled from the weights; how much that matters is told by
    --sensitivity, or by what was measured on other models.

    SRC may be a model of the hub, such as mistralai/Mixtral-8x7B-v0.1: its shards are quantized as they come and
    deleted, so that the disk needs room for the outputs and two shards. The library's importance matrix is not
    used then; name one with --imatrix.
    """
    from dataclasses import replace

    from localmix import library
    from localmix.cli.model_argument import adapted, arriving_model, find_model_of_hub
    from localmix.downloads.arrivals import arriving_name
    from localmix.errors import FileError, UsageError
    from localmix.optimization.recipe import write_recipes
    from localmix.output import check_outputs
    from localmix.presentation.table import Column, Table, number
    from localmix.presets import load_presets, tensor_type
    from localmix.quantize import parse_override, parse_rule, quantize
    from localmix.sizes import size, size_unit
    from localmix.sources.adapter import parse_lora
    from localmix.sources.remote import heads

    console = Console(json)
    known = load_presets(presets_file)
    if show_list:
        _show_list(console, known)
        return
    wish, words = wish.take_word(tuple(word for word in (types, model, *more) if word is not None))
    types, model = _sort_out(words, known, wish)
    names = parse_types(types, known) if types is not None else []
    if save_recipe is not None and not save_recipe.parent.is_dir():
        raise FileError(
            f"The folder of {save_recipe} does not exist.", f"Make it with `mkdir -p {save_recipe.parent}`."
        )
    if save_recipe is not None and not wish.is_given:
        raise UsageError("--save-recipe is for a mixture that is chosen.", "Say how large with --target or --fit.")
    if (context is not None or kv_type != "f16") and wish.fit is None:
        raise UsageError("--ctx and --kv-type are for --fit.", "A file's size does not depend on the context.")
    if pure and wish.is_given:
        raise UsageError("--pure gives all tensors one type, and --target chooses one for each.")
    recipe = next((name for name in names if known.find(name).recipe is not None), None)
    if pure and recipe is not None:
        raise UsageError(f"--pure gives all tensors one type, and the recipe {recipe} names one for each.")
    if imatrix is not None and no_imatrix:
        raise UsageError("--imatrix and --no-imatrix contradict each other.")
    remote = find_model_of_hub(model)
    if keep and remote is None:
        raise UsageError("--keep is for a model that comes from the hub.")
    path = library.resolve(model, library.Purpose.SOURCE) if remote is None else Path(arriving_name(remote))
    count = len(names) + len(wish.targets) + (wish.fit is not None)
    if output is not None and count > 1 and not output.is_dir():
        raise UsageError(
            f"{count} types make {count} files, and {output} is not a folder.",
            f"Make it with `mkdir -p {output}`.",
        )
    if split_max_size is not None and output is None:
        raise UsageError("The model library holds whole files.", "Name a file or a folder for the parts with -o.")
    presets = [_changed(known.find(name), output_type, embedding_type, pure) for name in names]
    adapters = [parse_lora(lora) for lora in loras]
    named = adapted(path, adapters)
    targets = list(wish.targets)
    if wish.fit is not None:
        targets.append(_fit(console, wish, path, remote, adapters, context, kv_type))
    wanted: list[Preset | Target] = [*presets, *targets]
    outputs = [(each, _output(named, None if adapters else remote, output, each.name)) for each in wanted]
    if save_recipe is not None:
        read = [*(path.iterdir() if path.is_dir() else [path]), imatrix, presets_file, wish.request.sensitivities]
        others = [each for _, each in outputs if each.parent.is_dir()]
        check_outputs([(each, 0) for each in (save_recipe, *others)], [file for file in read if file is not None])
    gains = bool(targets) or any(preset.imatrix != "unused" for preset in presets)
    if imatrix is None and not no_imatrix and remote is None and gains:
        imatrix = library.find_imatrix(named)
    wish = wish.timed(console, threads)
    terms = replace(
        wish.request.terms,
        output=tensor_type(output_type) if output_type else None,
        embedding=tensor_type(embedding_type) if embedding_type else None,
    )
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(library.room_for(outputs[0][1]))
        arrivals = None
        if remote is not None:
            coming = (
                None if dry_run else stack.enter_context(arriving_model(console, remote, outputs[0][1].parent, keep))
            )
            path = stack.enter_context(heads(remote)).path if coming is None else coming.path
            arrivals = coming.arrivals if coming else None
        progress = stack.enter_context(console.progress(WEIGHTS))
        quantized = quantize(
            path,
            outputs,
            imatrix=imatrix,
            rules=[parse_rule(rule) for rule in rules],
            request=replace(wish.request, terms=terms),
            overrides=[parse_override(override) for override in overrides],
            split_bytes=parse_size(split_max_size) if split_max_size is not None else None,
            allow_requantize=allow_requantize,
            upstream_imatrix=upstream_imatrix,
            loras=adapters,
            threads=threads,
            dry_run=dry_run,
            progress=progress,
            arrivals=arrivals,
        )
    if not dry_run:
        repository = remote.repository.name if remote is not None and not adapters else ""
        made_from = None if adapters else path  # not from that alone
        library.remember([summary.path for summary in quantized.outputs], source=made_from, repository=repository)

    mixtures = [summary for summary in quantized.outputs if summary.mixture is not None]
    importance = quantized.importance
    if importance is not None:
        text = ", ".join(importance.datasets) or "a text that it does not name"
        told = f"{importance.chunk_count or 'some'} chunks of {text}"
        covered = f"; {importance.coverage.summary}" if importance.coverage.tokens else ""
        console.note(f"With the importance matrix {imatrix}: {told}{covered}.")
    for note in quantized.notes:
        console.warn(note)
    for summary in mixtures:
        _tell_mixture(console, summary)
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
        planned = f"planned; {'nothing' if save_recipe is None else f'nothing but {save_recipe}'} was written"
        done = planned if dry_run else f"in {quantized.seconds:.1f} s"
        console.table(Table(columns, rows, f"{total} {done}"))

    if save_recipe is not None:
        write_recipes(save_recipe, [summary.mixture.preset for summary in mixtures if summary.mixture is not None])
    document = {
        "outputs": [{**vars(summary), "mixture": _document(summary.mixture)} for summary in quantized.outputs],
        "seconds": quantized.seconds,
        "imatrix": None
        if importance is None
        else {
            "path": imatrix,
            "chunks": importance.chunk_count,
            "datasets": importance.datasets,
            "unreached": importance.coverage.unreached,
        },
    }
    console.result(document, draw)


def _sort_out(words: tuple[str, ...], known: Presets, wish: MixtureWish) -> tuple[str | None, str | None]:
    """TYPES and SRC, in the order of the command or in llama-quantize's: the word that is no type is SRC.

    Raises:
        UsageError: no type and no size is named, or there are too many words.
    """
    from localmix import library
    from localmix.errors import UsageError

    kinds = [word for word in words if _names_types(word, known)]
    if len(kinds) > 1 and not any(library.is_there(word) for word in kinds):
        raise UsageError("Several types are one word, without spaces.", f"Such as {','.join(kinds)}.")
    if len(words) > 2:
        raise UsageError(f"{words[2]!r} is one argument too many.", "Name types and one model; -o names the output.")
    kind = next(iter(kinds), None)
    rest = [word for word in words if word is not kind]
    if kind is None and not (wish.is_given and len(rest) < 2):
        unknown = [word for word in rest if not library.is_there(word)]
        if unknown:
            parse_types(unknown[0], known)
        raise UsageError("No type was named.", "`localmix quantize --list` shows them all.")
    return kind, (rest[0] if rest else None)


def _names_types(word: str, known: Presets) -> bool:
    from localmix.errors import UsageError

    try:
        return bool(parse_types(word, known))
    except UsageError:
        return False


def _fit(
    console: Console,
    wish: MixtureWish,
    path: Path,
    remote: Remote | None,
    loras: list[Lora],
    context: int | None,
    kv_type: str,
) -> Target:
    """The target of --fit, told with what it leaves room for."""
    from localmix.sources.open import open_source
    from localmix.sources.remote import heads

    with ExitStack() as stack:
        if remote is not None:
            path = stack.enter_context(heads(remote)).path
        found = wish.fitting(stack.enter_context(open_source(path, loras=loras)), context, kv_type)
    console.note(found.describe())
    return found.target


def _tell_mixture(console: Console, summary: OutputSummary) -> None:
    """What a mixture was chosen by, and what it is expected to gain."""
    from localmix.presentation.table import number
    from localmix.sizes import size

    mixture = summary.mixture
    assert mixture is not None
    best = mixture.best_preset
    told = f"{summary.type}: expected divergence {number(mixture.damage, 5)} nats a token"
    if best is not None:
        told += f"; the best preset of at most this size, {best.name} ({size(best.bytes)}): {number(best.damage, 5)}"
    console.note(f"{told}. Sensitivities: {mixture.sensitivities}; errors: {mixture.errors}.")


def _document(mixture: MixtureSummary | None) -> dict[str, Any] | None:
    """A chosen mixture, for JSON."""
    from localmix.optimization.recipe import describe_rules

    if mixture is None:
        return None
    return {
        "expected_divergence": mixture.damage,
        "best_preset": rated_document(mixture.best_preset),
        "sensitivities": mixture.sensitivities,
        "errors": mixture.errors,
        "base": mixture.preset.base,
        "recipe": describe_rules(mixture.preset.rules),
    }


def _output(source: Path, remote: Remote | None, output: Path | None, kind: str) -> Path:
    from localmix import library

    if output is None and remote is not None:
        return library.repository_output_path(source.name, remote.repository.name, kind)
    if output is None:
        return library.output_path(source, kind)
    return output / f"{library.model_name(source)}-{kind}.gguf" if output.is_dir() else output


def _changed(preset: Preset, output_type: str | None, embedding_type: str | None, pure: bool) -> Preset:
    from dataclasses import replace

    from localmix.presets import tensor_type

    return replace(
        preset,
        output=tensor_type(output_type) if output_type else preset.output,
        embedding=tensor_type(embedding_type) if embedding_type else preset.embedding,
        pure=pure or preset.pure,
    )


def _show_list(console: Console, presets: Presets) -> None:
    from localmix.catalog import catalog
    from localmix.presentation.table import Column, Table, number

    entries = catalog(presets)

    def draw() -> None:
        columns = (
            Column("Type", number=False),
            Column("BPW"),
            Column("GiB"),
            Column("imatrix", number=False),
            Column("Advice", number=False),
        )
        rows = tuple(
            (
                entry.type,
                number(entry.bpw, 2),
                number(entry.bytes / 2**30 if entry.bytes is not None else None, 1),
                entry.imatrix,
                entry.advice,
            )
            for entry in entries
        )
        short = ", ".join(f"{alias} = {name}" for alias, name in presets.aliases.items())
        console.table(Table(columns, rows, f"Sizes are Mixtral-8x7B's. {short}. Sets: {', '.join(presets.sets)}."))

    console.result({"types": entries, "aliases": presets.aliases, "sets": presets.sets}, draw)
