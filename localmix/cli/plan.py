"""`localmix plan`: see `localmix.plan` and `localmix.capacity.memory`."""

from __future__ import annotations

from typing import Any

import click

from localmix.cli.console import Console
from localmix.cli.mixture_options import MixtureWish, mixture_options
from localmix.cli.parameters import (
    SET,
    TypesOrModel,
    examples,
    json_option,
    lora_option,
    markdown_option,
    parse_types,
)


@click.command()
@click.argument("words", metavar="[SRC] [TYPE]…", nargs=-1, type=TypesOrModel())
@click.option("--set", "set_name", metavar="NAME", type=SET, help="All types of a named set.")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(min=1),
    help="Positions of context for the memory need; 4096, less if the model was trained for less.",
)
@mixture_options
@click.option("--ram", metavar="SIZE", help="Check against a machine sold with so much memory; this one by default.")
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache for the memory need.",
)
@click.option("--imatrix", is_flag=True, help="Plan with an importance matrix: it changes some mixtures.")
@lora_option
@markdown_option
@json_option
@examples(
    "localmix plan examples/tinymix",
    "localmix plan mistralai/Mixtral-8x7B-v0.1 Q4_K IQ2_XS --ram 16",
    "localmix plan tinymix --set chinese-mixtral --imatrix",
    "localmix plan tinymix --target 3.5bpw --target 3MiB",
    "localmix plan mistralai/Mixtral-8x7B-v0.1 --fit 16 --imatrix",
)
def command(
    words: tuple[str, ...],
    set_name: str | None,
    context: int | None,
    wish: MixtureWish,
    ram: str | None,
    kv_type: str,
    imatrix: bool,
    loras: tuple[str, ...],
    markdown: bool,
    json: bool,
) -> None:
    """Show size, bits per weight and memory need of each type, before anything is written.

    SRC is a checkpoint folder, a folder with nothing but a config.json, a GGUF file, or a model of the hub such as
    mistralai/Mixtral-8x7B-v0.1, of which only the heads of the files are read. Without a TYPE all types are planned.

    With --target or --fit the types of the tensors are chosen as `quantize` would, with the importance matrix of the
    library: shown are the types, and what divergence is expected of them beside the presets of that size.

    A type runs well when everything stays in memory. It loads when only its weights, which are read from the file
    again and again, do not: then it is slow.
    """
    from dataclasses import replace

    from localmix import library
    from localmix.capacity import memory
    from localmix.capacity.placement import weigh
    from localmix.capacity.requirements import Requirements, repacked_bytes
    from localmix.capacity.simulation import Setting
    from localmix.cli.model_argument import located
    from localmix.cli.plan_mixture import plan_mixtures
    from localmix.errors import UsageError
    from localmix.plan import Planner
    from localmix.presentation.table import Column, Table, number
    from localmix.presets import load_presets
    from localmix.sizes import size_unit
    from localmix.sources.adapter import parse_lora
    from localmix.sources.open import open_source

    console = Console(json)
    wish, words = wish.take_word(words)
    model, names = sort_out(words, set_name)
    if wish.is_given and (names or ram is not None):
        raise UsageError("Types, --set and --ram are not for --target and --fit.", "Plan them apart.")
    if wish.is_given and wish.fit is None and (context is not None or kv_type != "f16"):
        raise UsageError("A target's size does not depend on --ctx and --kv-type.", "They are for --fit.")
    names = names or list(load_presets().presets)
    room = memory.machine(memory.parse_gigabytes(ram)) if ram else memory.available()
    floor = memory.machine(memory.FLOOR_GB)
    adapters = [parse_lora(lora) for lora in loras]
    with (
        located(console, model, library.Purpose.SOURCE) as found,
        open_source(found.path, loras=adapters) as source,
    ):
        if wish.is_given:
            here = not found.files and not adapters
            wish = wish.timed(console, None)
            matrix = library.find_imatrix(found.path) if here else None
            plan_mixtures(console, source, found.name, wish, matrix, imatrix, context, kv_type, markdown)
            return
        context = context or min(memory.DEFAULT_CONTEXT, memory.trained_context(source))
        planner = Planner(source)
        plans = [planner.plan(load_presets().find(name), has_imatrix=imatrix) for name in names]
        setting = Setting(context, kv_type)
        requirements = Requirements(source)
        requirements.simulate([setting])
        needs = []
        for plan in plans:
            weights = weigh(replace(tensor.info, type=tensor.type) for tensor in plan.tensors)
            needs.append(requirements.need(weights, setting, repacked_bytes(weights)))
        parameters = source.parameters

    document: dict[str, Any] = {
        "path": found.name,
        "download_bytes": found.download_bytes,
        "parameters": parameters,
        "ctx": context,
        "kv_type": kv_type,
        "available": room,
        "simulated": requirements.simulated,
        "types": [
            {
                "type": plan.type,
                "bytes": plan.file_bytes,
                "bpw": plan.bits_per_weight,
                "need": {
                    "weights": need.weights,
                    "repacked": need.repacked,
                    "kv": need.kv,
                    "compute": need.compute,
                    "other": need.output + need.vocabulary + need.program,
                    "anonymous": need.anonymous,
                    "total": need.total,
                },
                "fits": room.fits(need),
                "verdict": room.verdict(need).value,
                "fits_16gb": floor.fits(need),
                "verdict_16gb": floor.verdict(need).value,
                "tensors": [
                    {
                        "name": tensor.info.name,
                        "shape": tensor.info.shape,
                        "type": tensor.type,
                        "bytes": tensor.bytes,
                        "meant": tensor.meant,
                    }
                    for tensor in plan.tensors
                ],
            }
            for plan, need in zip(plans, needs, strict=True)
        ],
    }

    def draw() -> None:
        unit, unit_name = size_unit(plan.file_bytes for plan in plans)
        columns = [
            Column("Type", number=False),
            Column(f"Size {unit_name}"),
            Column("BPW"),
            Column(f"Memory {unit_name}"),
            Column(f"In {memory.parse_gigabytes(ram):g} GB" if ram else "Here", number=False),
        ]
        rows = [
            [
                plan.type,
                f"{plan.file_bytes / unit:.2f}",
                number(plan.bits_per_weight, 2),
                f"{need.total / unit:.2f}",
                room.verdict(need).value,
            ]
            for plan, need in zip(plans, needs, strict=True)
        ]
        if not ram:
            columns.append(Column("In 16 GB", number=False))
            for row, need in zip(rows, needs, strict=True):
                row.append(floor.verdict(need).value)
        notes = [plan.type for plan in plans if plan.fallbacks]
        caption = (
            f"{parameters:,} parameters. Memory: with a context of {context} in {kv_type}"
            f"{'' if requirements.simulated else ', by formula'}."
            f" {'Here' if not ram else 'There'}: {room.bytes / 2**30:.1f} GiB, {room.limit}."
        )
        if notes:
            caption += f" Some columns fit no block of {', '.join(notes)}: those tensors take another type."
        console.table(Table(tuple(columns), tuple(map(tuple, rows)), caption), markdown)

    console.result(document, draw)


def sort_out(words: tuple[str, ...], set_name: str | None) -> tuple[str | None, list[str]]:
    """The model, if one is named, and the types, which may come in any order: what is no type is the model.

    Raises:
        UsageError: two models are named, or a type that does not exist.
    """
    from localmix.errors import UsageError
    from localmix.presets import load_presets

    presets = load_presets()
    models: list[str] = []
    names: list[str] = []
    for word in words:
        try:
            names += parse_types(word)
        except UsageError:
            models.append(word)
    if len(models) > 1:
        from localmix import library

        # the one that is there is the model, so the other is the type that does not exist
        wrong = next((word for word in models if not library.is_there(word)), models[1])
        presets.canonical(wrong)
        raise UsageError(f"Two models were named: {models[0]} and {models[1]}.", "Plan one at a time.")
    if set_name:
        names += presets.find_set(set_name)
    return (models[0] if models else None), list(dict.fromkeys(names))
