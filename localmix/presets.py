"""quant_presets.yaml: which quantization types there are, what each is good for, and named sets of them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localmix.errors import FileError, InputError, UsageError
from localmix.tensor_types import ENCODABLE, TensorType

IMATRIX_NEEDS = ("required", "recommended", "optional", "unused")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches the regular expression get this type."""

    tensor: str
    type: TensorType


@dataclass(frozen=True)
class Recipe:
    """What tells a preset that was chosen for one model from a general one.

    Attributes:
        target: the size it was chosen for, such as `12.0GiB`.
        sensitivities: where the sensitivities of the tensors came from.
        tensors: how many tensors its rules give a type; for a model with another number it is not meant.
    """

    target: str
    sensitivities: str
    tensors: int


@dataclass(frozen=True)
class Preset:
    """One way to give every tensor a type; see the head of quant_presets.yaml for the fields."""

    name: str
    base: str
    imatrix: str = "optional"
    advice: str = ""
    rules: tuple[Rule, ...] = ()
    output: TensorType | None = None
    embedding: TensorType | None = None
    pure: bool = False
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Curve:
    """Damage of a class of tensors at a relative error: nats x error ** exponent."""

    nats: float
    exponent: float


@dataclass(frozen=True)
class Priors:
    """What models of ours say about one that nobody measured; see the head of the section in quant_presets.yaml.

    Attributes:
        models: by model and class of tensors, the divergence when all its tensors have a relative error.
        errors: relative error of each type in a typical matrix.
    """

    models: Mapping[str, Mapping[str, Curve]]
    errors: Mapping[TensorType, float]


@dataclass(frozen=True)
class Presets:
    """All presets by name, short names for some, and named sets.

    Attributes:
        priors: None in a file that has none.
    """

    presets: Mapping[str, Preset]
    aliases: Mapping[str, str]
    sets: Mapping[str, tuple[str, ...]]
    priors: Priors | None = None

    def canonical(self, name: str) -> str:
        """The preset's own name: `q4_k` is `Q4_K_M`.

        Raises:
            UsageError: no preset is called so; the nearest names are in the hint.
        """
        known = {preset.upper(): preset for preset in self.presets}
        known |= {alias.upper(): preset for alias, preset in self.aliases.items()}
        found = known.get(name.upper())
        if found is None:
            near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.4)
            hint = f"Did you mean {', '.join(near)}?" if near else f"Known types: {', '.join(self.presets)}."
            raise UsageError(f"There is no quantization type {name!r}.", hint)
        return found

    def find(self, name: str) -> Preset:
        """A preset by its name, a short name, in any case.

        Raises:
            UsageError: as `canonical`.
        """
        return self.presets[self.canonical(name)]

    def find_set(self, name: str) -> tuple[str, ...]:
        """The presets' names of a named set.

        Raises:
            UsageError: there is no such set.
        """
        if name not in self.sets:
            raise UsageError(f"There is no set of types {name!r}.", f"Known sets: {', '.join(self.sets)}.")
        return self.sets[name]


def tensor_type(name: str) -> TensorType:
    """A tensor's type by name, in any case.

    Raises:
        UsageError: ggml has no such type, or cannot write it.
    """
    by_name = {kind.name.upper(): kind for kind in TensorType if kind in ENCODABLE}
    if name.upper() not in by_name:
        near = difflib.get_close_matches(name.upper(), by_name, n=3, cutoff=0.4)
        raise UsageError(f"There is no tensor type {name!r}.", f"Did you mean {' or '.join(near)}?" if near else "")
    return by_name[name.upper()]


def shipped_path() -> Path:
    """quant_presets.yaml as installed with the package, or at the root of a checkout."""
    inside = Path(__file__).with_name("quant_presets.yaml")
    return inside if inside.exists() else Path(__file__).parent.parent / "quant_presets.yaml"


@functools.cache
def load_presets(path: Path | None = None) -> Presets:
    """Read presets; without a path those that came with localmix.

    Raises:
        FileError: the file cannot be read.
        InputError: the file is broken; the sentence says which entry and why.
    """
    path = path or shipped_path()
    try:
        content = yaml.load(path.read_text("utf-8"), _LocatedLoader)  # a SafeLoader
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be a file of presets.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    reader = _Reader(path)
    top = reader.mapping(content, "the file", ("presets", "aliases", "sets", "priors"))
    presets = {name: reader.preset(name, fields) for name, fields in reader.entries(top, "presets")}
    aliases = {
        alias: reader.known(str(name), presets, f"the alias {alias}") for alias, name in reader.entries(top, "aliases")
    }
    sets = {
        key: tuple(
            reader.known(str(name), presets, f"the set {key}") for name in reader.sequence(names, f"the set {key}")
        )
        for key, names in reader.entries(top, "sets")
    }
    return Presets(presets, aliases, sets, reader.priors(top["priors"]) if "priors" in top else None)


class _Located(dict[Any, Any]):
    """A mapping that knows the line of each of its keys."""

    lines: Mapping[Any, int]


class _LocatedLoader(yaml.SafeLoader):
    """A SafeLoader whose mappings are `_Located`."""


def _construct_located(loader: _LocatedLoader, node: yaml.MappingNode) -> _Located:
    mapping = _Located(loader.construct_mapping(node, deep=True))
    if len(mapping) < len(node.value):
        raise yaml.constructor.ConstructorError(None, None, "found a key twice", node.start_mark)
    mapping.lines = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}
    return mapping


_LocatedLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_located)


class _Reader:
    """Turns parsed YAML into presets, naming the line and the entry that is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = 1  # of the entry being read

    def error(self, where: str, reason: str) -> InputError:
        return InputError(
            f"{self._path}, line {self._line}: {where} {reason}.", "The head of quant_presets.yaml lists the fields."
        )

    def entries(self, top: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any]]:
        """Names and values of a section, which may be missing."""
        found = self.mapping(top.get(section), section)
        for name, value in found.items():
            self._line = found.lines[name] if isinstance(found, _Located) else self._line
            yield str(name), value

    def known(self, name: str, presets: Mapping[str, Preset], where: str) -> str:
        if name not in presets:
            raise self.error(where, f"names {name}, which is no preset of this file")
        return name

    def mapping(self, value: Any, where: str, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(where, "is not a mapping")
        for key in value:
            if keys is not None and key not in keys:
                self._line = value.lines[key] if isinstance(value, _Located) else self._line
                raise self.error(where, f"has the unknown field '{key}'")
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list):
            raise self.error(where, "is not a list")
        return value

    def type(self, value: Any, where: str) -> TensorType:
        try:
            return tensor_type(str(value))
        except UsageError as error:
            raise self.error(where, f"names {value}, which is no tensor type") from error

    def flag(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            raise self.error(where, f"says pure: {value}; true or false is meant")
        return value

    def preset(self, name: str, value: Any) -> Preset:
        where = f"the preset {name}"
        names = ("base", "rules", "output", "embedding", "imatrix", "advice", "pure", "recipe")
        fields = self.mapping(value, where, names)
        imatrix = fields.get("imatrix", "optional")
        if imatrix not in IMATRIX_NEEDS:
            raise self.error(where, f"says imatrix: {imatrix}; one of {', '.join(IMATRIX_NEEDS)} is meant")
        rules = []
        for rule in self.sequence([] if fields.get("rules") is None else fields["rules"], where):
            entry = self.mapping(rule, f"a rule of {where}", ("tensor", "type"))
            if set(entry) != {"tensor", "type"}:
                raise self.error(f"a rule of {where}", "needs the fields tensor and type")
            rules.append(Rule(str(entry["tensor"]), self.type(entry["type"], where)))
        return Preset(
            name,
            str(fields.get("base", name)),
            imatrix,
            str(fields.get("advice", "")),
            tuple(rules),
            self.type(fields["output"], where) if "output" in fields else None,
            self.type(fields["embedding"], where) if "embedding" in fields else None,
            self.flag(fields.get("pure", False), where),
            self.recipe(fields["recipe"], where) if "recipe" in fields else None,
        )

    def recipe(self, value: Any, where: str) -> Recipe:
        names = ("target", "sensitivities", "tensors")
        fields = self.mapping(value, f"the recipe of {where}", names)
        tensors = fields.get("tensors")
        if set(fields) != set(names) or type(tensors) is not int or tensors < 1:
            raise self.error(f"the recipe of {where}", f"needs the fields {', '.join(names)}, the last one a number")
        return Recipe(str(fields["target"]), str(fields["sensitivities"]), tensors)

    def priors(self, value: Any) -> Priors:
        fields = self.mapping(value, "priors", ("models", "errors"))
        models = {
            name: {kind: self.curve(pair, f"{kind} of {name}") for kind, pair in classes.items()}
            for name, found in self.entries(fields, "models")
            if (classes := self.mapping(found, f"the priors of {name}"))
        }
        errors = {
            self.type(name, "the relative errors"): self.positive(number, f"the relative error of {name}")
            for name, number in self.entries(fields, "errors")
        }
        if not models or not errors:
            raise self.error("priors", "needs models and errors")
        return Priors(models, errors)

    def curve(self, value: Any, where: str) -> Curve:
        pair = self.sequence(value, where)
        if len(pair) != 2:
            raise self.error(where, "needs two numbers: nats and an exponent")
        return Curve(self.positive(pair[0], where), self.positive(pair[1], where))

    def positive(self, value: Any, where: str) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e6:  # far more than any is, and no NaN
            raise self.error(where, f"is {str(value)[:40]!r}, not a positive number")
        return float(value)
