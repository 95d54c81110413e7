"""Gemma 2 and the text model of Gemma 3.

Their norms multiply by 1 + weight; llama.cpp multiplies by the weight, so 1 is added here. Where a checkpoint of
Gemma 3 also sees, its vision tower is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from localmix.architectures.base import (
    Architecture,
    Derived,
    Rule,
    Setting,
    Settings,
    TensorRule,
    check_grouped_attention,
)
from localmix.architectures.decoder import (
    DENSE,
    EMBEDDING,
    attention,
    check_windows,
    count,
    decoder_dimensions,
    decoder_settings,
    head_norms,
    norm,
    theta,
)
from localmix.architectures.rope import derive_rope
from localmix.errors import InputError
from localmix.sources.base import boolean, f32
from localmix.sources.documents import shown

_ATTENTION_NORMS = (
    norm("input_layernorm", "attn_norm", shift=1),
    norm("post_attention_layernorm", "post_attention_norm", shift=1),
)
_FEED_FORWARD_NORMS = (
    norm("pre_feedforward_layernorm", "ffn_norm", shift=1),
    norm("post_feedforward_layernorm", "post_ffw_norm", shift=1),
)
_OUTPUT_NORM = TensorRule("model.norm.weight", "output_norm.weight", ("hidden",), shift=1)

# The output is the embedding; some tools write it twice.
_TIED_OUTPUT = r"^lm_head\.weight$"
_EXPECTS = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False,),
}
_VOCABULARY = {"tokenizer.ggml.add_space_prefix": boolean(False)}
_WINDOW = "sliding_window"


def _softcap(name: str, key: str) -> Setting:
    return Setting(name, float, 1e-9, 1e9, absent=None, null=None, keys=("{arch}." + key,), write=f32)


_SCALE = Setting("query_pre_attn_scalar", float, 1e-9, 1e9, absent=None, null=None)


def _check(layers_of_largest: int, settings: Settings, path: Path) -> None:
    """llama.cpp knows by the number of layers how attention is scaled (src/models/gemma2.cpp, gemma3.cpp)."""
    check_grouped_attention(settings, path)
    largest = settings["num_hidden_layers"] == layers_of_largest
    scale = settings["hidden_size"] / settings["num_attention_heads"] if largest else settings["head_dim"]
    if settings.get("query_pre_attn_scalar", scale) != scale:
        raise InputError(
            f"{path}: query_pre_attn_scalar is {shown(settings['query_pre_attn_scalar'])}; llama.cpp scales by "
            f"{shown(scale)} in a model of {settings['num_hidden_layers']} layers."
        )


GEMMA2 = Architecture(
    model_type="gemma2",
    classes=("Gemma2ForCausalLM",),
    name="gemma2",
    rows=decoder_settings(
        kv_heads=4,
        context=8192,
        epsilon=1e-6,
        head=256,
        vocabulary=256000,
        tied=True,
        further=(
            _softcap("attn_logit_softcapping", "attn_logit_softcapping"),
            _softcap("final_logit_softcapping", "final_logit_softcapping"),
            count(_WINDOW, "attention.sliding_window", absent=4096),
            _SCALE,
        ),
    ),
    rules=(
        EMBEDDING,
        *_ATTENTION_NORMS,
        *attention(interleaved=False),
        *_FEED_FORWARD_NORMS,
        *DENSE,
        _OUTPUT_NORM,
    ),
    dimensions=decoder_dimensions,
    derive=partial(derive_rope, "gemma2", theta(1e4), dimensions=False),
    vocabulary=_VOCABULARY,
    check=partial(_check, 46),
    expects=_EXPECTS,
    elsewhere=_TIED_OUTPUT,
)


def _derive_gemma3(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    """The rotary embeddings: one for layers that see everything, one for those with a window."""
    check_windows(config, settings, path, every=6)
    block = config.get("rope_parameters")
    local: Any = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    if isinstance(block, dict) and "full_attention" in block:
        config, local = {**config, "rope_parameters": block["full_attention"]}, block.get("sliding_attention")
    derived = derive_rope("gemma3", theta(1e6), config, settings, path, dimensions=False)
    if not isinstance(local, dict):
        raise InputError(f"{path}: sliding_attention is {shown(local)}, not an object.")
    base = theta(1e4).read(local, settings, path)
    assert base is not None  # it has a default
    return replace(derived, metadata={**derived.metadata, "gemma3.rope.freq_base_swa": f32(base)})


GEMMA3_TEXT = Architecture(
    model_type="gemma3_text",
    classes=("Gemma3ForCausalLM",),
    name="gemma3",
    rows=decoder_settings(
        heads=8,
        kv_heads=4,
        context=131072,
        epsilon=1e-6,
        head=256,
        vocabulary=262208,
        tied=True,
        further=(
            _softcap("final_logit_softcapping", "final_logit_softcapping"),
            count(_WINDOW, "attention.sliding_window", absent=4096, null=Rule.REFUSE),
            _SCALE,
        ),
    ),
    rules=(
        EMBEDDING,
        *_ATTENTION_NORMS,
        *attention(interleaved=False),
        *head_norms(shift=1),
        *_FEED_FORWARD_NORMS,
        *DENSE,
        _OUTPUT_NORM,
    ),
    dimensions=decoder_dimensions,
    derive=_derive_gemma3,
    vocabulary=_VOCABULARY,
    check=partial(_check, 62),
    expects={**_EXPECTS, "attn_logit_softcapping": ()},
    elsewhere=_TIED_OUTPUT,
)

# Gemma 3 that also sees: the text model is a part, under one of two names.
GEMMA3 = replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    classes=("Gemma3ForConditionalGeneration",),
    section="text_config",
    renames={r"^language_model\.lm_head\.": "lm_head.", r"^(model\.language_model|language_model\.model)\.": "model."},
    elsewhere=rf"{_TIED_OUTPUT}|^(model\.)?(vision_tower|multi_modal_projector)\.",
)
