"""Rotary position embedding: config.json's scaling block → GGUF keys and, for Llama 3, a tensor.

transformers 5 writes one block `rope_parameters`; before, `rope_theta` stood alone and `rope_scaling` held
the rest. Both are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.architectures.base import Derived, Number, Setting, Settings, head_size
from localmix.errors import InputError
from localmix.sources.base import MetaValue, f32, text, u32
from localmix.sources.documents import shown

FREQUENCY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Scaling:
    """One `rope_type`.

    Attributes:
        gguf: its name in the GGUF file; empty: none is written.
        settings: the numbers it needs.
        rising: of these two numbers the first must be the smaller one.
        factors: computes what each frequency is divided by, from the numbers and the size of a head.
        note: what the user should know.
    """

    gguf: str = ""
    settings: tuple[Setting, ...] = ()
    rising: tuple[str, str] | None = None
    factors: Callable[[Settings, int], npt.NDArray[np.float32]] | None = None
    note: str = ""


def _llama3_factors(settings: Settings, width: int) -> npt.NDArray[np.float32]:
    """What each rotary frequency is divided by, `[width / 2]`, as Llama 3.1 defines it.

    Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    Computed in float32 like the reference: https://github.com/meta-llama/llama-models (apply_scaling).
    """
    one = np.float32(1)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = one / np.power(np.float32(settings["rope_theta"]), exponents, dtype=np.float32)
    wavelengths = np.float32(2 * math.pi) / frequencies
    factor = np.float32(settings["factor"])
    low, high = np.float32(settings["low_freq_factor"]), np.float32(settings["high_freq_factor"])
    context = np.float32(settings["original_max_position_embeddings"])
    smooth = (context / wavelengths - low) / (high - low)
    with np.errstate(divide="ignore"):  # only where `between` is not used
        between = one / ((one - smooth) / factor + smooth)
    stretched = np.where(wavelengths > context / low, factor, between)
    factors: npt.NDArray[np.float32] = np.where(wavelengths < context / high, one, stretched)
    return factors.astype(np.float32)


def _number(name: str, **more: Any) -> Setting:
    """A positive number of the scaling block, written as F32 where keys are given."""
    return Setting(name, float, 1e-9, 1e9, write=f32, **more)


def _optional(name: str, key: str) -> Setting:
    return _number(name, absent=None, null=None, keys=("{arch}.rope.scaling." + key,))


_FACTOR = _number("factor", keys=("{arch}.rope.scaling.factor",))
_TRAINED_CONTEXT = "original_max_position_embeddings"

SCALINGS: Mapping[str, Scaling] = {
    "default": Scaling(),
    "linear": Scaling("linear", (_FACTOR,)),
    "yarn": Scaling(
        "yarn",
        (
            _FACTOR,
            Setting(_TRAINED_CONTEXT, int, keys=("{arch}.rope.scaling.original_context_length",), write=u32),
            _optional("extrapolation_factor", "yarn_ext_factor"),
            _optional("attention_factor", "yarn_attn_factor"),
            _optional("beta_fast", "yarn_beta_fast"),
            _optional("beta_slow", "yarn_beta_slow"),
        ),
    ),
    "llama3": Scaling(
        settings=(
            _number("factor", absent=8.0),
            _number("low_freq_factor", absent=1.0),
            _number("high_freq_factor", absent=4.0),
            Setting(_TRAINED_CONTEXT, int),
        ),
        rising=("low_freq_factor", "high_freq_factor"),
        factors=_llama3_factors,
    ),
    "dynamic": Scaling(note="dynamic rope scaling is left out: llama.cpp has no such type for this model"),
}


def rope_block(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The block of a config.json that says how positions are rotated; empty where there is none.

    Raises:
        InputError: it is no object.
    """
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(block, dict):
        raise InputError(f"{path}: the rope settings are {shown(block)}, not an object.")
    return block


def rope_type(block: Mapping[str, Any]) -> Any:
    """What a block calls its kind of scaling, unchecked."""
    return block.get("rope_type", block.get("type", "default"))


def derive_rope(
    architecture: str,
    theta: Setting,
    config: Mapping[str, Any],
    settings: Settings,
    path: Path,
    *,
    dimensions: bool = True,
) -> Derived:
    """The rotary embedding's keys, tensor and notes.

    Args:
        architecture: llama.cpp's name, the prefix of the keys.
        theta: where the base frequency is found and what it is by default.
        dimensions: write how many dimensions of a head are rotated; else llama.cpp rotates them all.

    Raises:
        InputError: a block that is no object, a type nobody here knows, or impossible numbers.
    """
    # The context the model was trained for counts as its original one unless the block says otherwise.
    fallbacks = {_TRAINED_CONTEXT: config.get(_TRAINED_CONTEXT, settings["max_position_embeddings"])}
    block = {**fallbacks, theta.name: config.get(theta.name, theta.absent), **rope_block(config, path)}
    kind = rope_type(block)
    scaling = SCALINGS.get(kind) if isinstance(kind, str) else None
    if scaling is None:
        raise InputError(
            f"{path}: rope scaling of type {shown(kind)} is not known.",
            f"Known are {', '.join(SCALINGS)}.",
        )
    width = head_size(settings)
    metadata: dict[str, MetaValue] = {}
    if dimensions:
        metadata[f"{architecture}.rope.dimension_count"] = u32(width)
    if scaling.gguf:
        metadata[f"{architecture}.rope.scaling.type"] = text(scaling.gguf)
    found: dict[str, Number] = {}
    for row in (theta, *scaling.settings):
        value = row.read(block, found, path)
        if value is not None:
            found[row.name] = value
    if scaling.rising and found[scaling.rising[0]] >= found[scaling.rising[1]]:
        raise InputError(f"{path}: {scaling.rising[0]} must be smaller than {scaling.rising[1]}.")
    for row in (theta, *scaling.settings):
        if row.write is not None and row.name in found:
            metadata |= {key.replace("{arch}", architecture): row.write(found[row.name]) for key in row.keys}
    tensors = {FREQUENCY_FACTORS: scaling.factors(found, width)} if scaling.factors else {}
    return Derived(metadata, tensors, (scaling.note,) if scaling.note else ())
