"""Llama, Mistral and Mixtral: one engine architecture (`llama`), three rows of names and defaults.

The sliding window is not written: llama.cpp's `llama` architecture attends to everything.
"""

from __future__ import annotations

from functools import partial

from localmix.architectures.base import Architecture, head_size
from localmix.architectures.decoder import (
    DENSE,
    EMBEDDING,
    HEAD,
    NORMS,
    attention,
    decoder_dimensions,
    decoder_settings,
    expert_settings,
    experts,
    router,
    theta,
)
from localmix.architectures.rope import derive_rope

_NAME = "llama"

_ATTENTION = (NORMS[0], *attention(interleaved=True), NORMS[1])

_MIXTURE = (
    router("block_sparse_moe"),
    experts("block_sparse_moe", "w1", "ffn_gate_exps", "feed_forward", "hidden"),
    experts("block_sparse_moe", "w2", "ffn_down_exps", "hidden", "feed_forward"),
    experts("block_sparse_moe", "w3", "ffn_up_exps", "feed_forward", "hidden"),
)

# Code Llama is told from other Llamas by its 16 further tokens alone; these four fill in the middle.
_CODE_LLAMA_TOKENS = {32016: {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}}

LLAMA = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    name=_NAME,
    rows=decoder_settings(context=2048, epsilon=1e-6, head=head_size),
    rules=(EMBEDDING, *_ATTENTION, *DENSE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, _NAME, theta(1e4)),
    extra_tokens=_CODE_LLAMA_TOKENS,
)

MISTRAL = Architecture(
    model_type="mistral",
    classes=("MistralForCausalLM",),
    name=_NAME,
    rows=decoder_settings(kv_heads=8, context=131072, epsilon=1e-6, head=head_size),
    rules=(EMBEDDING, *_ATTENTION, *DENSE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, _NAME, theta(1e4)),
)

MIXTRAL = Architecture(
    model_type="mixtral",
    classes=("MixtralForCausalLM",),
    name=_NAME,
    rows=decoder_settings(kv_heads=8, context=131072, epsilon=1e-5, further=expert_settings(experts=8, used=2)),
    rules=(EMBEDDING, *_ATTENTION, *_MIXTURE, *HEAD),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, _NAME, theta(1e6)),
)
