"""Phi 3, 3.5 and 4: queries, keys and values in one matrix, gate and up in another, as llama.cpp keeps them too.

Long contexts divide each rotary frequency by a number of its own, one list for texts up to the original context and
one for longer ones. The sliding window is written and, in llama.cpp, switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localmix.architectures.base import Architecture, Derived, Setting, Settings
from localmix.architectures.decoder import (
    EMBEDDING,
    HEAD,
    NORMS,
    count,
    decoder_dimensions,
    decoder_settings,
    linear,
    theta,
)
from localmix.architectures.rope import rope_block, rope_type
from localmix.errors import InputError
from localmix.sources.base import MetaValue, f32, u32
from localmix.sources.documents import shown

_NAME = "phi3"
_FACTORS = ("long_factor", "short_factor")


def _dimensions(settings: Settings) -> dict[str, int]:
    lengths = decoder_dimensions(settings)
    return {
        **lengths,
        "queries_keys_values": lengths["queries"] + 2 * lengths["keys"],
        "gate_up": 2 * lengths["feed_forward"],
    }


def _derive(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    """The rotary embedding.

    Raises:
        InputError: a scaling that llama.cpp does not have for this model, or lists of a wrong length.
    """
    block = {"rope_theta": config.get("rope_theta", 1e4), **rope_block(config, path)}
    base = theta(1e4).read(block, settings, path)
    share = _SHARE.read({**config, **block}, settings, path)
    assert base is not None and share is not None  # they have defaults
    rotated = int(share * settings["hidden_size"]) // int(settings["num_attention_heads"])
    metadata: dict[str, MetaValue] = {
        f"{_NAME}.rope.freq_base": f32(base),
        f"{_NAME}.rope.dimension_count": u32(rotated),
    }
    kind = rope_type(block)
    if kind == "default":
        return Derived(metadata, {})
    # "su" is what the first models called it
    if kind not in ("longrope", "su"):
        raise InputError(f"{path}: rope scaling of type {shown(kind)} is not known for this model.")
    original = int(settings["original_max_position_embeddings"])
    scale = settings["max_position_embeddings"] / original
    # How much sharper attention gets by the stretched positions, as transformers computes it.
    sharper = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    metadata[f"{_NAME}.rope.scaling.attn_factor"] = f32(sharper)
    tensors = {
        f"rope_factors_{name.removesuffix('_factor')}.weight": _factors(block, name, rotated // 2, path)
        for name in _FACTORS
    }
    return Derived(metadata, tensors)


_SHARE = Setting("partial_rotary_factor", float, 1e-3, 1, absent=1.0, null=1.0)


def _factors(block: Mapping[str, Any], name: str, length: int, path: Path) -> Any:
    """One list of factors as float32 values."""
    factors = block.get(name)
    if (
        not isinstance(factors, list)
        or len(factors) != length
        or any(type(factor) not in (int, float) or not 0 < factor < 1e9 for factor in factors)
    ):
        raise InputError(f"{path}: {name} is not a list of {length} positive numbers.", "Download config.json again.")
    return np.array(factors, np.float32)


PHI3 = Architecture(
    model_type="phi3",
    classes=("Phi3ForCausalLM",),
    name=_NAME,
    rows=decoder_settings(
        context=4096,
        epsilon=1e-5,
        vocabulary=32064,
        written_head=False,
        further=(
            count(
                "original_max_position_embeddings",
                "rope.scaling.original_context_length",
                most=2**31 - 1,
                absent=4096,
                null=4096,
            ),
            count("sliding_window", "attention.sliding_window", most=2**31 - 1, least=0, absent=0, null=0),
        ),
    ),
    rules=(
        EMBEDDING,
        NORMS[0],
        *linear("self_attn.qkv_proj", "attn_qkv", "queries_keys_values", "hidden", bias=None),
        *linear("self_attn.o_proj", "attn_output", "hidden", "queries", bias=None),
        NORMS[1],
        *linear("mlp.gate_up_proj", "ffn_up", "gate_up", "hidden", bias=None),
        *linear("mlp.down_proj", "ffn_down", "hidden", "feed_forward", bias=None),
        *HEAD,
    ),
    dimensions=_dimensions,
    derive=_derive,
    expects={"hidden_act": ("silu",)},
)
