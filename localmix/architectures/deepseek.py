"""DeepSeek: the first mixture (`deepseek`), and V2 Lite with its compressed keys and values (`deepseek_v2`).

V2 keeps one short vector for all keys and values of a token. llama.cpp works on it directly, so the matrix that
unfolds it is divided: the part for keys, transposed, and the part for values, each head for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import ExpertGatingFuncType

from localmix.architectures.base import (
    Applies,
    Architecture,
    Derived,
    Rearrange,
    Setting,
    Settings,
    TensorRule,
    check_experts,
)
from localmix.architectures.decoder import (
    BLOCK,
    DENSE,
    EMBEDDING,
    HEAD,
    LAYER,
    MIXTURE,
    NORMS,
    attention,
    count,
    decoder_dimensions,
    decoder_settings,
    expert_settings,
    linear,
    norm,
    theta,
)
from localmix.architectures.rope import derive_rope, rope_block
from localmix.errors import InputError
from localmix.sources.base import boolean, f32, text, u32

_SCORING = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


def _is_dense(settings: Settings, layer: int | None) -> bool:
    return layer is not None and layer < settings["first_k_dense_replace"]


def _is_mixture(settings: Settings, layer: int | None) -> bool:
    return not _is_dense(settings, layer)


def _in_layers(rules: tuple[TensorRule, ...], applies: Applies) -> tuple[TensorRule, ...]:
    return tuple(replace(rule, applies=applies) for rule in rules)


# The first layers are dense; in the others the shared experts are one matrix, as wide as all of them.
_FEED_FORWARD = (
    *_in_layers(DENSE, _is_dense),
    *_in_layers(
        (
            *MIXTURE,
            *linear("mlp.shared_experts.gate_proj", "ffn_gate_shexp", "shared", "hidden", bias=None),
            *linear("mlp.shared_experts.up_proj", "ffn_up_shexp", "shared", "hidden", bias=None),
            *linear("mlp.shared_experts.down_proj", "ffn_down_shexp", "hidden", "shared", bias=None),
        ),
        _is_mixture,
    ),
)

_EXPERTS = (
    *expert_settings(experts=64, used=6, aliases=("n_routed_experts",)),
    count("moe_intermediate_size", "expert_feed_forward_length", absent=1408),
    count("n_shared_experts", "expert_shared_count", absent=2, most=1024),
    count("first_k_dense_replace", "leading_dense_block_count", least=0, absent=1),
)


def _dimensions(settings: Settings) -> dict[str, int]:
    lengths = dict(decoder_dimensions(settings))
    return lengths | {"shared": lengths["expert_feed_forward"] * int(settings["n_shared_experts"])}


def _scoring(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """How the router's numbers become weights, where config.json says it."""
    found = _SCORING.get(str(config.get("scoring_func")))
    return {} if found is None else {f"{architecture}.expert_gating_func": u32(found)}


def _derive_first(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    derived = derive_rope("deepseek", theta(1e4), config, settings, path)
    fixed = {"deepseek.rope.scaling.type": text("none"), "deepseek.expert_weights_scale": f32(1.0)}
    return replace(derived, metadata={**derived.metadata, **fixed, **_scoring(config, "deepseek")})


DEEPSEEK = Architecture(
    model_type="deepseek",
    classes=("DeepseekForCausalLM",),
    name="deepseek",
    rows=decoder_settings(context=2048, epsilon=1e-6, vocabulary=102400, further=_EXPERTS),
    rules=(EMBEDDING, NORMS[0], *attention(interleaved=True), NORMS[1], *_FEED_FORWARD, *HEAD),
    dimensions=_dimensions,
    derive=_derive_first,
    expects={
        "hidden_act": ("silu",),
        "moe_layer_freq": (1,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "rope_scaling": (),
    },
)


def _keys(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks[:, : lengths["unrotated"]].swapaxes(1, 2))


def _values(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    return blocks[:, lengths["unrotated"] :]


def _unfolded(target: str, shape: tuple[str, ...], rearrange: Rearrange) -> TensorRule:
    """A part of the matrix that unfolds keys and values."""
    return TensorRule(
        f"{LAYER}self_attn.kv_b_proj.weight",
        f"{BLOCK}{target}.weight",
        ("heads", *shape),
        stored=("unfolded", "folded"),
        blocks="heads",
        rearrange=rearrange,
    )


def _folds_queries(settings: Settings, layer: int | None) -> bool:
    return "q_lora_rank" in settings


def _plain_queries(settings: Settings, layer: int | None) -> bool:
    return "q_lora_rank" not in settings


_FOLDED_ATTENTION = (
    *_in_layers(linear("self_attn.q_proj", "attn_q", "queries", "hidden", bias=None), _plain_queries),
    *_in_layers(
        (
            *linear("self_attn.q_a_proj", "attn_q_a", "folded_queries", "hidden", bias=None),
            norm("self_attn.q_a_layernorm", "attn_q_a_norm", "folded_queries"),
            *linear("self_attn.q_b_proj", "attn_q_b", "queries", "folded_queries", bias=None),
        ),
        _folds_queries,
    ),
    *linear("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", "folded_rotated", "hidden", bias=None),
    norm("self_attn.kv_a_layernorm", "attn_kv_a_norm", "folded"),
    _unfolded("attn_k_b", ("folded", "unrotated"), _keys),
    _unfolded("attn_v_b", ("value", "folded"), _values),
    *linear("self_attn.o_proj", "attn_output", "hidden", "values", bias=None),
)


def _folded_dimensions(settings: Settings) -> dict[str, int]:
    heads, folded = int(settings["num_attention_heads"]), int(settings["kv_lora_rank"])
    unrotated, rotated = int(settings["qk_nope_head_dim"]), int(settings["qk_rope_head_dim"])
    value = int(settings["v_head_dim"])
    return _dimensions(settings) | {
        "heads": heads,
        "folded": folded,
        "folded_rotated": folded + rotated,
        "folded_queries": int(settings.get("q_lora_rank", 0)),
        "unrotated": unrotated,
        "value": value,
        "unfolded": heads * (unrotated + value),
        "queries": heads * (unrotated + rotated),
        "values": heads * value,
    }


# llama.cpp tells models that do not fold their queries by their number of layers (src/models/deepseek2.cpp).
_LAYERS_OF_LITE = (26, 27)


def _check_folded(settings: Settings, path: Path) -> None:
    check_experts(settings, path)
    if settings["qk_rope_head_dim"] % 2:
        raise InputError(f"{path}: qk_rope_head_dim is {settings['qk_rope_head_dim']}, which is odd.")
    if "q_lora_rank" not in settings and settings["num_hidden_layers"] not in _LAYERS_OF_LITE:
        raise InputError(
            f"{path}: q_lora_rank is null in a model of {settings['num_hidden_layers']} layers; llama.cpp knows that "
            f"only of {' and '.join(map(str, _LAYERS_OF_LITE))} layers."
        )


def _derive_folded(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    """The rotary embedding, and lengths that are sums of others."""
    rotated = {**settings, "head_dim": settings["qk_rope_head_dim"]}
    derived = derive_rope("deepseek2", theta(1e4), config, rotated, path)
    folded, turned = int(settings["kv_lora_rank"]), int(settings["qk_rope_head_dim"])
    metadata = {
        **derived.metadata,
        "deepseek2.attention.head_count_kv": u32(1),
        "deepseek2.attention.key_length": u32(folded + turned),
        "deepseek2.attention.value_length": u32(folded),
        "deepseek2.attention.key_length_mla": u32(int(settings["qk_nope_head_dim"]) + turned),
        **_scoring(config, "deepseek2"),
    }
    if config.get("norm_topk_prob"):
        metadata["deepseek2.expert_weights_norm"] = boolean(True)
    sharper = _ALL_DIMENSIONS.read(rope_block(config, path), settings, path)
    if sharper is not None:
        # The tenth is what llama.cpp divides it by when it reads it.
        metadata["deepseek2.rope.scaling.yarn_log_multiplier"] = f32(0.1 * sharper)
    return replace(derived, metadata=metadata)


_ALL_DIMENSIONS = Setting("mscale_all_dim", float, 0, 1e9, absent=None, null=None)

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    classes=("DeepseekV2ForCausalLM",),
    name="deepseek2",
    rows=(
        *(row for row in decoder_settings(context=2048, epsilon=1e-6, vocabulary=102400) if row.name != "head_dim"),
        *_EXPERTS,
        count("kv_lora_rank", "attention.kv_lora_rank", absent=512),
        count("q_lora_rank", "attention.q_lora_rank", absent=None, null=None),
        count("qk_nope_head_dim", absent=128),
        count("qk_rope_head_dim", absent=64),
        count("n_group", "expert_group_count", absent=None, null=None),
        count("topk_group", "expert_group_used_count", absent=None, null=None),
        count("v_head_dim", "attention.value_length_mla", absent=128),
        Setting(
            "routed_scaling_factor",
            float,
            0,
            1e9,
            absent=1.0,
            null=1.0,
            keys=("{arch}.expert_weights_scale",),
            write=f32,
        ),
    ),
    rules=(EMBEDDING, NORMS[0], *_FOLDED_ATTENTION, NORMS[1], *_FEED_FORWARD, *HEAD),
    dimensions=_folded_dimensions,
    derive=_derive_folded,
    check=_check_folded,
    expects={
        "hidden_act": ("silu",),
        "moe_layer_freq": (1,),
        "topk_method": ("greedy",),
        "scoring_func": tuple(_SCORING),
        "attention_bias": (False,),
    },
)
