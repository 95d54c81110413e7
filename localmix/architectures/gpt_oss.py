"""gpt-oss: a mixture whose experts are published in MXFP4; they are widened, and `quantize MXFP4_MOE` packs them again.

Gate and up lie in one tensor, their rows in turns. A checkpoint that was widened before has them transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.architectures.base import Architecture, Derived, Presence, Rearrange, Setting, Settings, TensorRule
from localmix.architectures.decoder import (
    BLOCK,
    EMBEDDING,
    HEAD,
    LAYER,
    attention,
    check_windows,
    count,
    decoder_dimensions,
    decoder_settings,
    expert_settings,
    norm,
    theta,
)
from localmix.architectures.rope import derive_rope
from localmix.sources.base import u32

_NAME = "gpt-oss"


def _transposed(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks.swapaxes(1, 2))


def _gate_transposed(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks.swapaxes(1, 2)[:, ::2])


def _up_transposed(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks.swapaxes(1, 2)[:, 1::2])


def _gate_columns(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return blocks[:, :, ::2]


def _up_columns(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return blocks[:, :, 1::2]


def _is_packed(settings: Settings, layer: int | None) -> bool:
    return bool(settings["packed"])


def _is_wide(settings: Settings, layer: int | None) -> bool:
    return not settings["packed"]


def _experts(
    source: str, target: str, shape: tuple[str, ...], stored: tuple[str, ...], rearrange: Rearrange | None, **more: Any
) -> TensorRule:
    return TensorRule(
        f"{LAYER}mlp.experts.{source}",
        f"{BLOCK}{target}",
        ("experts", *shape),
        stored=("experts", *stored),
        blocks="experts" if rearrange else "",
        rearrange=rearrange,
        **more,
    )


_INNER, _OUTER = ("feed_forward", "hidden"), ("hidden", "feed_forward")
_BOTH = ("gate_up", "hidden")

_EXPERTS = (
    _experts("gate_up_proj_blocks", "ffn_gate_exps.weight", _INNER, _BOTH, None, turn=(0, 2), applies=_is_packed),
    _experts("gate_up_proj_blocks", "ffn_up_exps.weight", _INNER, _BOTH, None, turn=(1, 2), applies=_is_packed),
    _experts("down_proj_blocks", "ffn_down_exps.weight", _OUTER, _OUTER, None, applies=_is_packed),
    _experts("gate_up_proj", "ffn_gate_exps.weight", _INNER, ("hidden", "gate_up"), _gate_transposed, applies=_is_wide),
    _experts("gate_up_proj", "ffn_up_exps.weight", _INNER, ("hidden", "gate_up"), _up_transposed, applies=_is_wide),
    _experts("down_proj", "ffn_down_exps.weight", _OUTER, _INNER, _transposed, applies=_is_wide),
    _experts("gate_up_proj_bias", "ffn_gate_exps.bias", _INNER[:1], ("gate_up",), _gate_columns, float32=True),
    _experts("gate_up_proj_bias", "ffn_up_exps.bias", _INNER[:1], ("gate_up",), _up_columns, float32=True),
    _experts("down_proj_bias", "ffn_down_exps.bias", _OUTER[:1], _OUTER[:1], None, float32=True),
)


def _dimensions(settings: Settings) -> dict[str, int]:
    return {
        **decoder_dimensions(settings),
        "heads": int(settings["num_attention_heads"]),
        "gate_up": 2 * int(settings["intermediate_size"]),
    }


def _derive(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    check_windows(config, settings, path, every=2)
    derived = derive_rope(_NAME, theta(150000.0), config, settings, path, dimensions=False)
    width = {f"{_NAME}.expert_feed_forward_length": u32(int(settings["intermediate_size"]))}
    return replace(derived, metadata={**derived.metadata, **width})


GPT_OSS = Architecture(
    model_type="gpt_oss",
    classes=("GptOssForCausalLM",),
    name=_NAME,
    rows=decoder_settings(
        kv_heads=8,
        context=131072,
        epsilon=1e-5,
        head=64,
        vocabulary=201088,
        further=(
            *expert_settings(experts=128, used=4),
            count("sliding_window", "attention.sliding_window", absent=128),
            Setting("packed", bool, absent=False),
        ),
    ),
    rules=(
        EMBEDDING,
        norm("input_layernorm", "attn_norm"),
        *attention(interleaved=False, bias=Presence.ALWAYS, output_bias=Presence.ALWAYS),
        TensorRule(f"{LAYER}self_attn.sinks", f"{BLOCK}attn_sinks.weight", ("heads",)),
        norm("post_attention_layernorm", "post_attention_norm"),
        TensorRule(f"{LAYER}mlp.router.weight", f"{BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), float32=True),
        TensorRule(f"{LAYER}mlp.router.bias", f"{BLOCK}ffn_gate_inp.bias", ("experts",)),
        *_EXPERTS,
        *HEAD,
    ),
    dimensions=_dimensions,
    derive=_derive,
    expects={"hidden_act": ("silu",), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,), "attention_bias": (True,)},
    packed="mxfp4",
)
