"""Sensitivities: how much a model's predictions suffer when tensors of a class lose precision.

    sensitivities = read_sensitivities(Path("mixtral.sensitivities.json"))
    damage = sensitivities.damage("blk.3.ffn_down_exps.weight", relative_error)

The damage is the expected divergence from the original, in nats a token; it grows a little faster than the relative
error does, by an exponent of each class. `localmix sensitivity` measures a model's own
(`optimization.probing`) and writes them as JSON, to share like an importance matrix; `shipped_priors` has what our own
models say of others.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from localmix.errors import FileError, InputError
from localmix.output import write_atomically
from localmix.presets import Curve, Priors, load_presets
from localmix.tensor_types import TensorType

KIND, FORMAT = "localmix sensitivities", 1
# one of 200 layers and all classes, layer by layer, takes 400 KB
MAX_BYTES = 1 << 24
_MOST, _STEEPEST = 1e6, 10.0  # far more than any value, and any exponent, is

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_MEASURE = "Measure it again with `localmix sensitivity`."

# Classes that do the work of others: fused, shared, or of another attention. The mean of the known ones stands in.
_RELATIVES: Mapping[str, tuple[str, ...]] = {
    "output": ("token_embd",),
    "token_embd": ("output",),
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_gate": ("attn_output",),
    "attn_q_a": ("attn_q",),
    "attn_q_b": ("attn_q",),
    "attn_kv_a_mqa": ("attn_k", "attn_v"),
    "attn_kv_b": ("attn_k", "attn_v"),
    "attn_k_b": ("attn_k",),
    "attn_v_b": ("attn_v",),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
}
# What tells experts, shared experts and the like from the plain class.
_EXPERTS = re.compile(r"_(?:exps|shexp|chexps)$")


def tensor_class(name: str) -> str:
    """The class of a tensor: its name without the layer and the suffix, `attn_q`, `ffn_down_exps`, `token_embd`."""
    match = _BLOCK.fullmatch(name)
    return (match[2] if match else name).removesuffix(".weight")


def tensor_layer(name: str) -> int | None:
    """The layer of a tensor; None for one outside of them."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Sensitivities:
    """What is known of a model's classes of tensors.

    Attributes:
        by_class: the damage that a relative error of one tensor of the class does.
        by_layer: the same of a class in one layer, where it was measured so; it goes before the class.
        origin: where they come from, for people.
    """

    by_class: Mapping[str, Curve]
    by_layer: Mapping[tuple[str, int], Curve] = field(default_factory=dict)
    origin: str = ""

    def damage(self, tensor_name: str, relative_error: float) -> float:
        """Nats of divergence that a relative error of a tensor does."""
        curve = self.of(tensor_name)
        return float(curve.nats * relative_error**curve.exponent)

    def of(self, tensor_name: str) -> Curve:
        """The damage of a tensor at any relative error.

        Of a class that was not measured: the mean of those that do its work, or else of all.
        """
        kind, layer = tensor_class(tensor_name), tensor_layer(tensor_name)
        if layer is not None and (kind, layer) in self.by_layer:
            return self.by_layer[kind, layer]
        if kind in self.by_class:
            return self.by_class[kind]
        return _stand_in(kind, self.by_class)

    def unknown(self, tensor_names: Iterable[str]) -> list[str]:
        """The classes among these tensors for which others stand in."""
        return sorted({tensor_class(name) for name in tensor_names} - set(self.by_class))


def _stand_in(kind: str, known: Mapping[str, Curve]) -> Curve:
    """The curve of a class that is not known, from those that are."""
    plain = _plain(kind)
    wanted = (*_RELATIVES.get(plain, ()), plain)
    found = [curve for name, curve in known.items() if _plain(name) in wanted]
    return _mean(found or list(known.values()))


def _plain(kind: str) -> str:
    """The class that does the same work without experts: `ffn_down` of `ffn_down_exps`."""
    return _EXPERTS.sub("", kind)


def _mean(curves: Sequence[Curve]) -> Curve:
    """The curve whose damage is everywhere the geometric mean of theirs."""
    nats = math.exp(fmean(math.log(curve.nats) for curve in curves))
    return Curve(nats, fmean(curve.exponent for curve in curves))


@dataclass(frozen=True)
class Value:
    """A measured sensitivity.

    Attributes:
        nats: the damage of one tensor at a relative error is nats x error ** exponent.
        exponent: see `nats`.
        error: standard error of `nats`, in parts of it.
        tensors: how many were probed together.
        divergence: of the perturbed model, in nats a token, with what rounding makes.
        relative_error: mean over the tensors of what the probe took from them.
    """

    nats: float
    exponent: float
    error: float
    tensors: int
    divergence: float
    relative_error: float

    @property
    def curve(self) -> Curve:
        """The damage at any relative error."""
        return Curve(self.nats, self.exponent)


@dataclass(frozen=True)
class Measured:
    """A model's own sensitivities, and how they were measured.

    Attributes:
        model: name of the file.
        architecture, layers, parameters: of the model.
        base: type that most of its weights have in that file.
        corpus: name of the text, with its SHA-256 in `corpus_sha256`.
        context, chunks: tokens of a chunk, and how many.
        engine: name and commit of what computed it.
        imatrix: whether errors were weighted with an importance matrix.
        probes: the types that tensors got, one after the other.
        rounding: divergence that any change makes, because what goes into the weights behind it is rounded otherwise;
            it was taken from what the probes gave.
        classes: by class.
        by_layer: by class and layer; may be empty.
    """

    model: str
    architecture: str
    layers: int
    parameters: int
    base: str
    corpus: str
    corpus_sha256: str
    context: int
    chunks: int
    engine: str
    imatrix: bool
    probes: str
    rounding: float
    classes: Mapping[str, Value]
    by_layer: Mapping[tuple[str, int], Value] = field(default_factory=dict)

    def sensitivities(self) -> Sensitivities:
        """What the optimizer needs of them."""
        return Sensitivities(
            {kind: found.curve for kind, found in self.classes.items()},
            {place: found.curve for place, found in self.by_layer.items()},
            f"measured on {self.model} with {self.chunks} chunks of {self.corpus}"
            + ("" if self.imatrix else ", without an importance matrix"),
        )


def write_sensitivities(path: Path, measured: Measured) -> None:
    """Write a file, which appears whole or not at all.

    Raises:
        FileError, CapacityError: it cannot be written.
    """
    write_atomically(path, encode(measured))


def encode(measured: Measured) -> bytes:
    """The bytes of a file."""
    document: dict[str, Any] = {"kind": KIND, "format": FORMAT}
    for name in _FIELDS:
        document[name] = getattr(measured, name)
    document["classes"] = {kind: asdict(value) for kind, value in measured.classes.items()}
    layers: dict[str, dict[str, Any]] = {}
    for (kind, layer), value in measured.by_layer.items():
        layers.setdefault(kind, {})[str(layer)] = asdict(value)
    document["by_layer"] = layers
    return (json.dumps(document, indent=1) + "\n").encode()


_FIELDS: Mapping[str, type] = {
    "model": str,
    "architecture": str,
    "layers": int,
    "parameters": int,
    "base": str,
    "corpus": str,
    "corpus_sha256": str,
    "context": int,
    "chunks": int,
    "engine": str,
    "imatrix": bool,
    "probes": str,
    "rounding": float,
}


def read_sensitivities(path: Path, architecture: str = "", layers: int = 0) -> Sensitivities:
    """The sensitivities of a file of `localmix sensitivity`.

    Args:
        architecture, layers: of the model they are wanted for; empty and 0 not to compare.

    Raises:
        FileError: it cannot be read.
        InputError: it is no such file, or of another model.
    """
    measured = read_measured(path)
    wanted = (architecture or measured.architecture, layers or measured.layers)
    if wanted != (measured.architecture, measured.layers):
        raise InputError(
            f"{path} has the sensitivities of another model: {measured.model}, {measured.architecture} of"
            f" {measured.layers} layers, and this one is {wanted[0]} of {wanted[1]}.",
            "Measure this one with `localmix sensitivity`, or leave the file out for the priors that are shipped.",
        )
    return measured.sensitivities()


def read_measured(path: Path) -> Measured:
    """A file of `localmix sensitivity`, with how it was measured.

    Raises:
        FileError: it cannot be read.
        InputError: it is no such file.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _broken(path, "it is far too large for one")
        text = path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise _broken(path, "it is no text") from None
    try:
        document = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise _broken(path, "it is no JSON") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise _broken(path, f"it does not say that it is of the kind '{KIND}'")
    if document.get("format") != FORMAT:
        raise _broken(path, f"its format is {str(document.get('format'))[:20]}, and this localmix reads {FORMAT}")
    fields: dict[str, Any] = {}
    for name, kind in _FIELDS.items():
        fields[name] = document.get(name)
        if type(fields[name]) is not kind:
            raise _broken(path, f"its field {name} is missing or of another kind")
    classes = {kind: _value(path, kind, value) for kind, value in _mapping(path, document, "classes").items()}
    if not classes:
        raise _broken(path, "it has no classes")
    by_layer = {
        (kind, _number(path, layer)): _value(path, f"{kind} of layer {layer}", value)
        for kind, found in _mapping(path, document, "by_layer").items()
        for layer, value in _mapping(path, {kind: found}, kind).items()
    }
    return Measured(**fields, classes=classes, by_layer=by_layer)


def _refuse(name: str) -> float:
    raise ValueError(name)


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is no file of sensitivities: {reason}.", _MEASURE)


def _mapping(path: Path, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    if not isinstance(found, dict):
        raise _broken(path, f"its field {name} is missing or of another kind")
    return found


def _number(path: Path, layer: str) -> int:
    if not re.fullmatch(r"\d{1,5}", layer):
        raise _broken(path, f"{layer[:20]!r} is no layer")
    return int(layer)


def _value(path: Path, where: str, value: Any) -> Value:
    names = ("nats", "exponent", "error", "divergence", "relative_error")
    if not isinstance(value, dict) or set(value) != {*names, "tensors"} or type(value["tensors"]) is not int:
        raise _broken(path, f"{where} lacks a field, or has one too many")
    numbers = [value[name] for name in names]
    # NaN is not below the bound either
    if not all(type(number) in (int, float) and abs(number) < _MOST for number in numbers) or min(numbers[:2]) <= 0:
        raise _broken(path, f"{where} holds a value that is no positive number below {_MOST:,.0f}")
    if value["exponent"] > _STEEPEST:
        raise _broken(path, f"{where} holds an exponent above {_STEEPEST:g}")
    return Value(**value)


def shipped_priors(tensor_names: Iterable[str], *, without: str = "", priors: Priors | None = None) -> Sensitivities:
    """What our own models say of one that was not measured.

    Classes that do the same work, with experts or without, are taken for one, so that every mean is over the same
    models: they differ too much for a class of some to be set against a class of others. The sensitivity is kept for
    all tensors that do a work together, and shared out among those of the model: what each of many layers loses weighs
    less than what each of few does.

    Args:
        tensor_names: of the model.
        without: leave this one of our models out, to judge the priors on it.
        priors: instead of those of quant_presets.yaml.
    """
    found = priors or _shipped()
    models = {name: classes for name, classes in found.models.items() if name != without}
    curves: dict[str, list[Curve]] = {}
    for classes in models.values():
        for kind, curve in classes.items():
            curves.setdefault(_plain(kind), []).append(curve)
    together = {plain: _mean(those) for plain, those in curves.items()}
    kinds = [tensor_class(name) for name in tensor_names]
    counts = Counter(_plain(kind) for kind in kinds)
    by_class: dict[str, Curve] = {}
    for kind in dict.fromkeys(kinds):
        plain = _plain(kind)
        curve = together[plain] if plain in together else _stand_in(plain, together)
        by_class[kind] = Curve(curve.nats / counts[plain], curve.exponent)
    return Sensitivities(by_class, origin=f"priors, measured on {', '.join(models)}")


def prior_errors() -> Mapping[TensorType, float]:
    """The relative error of each type in a typical matrix with an importance matrix, where no weights are at hand."""
    return MappingProxyType(_shipped().errors)


def _shipped() -> Priors:
    found = load_presets().priors
    assert found is not None, "quant_presets.yaml has no priors"
    return found
