r"""Recipe: the type of every tensor as a few rules that a person can read, and as a preset in a file.

A rule is `^blk\.\d+\.attn_v\.weight$` for a class whose layers share a type; layers with another one come first, as
`^blk\.(0|1|31)\.attn_v\.weight$`. `llama-quantize --tensor-type` understands the same rules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from localmix.output import write_atomically
from localmix.presets import Preset, Rule
from localmix.tensor_types import TensorType

_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<rest>.+)")


def fold_rules(types: Mapping[str, TensorType]) -> tuple[Rule, ...]:
    """Rules that give each tensor its type, the first match deciding; they say nothing about other classes.

    Args:
        types: by the tensors' names.
    """
    alone: list[Rule] = []
    classes: dict[str, dict[int, TensorType]] = {}
    for name, kind in types.items():
        if match := _LAYER.fullmatch(name):
            classes.setdefault(match["rest"], {})[int(match["layer"])] = kind
        else:
            alone.append(Rule(f"^{_literal(name)}$", kind))
    folded: list[Rule] = []
    for rest, kinds in classes.items():
        counts = Counter(kinds.values())
        # the most frequent one last, for all layers that are left
        common = max(counts, key=lambda kind: (counts[kind], kind))
        for kind in sorted(counts.keys() - {common}):
            layers = [str(layer) for layer in sorted(kinds) if kinds[layer] == kind]
            listed = layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
            folded.append(Rule(rf"^blk\.{listed}\.{_literal(rest)}$", kind))
        folded.append(Rule(rf"^blk\.\d+\.{_literal(rest)}$", common))
    return (*alone, *folded)


def _literal(name: str) -> str:
    """A tensor's name, or the end of one, as a pattern: letters, digits, underscores and dots."""
    return name.replace(".", r"\.")


def describe_rules(rules: Iterable[Rule]) -> str:
    """Rules in a line, as `llama-quantize --tensor-type` takes each."""
    return " ".join(f"{rule.tensor}={rule.type.name}" for rule in rules)


def encode_recipes(presets: Sequence[Preset]) -> str:
    """Presets that were chosen for a model, general ones among them, as a file that `--presets` reads."""
    lines = [
        "# Chosen by localmix for one model: `localmix quantize NAME MODEL --presets FILE` makes the same bytes again",
        "# from the same weights and importance matrix.",
        "",
        "presets:",
    ]
    for preset in presets:
        lines += [
            f"  {_quoted(preset.name)}:",
            f"    base: {preset.base}",
            f"    imatrix: {preset.imatrix}",
            f"    advice: {_quoted(preset.advice)}",
        ]
        if preset.recipe is not None:
            lines.append(
                f"    recipe: {{target: {_quoted(preset.recipe.target)}, tensors: {preset.recipe.tensors},"
                f" sensitivities: {_quoted(preset.recipe.sensitivities)}}}"
            )
        lines += [
            f"    {field}: {kind.name}"
            for field, kind in (("output", preset.output), ("embedding", preset.embedding))
            if kind is not None
        ]
        if preset.rules:
            lines.append("    rules:")
        lines += [f"      - {{tensor: {_quoted(rule.tensor)}, type: {rule.type.name}}}" for rule in preset.rules]
    return "\n".join(lines) + "\n"


def write_recipes(path: Path, presets: Sequence[Preset]) -> None:
    """Write a file of recipes, whole or not at all.

    Raises:
        FileError, CapacityError: the file system refuses.
    """
    write_atomically(path, encode_recipes(presets).encode("utf-8"))


def _quoted(text: str) -> str:
    """A YAML string in single quotes, in which nothing has a meaning but the quote; YAML has no control characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return "'" + " ".join(printable.split()).replace("'", "''") + "'"
