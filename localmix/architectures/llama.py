"""Llama, Mistral and Mixtral: one engine architecture (`llama`), three rows of names and defaults.

Keys and values are those that llama.cpp's converter writes for these models; where config.json leaves a
number out, the value is the one transformers' configuration class of that model fills in. The sliding window
is not written: llama.cpp's `llama` architecture attends to everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from localmix.architectures.base import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_TOKENS,
    Architecture,
    Default,
    Presence,
    Setting,
    Settings,
    TensorRule,
)
from localmix.architectures.rope import derive_rope
from localmix.sources.base import f32, u32

_NAME = "llama"


def _head_size(settings: Settings) -> int:
    """Width of one attention head when config.json does not say it."""
    return int(settings["hidden_size"]) // int(settings["num_attention_heads"])


def _one_per_head(settings: Settings) -> int:
    """Without grouped-query attention every head has keys and values of its own."""
    return int(settings["num_attention_heads"])


def _settings(
    *, kv_heads: Default, context: int, epsilon: float, head_size: Default, experts: tuple[Setting, ...] = ()
) -> tuple[Setting, ...]:
    """The settings of the family; the arguments are the defaults that differ between its members."""
    return (
        Setting("vocab_size", int, most=MOST_TOKENS, absent=32000, keys=("{arch}.vocab_size",), write=u32),
        Setting("hidden_size", int, most=2**20, keys=("{arch}.embedding_length",), write=u32),
        Setting("intermediate_size", int, most=2**24, keys=("{arch}.feed_forward_length",), write=u32),
        Setting("num_hidden_layers", int, most=MOST_LAYERS, keys=("{arch}.block_count",), write=u32),
        Setting("num_attention_heads", int, most=2**16, keys=("{arch}.attention.head_count",), write=u32),
        Setting(
            "num_key_value_heads",
            int,
            most=2**16,
            absent=kv_heads,
            null=_one_per_head,
            keys=("{arch}.attention.head_count_kv",),
            write=u32,
        ),
        Setting(
            "head_dim",
            int,
            most=2**16,
            absent=head_size,
            null=head_size,
            keys=("{arch}.attention.key_length", "{arch}.attention.value_length"),
            write=u32,
        ),
        Setting("max_position_embeddings", int, absent=context, keys=("{arch}.context_length",), write=u32),
        Setting(
            "rms_norm_eps",
            float,
            0,
            1,
            absent=epsilon,
            keys=("{arch}.attention.layer_norm_rms_epsilon",),
            write=f32,
        ),
        Setting("tie_word_embeddings", bool, absent=False, null=False),
        *experts,
    )


_EXPERTS = (
    Setting("num_local_experts", int, most=MOST_EXPERTS, absent=8, keys=("{arch}.expert_count",), write=u32),
    Setting("num_experts_per_tok", int, most=MOST_EXPERTS, absent=2, keys=("{arch}.expert_used_count",), write=u32),
)


def _theta(default: float) -> Setting:
    return Setting("rope_theta", float, 1, 1e30, absent=default, keys=("{arch}.rope.freq_base",), write=f32)


def _dimensions(settings: Settings) -> Mapping[str, int]:
    head = int(settings.get("head_dim", _head_size(settings)))
    return {
        "vocabulary": int(settings["vocab_size"]),
        "hidden": int(settings["hidden_size"]),
        "feed_forward": int(settings["intermediate_size"]),
        "queries": int(settings["num_attention_heads"]) * head,
        "keys": int(settings["num_key_value_heads"]) * head,
        "experts": int(settings.get("num_local_experts", 0)),
    }


_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."


def _linear(source: str, target: str, rows: str, columns: str, heads: str = "") -> tuple[TensorRule, ...]:
    """A matrix of each layer and the bias it may have."""
    return (
        TensorRule(f"{_LAYER}{source}.weight", f"{_BLOCK}{target}.weight", (rows, columns), heads),
        TensorRule(f"{_LAYER}{source}.bias", f"{_BLOCK}{target}.bias", (rows,), heads, Presence.OPTIONAL),
    )


def _experts(source: str, target: str, rows: str, columns: str) -> TensorRule:
    """The matrices of all experts of each layer, stacked."""
    return TensorRule(
        f"{_LAYER}block_sparse_moe.experts.{{expert}}.{source}.weight",
        f"{_BLOCK}{target}.weight",
        ("experts", rows, columns),
    )


_EMBEDDING = TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocabulary", "hidden"))

_ATTENTION = (
    TensorRule(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",)),
    *_linear("self_attn.q_proj", "attn_q", "queries", "hidden", "num_attention_heads"),
    *_linear("self_attn.k_proj", "attn_k", "keys", "hidden", "num_key_value_heads"),
    *_linear("self_attn.v_proj", "attn_v", "keys", "hidden"),
    *_linear("self_attn.o_proj", "attn_output", "hidden", "queries"),
    TensorRule(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",)),
)

_DENSE = (
    *_linear("mlp.gate_proj", "ffn_gate", "feed_forward", "hidden"),
    *_linear("mlp.up_proj", "ffn_up", "feed_forward", "hidden"),
    *_linear("mlp.down_proj", "ffn_down", "hidden", "feed_forward"),
)

_MIXTURE = (
    TensorRule(
        f"{_LAYER}block_sparse_moe.gate.weight",
        f"{_BLOCK}ffn_gate_inp.weight",
        ("experts", "hidden"),
        float32=True,
    ),
    _experts("w1", "ffn_gate_exps", "feed_forward", "hidden"),
    _experts("w2", "ffn_down_exps", "hidden", "feed_forward"),
    _experts("w3", "ffn_up_exps", "feed_forward", "hidden"),
)

_HEAD = (
    TensorRule("model.norm.weight", "output_norm.weight", ("hidden",)),
    TensorRule("lm_head.weight", "output.weight", ("vocabulary", "hidden"), presence=Presence.UNLESS_TIED),
)

# Code Llama is told from other Llamas by its 16 further tokens alone; these four fill in the middle.
_CODE_LLAMA_TOKENS = {32016: {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}}

LLAMA = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    name=_NAME,
    rows=_settings(kv_heads=_one_per_head, context=2048, epsilon=1e-6, head_size=_head_size),
    rules=(_EMBEDDING, *_ATTENTION, *_DENSE, *_HEAD),
    dimensions=_dimensions,
    derive=partial(derive_rope, _NAME, _theta(1e4)),
    extra_tokens=_CODE_LLAMA_TOKENS,
)

MISTRAL = Architecture(
    model_type="mistral",
    classes=("MistralForCausalLM",),
    name=_NAME,
    rows=_settings(kv_heads=8, context=131072, epsilon=1e-6, head_size=_head_size),
    rules=(_EMBEDDING, *_ATTENTION, *_DENSE, *_HEAD),
    dimensions=_dimensions,
    derive=partial(derive_rope, _NAME, _theta(1e4)),
    extra_tokens={},
)

MIXTRAL = Architecture(
    model_type="mixtral",
    classes=("MixtralForCausalLM",),
    name=_NAME,
    rows=_settings(kv_heads=8, context=131072, epsilon=1e-5, head_size=None, experts=_EXPERTS),
    rules=(_EMBEDDING, *_ATTENTION, *_MIXTURE, *_HEAD),
    dimensions=_dimensions,
    derive=partial(derive_rope, _NAME, _theta(1e6)),
    extra_tokens={},
)
