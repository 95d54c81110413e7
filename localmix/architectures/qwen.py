"""Qwen 2 (and 2.5) and Qwen 3, dense and as mixtures of experts.

Attention over a sliding window is left out, as llama.cpp does; the published models do not use it.
"""

from __future__ import annotations

from functools import partial

from localmix.architectures.base import Architecture, Presence, Settings, TensorRule
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
    head_norms,
    linear,
    theta,
)
from localmix.architectures.rope import derive_rope

_BIASED = (NORMS[0], *attention(interleaved=False, bias=Presence.ALWAYS), NORMS[1])
_NORMED = (NORMS[0], *attention(interleaved=False), *head_norms(), NORMS[1])

# Every layer is a mixture; others are not known to llama.cpp.
_SPARSE_EVERYWHERE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}

QWEN2 = Architecture(
    model_type="qwen2",
    classes=("Qwen2ForCausalLM",),
    name="qwen2",
    rows=decoder_settings(kv_heads=32, context=32768, epsilon=1e-6, vocabulary=151936),
    rules=(EMBEDDING, *_BIASED, *DENSE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, "qwen2", theta(1e4), dimensions=False),
    expects={"hidden_act": ("silu",)},
)

QWEN3 = Architecture(
    model_type="qwen3",
    classes=("Qwen3ForCausalLM",),
    name="qwen3",
    rows=decoder_settings(kv_heads=32, context=32768, epsilon=1e-6, head=128, vocabulary=151936),
    rules=(EMBEDDING, *_NORMED, *DENSE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, "qwen3", theta(1e4), dimensions=False),
    expects={"hidden_act": ("silu",)},
)


def _shared_dimensions(settings: Settings) -> dict[str, int]:
    return {**decoder_dimensions(settings), "shared": int(settings["shared_expert_intermediate_size"])}


QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    classes=("Qwen2MoeForCausalLM",),
    name="qwen2moe",
    rows=decoder_settings(
        kv_heads=16,
        context=32768,
        epsilon=1e-6,
        vocabulary=151936,
        further=(
            *expert_settings(experts=60, used=4, aliases=("num_experts",)),
            count("moe_intermediate_size", "expert_feed_forward_length", absent=1408),
            count("shared_expert_intermediate_size", "expert_shared_feed_forward_length", absent=5632),
        ),
    ),
    rules=(
        EMBEDDING,
        *_BIASED,
        *MIXTURE,
        TensorRule(
            f"{LAYER}mlp.shared_expert_gate.weight",
            f"{BLOCK}ffn_gate_inp_shexp.weight",
            ("one", "hidden"),
            float32=True,
        ),
        *linear("mlp.shared_expert.gate_proj", "ffn_gate_shexp", "shared", "hidden", bias=None),
        *linear("mlp.shared_expert.up_proj", "ffn_up_shexp", "shared", "hidden", bias=None),
        *linear("mlp.shared_expert.down_proj", "ffn_down_shexp", "hidden", "shared", bias=None),
        *HEAD,
    ),
    dimensions=_shared_dimensions,
    derive=partial(derive_rope, "qwen2moe", theta(1e4), dimensions=False),
    expects={"hidden_act": ("silu",), **_SPARSE_EVERYWHERE},
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    classes=("Qwen3MoeForCausalLM",),
    name="qwen3moe",
    rows=decoder_settings(
        kv_heads=4,
        context=32768,
        epsilon=1e-6,
        head=128,
        vocabulary=151936,
        further=(
            *expert_settings(experts=128, used=8, aliases=("num_experts",)),
            count("moe_intermediate_size", "expert_feed_forward_length", absent=768),
        ),
    ),
    rules=(EMBEDDING, *_NORMED, *MIXTURE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, "qwen3moe", theta(1e4), dimensions=False),
    expects={"hidden_act": ("silu",), **_SPARSE_EVERYWHERE},
)
