"""`localmix plan --target`: which type each tensor would get, and what is expected of it beside the presets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmix.cli.console import WEIGHTS, Console
from localmix.cli.mixture_options import rated_document

if TYPE_CHECKING:
    from localmix.cli.mixture_options import MixtureWish
    from localmix.optimization.choice import Chosen, Rated
    from localmix.optimization.optimizer import Optimized
    from localmix.plan import Plan
    from localmix.sources.base import Source

# presets that are shown on either side of a mixture's size
_NEIGHBOURS = 2


def plan_mixtures(
    console: Console,
    source: Source,
    name: str,
    wish: MixtureWish,
    imatrix: Path | None,
    has_imatrix: bool,
    context: int | None,
    kv_type: str,
    markdown: bool,
) -> None:
    """Choose mixtures as `quantize --target` would, and show them.

    Args:
        source: the model.
        name: as the user knows it.
        imatrix: the importance matrix that `quantize` would use.
        has_imatrix: plan as if there were one.
        context, kv_type: with `--fit`.
    """
    from localmix.importance import load_importance
    from localmix.native.devices import default_threads
    from localmix.optimization.optimizer import optimize

    fitting = wish.fitting(source, context, kv_type) if wish.fit is not None else None
    targets = [*wish.targets, *([fitting.target] if fitting is not None else [])]
    importance = load_importance(imatrix) if imatrix is not None else None
    with console.progress(WEIGHTS) as progress:
        found = optimize(
            source,
            targets,
            wish.request,
            importance=importance,
            has_imatrix=has_imatrix,
            threads=default_threads(),
            progress=progress,
        )
    document = {
        "path": name,
        "parameters": source.parameters,
        "imatrix": imatrix,
        "sensitivities": found.sensitivities,
        "errors": found.errors,
        "fit": fitting,
        "targets": [_document(chosen) for chosen in found.mixtures],
        "presets": [rated_document(preset) for preset in found.presets],
        "notes": found.notes,
    }

    def draw() -> None:
        for number, chosen in enumerate(found.mixtures):
            if number:
                console.line()
            _draw(console, chosen, found, markdown)
        for note in found.notes:
            console.warn(note)
        if fitting is not None:
            console.note(fitting.describe())

    console.result(document, draw)


def _document(chosen: Chosen) -> dict[str, Any]:
    from localmix.optimization.recipe import describe_rules

    return {
        **(rated_document(chosen.rated) or {}),
        "best_preset": rated_document(chosen.best_preset),
        "recipe": describe_rules(chosen.preset.rules) if chosen.preset.recipe is not None else None,
        "tensors": [
            {"name": tensor.info.name, "shape": tensor.info.shape, "type": tensor.type, "bytes": tensor.bytes}
            for tensor in chosen.plan.tensors
        ],
    }


def _draw(console: Console, chosen: Chosen, found: Optimized, markdown: bool) -> None:
    from localmix.presentation.table import Column, Table, number
    from localmix.sizes import size_unit

    console.line(f"{chosen.target.name}: {chosen.plan.file_bytes:,} bytes")
    classes = (Column("Tensors", number=False), Column("Share"), Column("BPW"), Column("Types", number=False))
    caption = "Share: of the output's bytes. Layers are counted from 0."
    console.table(Table(classes, tuple(_classes(chosen.plan)), caption), markdown)
    console.line()
    rows = _neighbours(chosen, found.presets)
    unit, unit_name = size_unit(row.bytes for row in rows)
    timed = chosen.rated.seconds is not None
    columns = (
        Column("Type", number=False),
        Column(f"Size {unit_name}"),
        Column("BPW"),
        Column("Expected divergence"),
        *([Column("ms/token")] if timed else []),
    )
    caption = (
        "Expected divergence: from the original, in nats a token. Sensitivities:"
        f" {found.sensitivities}; relative errors: {found.errors}."
    )
    if timed:
        caption += " ms/token: generation on this machine, weights alone."
    cells = tuple(
        (
            row.name,
            f"{row.bytes / unit:.2f}",
            number(row.bits_per_weight, 2),
            f"{row.damage:.5f}",
            *([f"{(row.seconds or 0) * 1e3:.2f}"] if timed else []),
        )
        for row in rows
    )
    console.table(Table(columns, cells, caption), markdown)


def _neighbours(chosen: Chosen, presets: Sequence[Rated]) -> list[Rated]:
    """The mixture among the presets of its size, the largest first."""
    larger = [preset for preset in presets if preset.bytes > chosen.rated.bytes]
    smaller = [preset for preset in presets if preset.bytes <= chosen.rated.bytes]
    return [*larger[-_NEIGHBOURS:], chosen.rated, *smaller[:_NEIGHBOURS]]


def _classes(plan: Plan) -> list[tuple[str, str, str, str]]:
    """By class of matrices: its share of the bytes, its bits, and its types, with their layers where they differ."""
    from localmix.optimization.sensitivities import tensor_class, tensor_layer
    from localmix.tensor_types import TensorType

    found: dict[str, list[tuple[int | None, TensorType, int, int]]] = {}
    for tensor in plan.tensors:
        if len(tensor.info.shape) > 1:
            entry = tensor_layer(tensor.info.name), tensor.type, tensor.bytes, tensor.info.elements
            found.setdefault(tensor_class(tensor.info.name), []).append(entry)
    rows = []
    for name, entries in found.items():
        layers: dict[TensorType, list[int]] = {}
        for layer, kind, _, _ in entries:
            layers.setdefault(kind, []).append(-1 if layer is None else layer)
        size = sum(entry[2] for entry in entries)
        told = [
            kind.name if len(layers) == 1 else f"{kind.name} {_ranges(numbers)}" for kind, numbers in layers.items()
        ]
        bits = size * 8 / sum(entry[3] for entry in entries)
        rows.append((name, f"{100 * size / plan.weight_bytes:.1f} %", f"{bits:.2f}", ", ".join(told)))
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3 7 30-31`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
