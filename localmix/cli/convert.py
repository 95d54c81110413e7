"""`localmix convert`: see `localmix.convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option, lora_option, threads_option
from localmix.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localmix.convert import Converted
    from localmix.sources.adapter import Lora
    from localmix.sources.remote import Remote


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
@lora_option
@click.option(
    "--upstream",
    is_flag=True,
    help="Use llama.cpp's converter, in an environment of its own that is made at the first use.",
)
@click.option("--keep", is_flag=True, help="Keep a checkpoint that comes from the hub, as `localmix pull` does.")
@click.option("--yes", is_flag=True, help="With --upstream: install what it needs, and run what a checkpoint brings.")
@threads_option
@json_option
@examples(
    "localmix convert examples/tinymix",
    "localmix convert ~/models/Mixtral-8x7B-v0.1 -o mixtral.gguf --type f16",
    "localmix convert ~/models/falcon-7b --upstream",
    "localmix convert mistralai/Mixtral-8x7B-v0.1",
    "localmix convert ~/models/Mixtral-8x7B-v0.1 --lora ~/adapters/chinese-mixtral-lora",
    "localmix convert mixtral-8x7b.Q4_K_M.gguf-split-a",
)
def command(
    model: str | None,
    output: Path | None,
    kind: str,
    pre: str | None,
    loras: tuple[str, ...],
    upstream: bool,
    keep: bool,
    yes: bool,
    threads: int | None,
    json: bool,
) -> None:
    """Make a GGUF file from a checkpoint folder.

    SRC is a Hugging Face folder with safetensors files, its config and its tokenizer. The weights stay as
    they are; nothing that the checkpoint brings is executed.

    SRC may also be a GGUF file that llama.cpp no longer reads: one with a tensor for each expert (before April
    2024), one in pieces (model.gguf-split-a and on), or one of version 1. It is written anew with the same weights.

    SRC may also be a model of the hub, such as mistralai/Mixtral-8x7B-v0.1: its shards are converted as they come
    and deleted, so that the disk needs room for the output and two shards.

    What localmix does not know, llama.cpp's own converter may: --upstream runs it. It needs torch, which is
    installed beside it at the first use, and it may run Python code that a checkpoint brings. Both are asked
    about; --yes answers. LOCALMIX_UPSTREAM_PYTHON names a Python that has torch and transformers already.
    """
    from localmix import library
    from localmix.cli.model_argument import adapted, find_model_of_hub
    from localmix.convert import conversion_preset, convert, describe
    from localmix.sources.adapter import parse_lora
    from localmix.sources.open import open_source
    from localmix.upstream import convert_upstream, plain_type

    console = Console(json)
    remote = find_model_of_hub(model)
    if remote is not None and upstream:
        raise UsageError("--upstream needs the whole checkpoint here.", f"Run `localmix pull {model}` first.")
    if remote is None and keep:
        raise UsageError("--keep is for a model that comes from the hub.")
    if loras and upstream:
        raise UsageError("--lora is for localmix's own converter.", "Make a checkpoint with `localmix merge` first.")
    adapters = [parse_lora(lora) for lora in loras]
    if remote is not None:
        _report(console, _convert_arriving(console, remote, output, kind, pre, adapters, keep, threads))
        return
    path = library.resolve(model, library.Purpose.CHECKPOINT)
    if upstream:
        if pre:
            raise UsageError("--pre is for localmix's own converter, not for --upstream.")
        _prepare_upstream(console, path, yes)
        kind = plain_type(path) if kind == "auto" else kind
    if output is None or output.is_dir():
        if upstream:
            name = kind.upper()
        else:
            with open_source(path, pre=pre, loras=adapters) as source:
                name = conversion_preset(source, kind).name
        named = adapted(path, adapters)
        if output is None:
            output = library.output_path(named, name)
        else:
            output = output / f"{library.model_name(named)}-{name}.gguf"
    if upstream:
        with library.room_for(output), console.progress() as progress:
            convert_upstream(path, output, kind, progress)
        converted = describe(output)
    else:
        with library.room_for(output), console.progress(WEIGHTS) as progress:
            converted = convert(path, output, kind, pre=pre, loras=adapters, threads=threads, progress=progress)
    library.remember([output], source=None if adapters else path)
    _report(console, converted)


def _convert_arriving(
    console: Console,
    remote: Remote,
    output: Path | None,
    kind: str,
    pre: str | None,
    adapters: Sequence[Lora],
    keep: bool,
    threads: int | None,
) -> Converted:
    """Convert a model of the hub while it comes."""
    from localmix import library
    from localmix.cli.model_argument import adapted, arriving_model
    from localmix.convert import conversion_preset, convert
    from localmix.downloads.arrivals import arriving_name
    from localmix.sources.open import open_source

    model = library.model_name(adapted(Path(arriving_name(remote)), adapters))
    repository = "" if adapters else remote.repository.name  # its name is that of the model without adapters
    folder = library.home() / model if output is None else output if output.is_dir() else output.parent
    with library.room_for(folder / model), arriving_model(console, remote, folder, keep) as coming:
        if output is None or output.is_dir():
            with open_source(coming.path, pre=pre, loras=adapters) as source:
                name = conversion_preset(source, kind).name
            if output is None and adapters:
                output = library.output_path(Path(model), name)
            elif output is None:
                output = library.repository_output_path(model, repository, name)
            else:
                output = output / f"{model}-{name}.gguf"
        with console.progress(WEIGHTS) as progress:
            converted = convert(
                coming.path,
                output,
                kind,
                pre=pre,
                loras=adapters,
                threads=threads,
                progress=progress,
                arrivals=coming.arrivals,
            )
    library.remember([output], repository=repository)
    return converted


def _report(console: Console, converted: Converted) -> None:
    from localmix.sizes import size

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


def _prepare_upstream(console: Console, model: Path, yes: bool) -> None:
    """Have llama.cpp's converter ready, after a yes to what it installs and to the code that would be run.

    Raises:
        UsageError: that is not wanted, or nobody is there to ask.
    """
    from localmix.upstream import DISK, DOWNLOAD, brings_code, environment, make

    code = brings_code(model)
    if code:
        _agree(
            console,
            f"{model} brings code ({', '.join(code[:3])}), and llama.cpp's converter may run it with all your rights.",
            yes,
        )
    target = environment()
    if not target.ready:
        needs = "" if not target.own else f" with torch and transformers ({DOWNLOAD} to download, {DISK})"
        _agree(console, f"llama.cpp's converter{needs} is to be installed in {target.folder}.", yes)
    try:
        make(target, console.status)
    finally:
        console.status()


def _agree(console: Console, what: str, yes: bool) -> None:
    if yes:
        console.note(what)
    elif not (console.can_ask and console.confirm(f"{what} Go on?")):
        raise UsageError(what, "Nothing was done. --yes agrees to it.")
