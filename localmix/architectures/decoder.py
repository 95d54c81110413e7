"""What most decoders share: settings, names and shapes of attention, feed-forward and experts.

A family's file says how it differs. Keys and values are those that llama.cpp's converter writes; where config.json
leaves a number out, the value is the one that transformers' configuration class of that model fills in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmix.architectures.base import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_TOKENS,
    Default,
    Presence,
    Rule,
    Setting,
    Settings,
    TensorRule,
    head_size,
)
from localmix.errors import InputError
from localmix.sources.base import f32, u32

LAYER = "model.layers.{layer}."
BLOCK = "blk.{layer}."

_HEAD_KEYS = ("attention.key_length", "attention.value_length")


def one_per_head(settings: Settings) -> int:
    """Without grouped-query attention every head has keys and values of its own."""
    return int(settings["num_attention_heads"])


def count(
    name: str,
    *keys: str,
    least: int = 1,
    most: int = 2**20,
    absent: Default = Rule.REFUSE,
    null: Default = Rule.REFUSE,
) -> Setting:
    """A whole number that is written under these keys (after the architecture's name)."""
    written = tuple("{arch}." + key for key in keys)
    return Setting(name, int, least, most, absent, null, written, u32)


def decoder_settings(
    *,
    context: Default,
    epsilon: float,
    kv_heads: Default = one_per_head,
    head: Default = None,
    heads: Default = Rule.REFUSE,
    written_head: bool = True,
    vocabulary: Default = 32000,
    tied: bool = False,
    further: tuple[Setting, ...] = (),
) -> tuple[Setting, ...]:
    """The settings of a decoder; the arguments are the defaults that differ between models.

    Args:
        head: width of a head; None: nothing is written where config.json does not say it.
        written_head: whether the width of a head is written at all.
        tied: whether embedding and output are one unless config.json says otherwise.
    """
    return (
        count("vocab_size", "vocab_size", most=MOST_TOKENS, absent=vocabulary),
        count("hidden_size", "embedding_length"),
        count("intermediate_size", "feed_forward_length", most=2**24),
        count("num_hidden_layers", "block_count", most=MOST_LAYERS),
        count("num_attention_heads", "attention.head_count", most=2**16, absent=heads),
        count("num_key_value_heads", "attention.head_count_kv", most=2**16, absent=kv_heads, null=one_per_head),
        count("head_dim", *(_HEAD_KEYS if written_head else ()), most=2**16, absent=head, null=head),
        count("max_position_embeddings", "context_length", most=2**31 - 1, absent=context),
        Setting(
            "rms_norm_eps",
            float,
            0,
            1,
            absent=epsilon,
            keys=("{arch}.attention.layer_norm_rms_epsilon",),
            write=f32,
        ),
        Setting("tie_word_embeddings", bool, absent=tied, null=tied),
        *further,
    )


def expert_settings(*, experts: Default, used: Default, aliases: tuple[str, ...] = ()) -> tuple[Setting, ...]:
    """How many experts there are, and how many a token uses."""
    return (
        Setting(
            "num_local_experts",
            int,
            most=MOST_EXPERTS,
            absent=experts,
            keys=("{arch}.expert_count",),
            write=u32,
            aliases=aliases,
        ),
        count("num_experts_per_tok", "expert_used_count", most=MOST_EXPERTS, absent=used),
    )


def theta(default: float) -> Setting:
    """The base of the rotary frequencies."""
    return Setting("rope_theta", float, 1, 1e30, absent=default, keys=("{arch}.rope.freq_base",), write=f32)


def decoder_dimensions(settings: Settings) -> Mapping[str, int]:
    """Lengths for the names that rules have in their shapes."""
    head = head_size(settings)
    return {
        "vocabulary": int(settings["vocab_size"]),
        "hidden": int(settings["hidden_size"]),
        "feed_forward": int(settings["intermediate_size"]),
        "head": head,
        "queries": int(settings["num_attention_heads"]) * head,
        "keys": int(settings["num_key_value_heads"]) * head,
        "experts": int(settings.get("num_local_experts", 0)),
        "expert_feed_forward": int(settings.get("moe_intermediate_size", 0)),
        "one": 1,
    }


def check_windows(config: Mapping[str, Any], settings: Settings, path: Path, every: int) -> None:
    """Raise InputError when not one layer in `every`, the last of them, sees everything, as llama.cpp has it."""
    kinds = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(int(settings["num_hidden_layers"]))
    ]
    if config.get("layer_types", kinds) not in (kinds, None):
        raise InputError(f"{path}: layer_types is not {every - 1} with a window and one without in turns.")


def norm(source: str, target: str, length: str = "hidden", shift: float = 0.0) -> TensorRule:
    """A norm of each layer."""
    return TensorRule(f"{LAYER}{source}.weight", f"{BLOCK}{target}.weight", (length,), shift=shift)


def linear(
    source: str, target: str, rows: str, columns: str, heads: str = "", bias: Presence | None = Presence.OPTIONAL
) -> tuple[TensorRule, ...]:
    """A matrix of each layer, and its bias unless that is None."""
    weight = TensorRule(f"{LAYER}{source}.weight", f"{BLOCK}{target}.weight", (rows, columns), heads)
    if bias is None:
        return (weight,)
    return weight, TensorRule(f"{LAYER}{source}.bias", f"{BLOCK}{target}.bias", (rows,), heads, bias)


def attention(
    *, interleaved: bool, bias: Presence = Presence.OPTIONAL, output_bias: Presence = Presence.OPTIONAL
) -> tuple[TensorRule, ...]:
    """Queries, keys, values and output of each layer.

    Args:
        interleaved: llama.cpp rotates pairs of neighbours for this architecture, not halves of a head.
    """
    heads, kv_heads = ("num_attention_heads", "num_key_value_heads") if interleaved else ("", "")
    return (
        *linear("self_attn.q_proj", "attn_q", "queries", "hidden", heads, bias),
        *linear("self_attn.k_proj", "attn_k", "keys", "hidden", kv_heads, bias),
        *linear("self_attn.v_proj", "attn_v", "keys", "hidden", bias=bias),
        *linear("self_attn.o_proj", "attn_output", "hidden", "queries", bias=output_bias),
    )


def head_norms(shift: float = 0.0) -> tuple[TensorRule, ...]:
    """Norms of queries and keys over each head."""
    return (
        norm("self_attn.q_norm", "attn_q_norm", "head", shift),
        norm("self_attn.k_norm", "attn_k_norm", "head", shift),
    )


def experts(block: str, source: str, target: str, rows: str, columns: str) -> TensorRule:
    """The matrices of all experts of each layer, stacked; `block` is what holds them in the checkpoint."""
    return TensorRule(
        f"{LAYER}{block}.experts.{{expert}}.{source}.weight", f"{BLOCK}{target}.weight", ("experts", rows, columns)
    )


def router(block: str) -> TensorRule:
    """What chooses the experts."""
    return TensorRule(f"{LAYER}{block}.gate.weight", f"{BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), float32=True)


EMBEDDING = TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocabulary", "hidden"))

NORMS = (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "ffn_norm"))

DENSE = (
    *linear("mlp.gate_proj", "ffn_gate", "feed_forward", "hidden"),
    *linear("mlp.up_proj", "ffn_up", "feed_forward", "hidden"),
    *linear("mlp.down_proj", "ffn_down", "hidden", "feed_forward"),
)

MIXTURE = (
    router("mlp"),
    experts("mlp", "gate_proj", "ffn_gate_exps", "expert_feed_forward", "hidden"),
    experts("mlp", "down_proj", "ffn_down_exps", "hidden", "expert_feed_forward"),
    experts("mlp", "up_proj", "ffn_up_exps", "expert_feed_forward", "hidden"),
)

HEAD = (
    TensorRule("model.norm.weight", "output_norm.weight", ("hidden",)),
    TensorRule("lm_head.weight", "output.weight", ("vocabulary", "hidden"), presence=Presence.UNLESS_TIED),
)
