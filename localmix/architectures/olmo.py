"""OLMo 2: norms after attention and feed-forward instead of before, and over all queries and keys at once."""

from __future__ import annotations

from functools import partial

from localmix.architectures.base import Architecture
from localmix.architectures.decoder import (
    DENSE,
    EMBEDDING,
    HEAD,
    attention,
    decoder_dimensions,
    decoder_settings,
    norm,
    theta,
)
from localmix.architectures.rope import derive_rope

OLMO2 = Architecture(
    model_type="olmo2",
    classes=("Olmo2ForCausalLM",),
    name="olmo2",
    rows=decoder_settings(context=2048, epsilon=1e-5, vocabulary=50304),
    rules=(
        EMBEDDING,
        *attention(interleaved=False),
        norm("self_attn.q_norm", "attn_q_norm", "queries"),
        norm("self_attn.k_norm", "attn_k_norm", "keys"),
        norm("post_attention_layernorm", "post_attention_norm"),
        *DENSE,
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        *HEAD,
    ),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, "olmo2", theta(1e4), dimensions=False),
    expects={"hidden_act": ("silu",), "attention_bias": (False,)},
)
