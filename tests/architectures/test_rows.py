from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf import MODEL_ARCH_NAMES, Keys, get_tensor_name_map

from localmix.architectures import ARCHITECTURES, find_architecture
from localmix.errors import InputError
from tests.model_families import CONFIGS, config_of

PATH = Path("config.json")
NAMES = {name: number for number, name in MODEL_ARCH_NAMES.items()}


@pytest.mark.parametrize("model", CONFIGS)
def test_names_agree_with_gguf_py(model: str) -> None:
    """gguf-py's own table maps every checkpoint name of ours to the same GGUF name."""
    config = config_of(model)
    row = ARCHITECTURES[config["model_type"]]
    names = get_tensor_name_map(NAMES[row.name], config["num_hidden_layers"])
    for tensor in row.tensors(row.settings(config, PATH)):
        if tensor.rearrange and ".attn_q." not in tensor.name and ".attn_k." not in tensor.name:
            continue  # one stored tensor becomes several
        # Experts are known there by the name they have after stacking.
        source = re.sub(
            r"model\.(.*)block_sparse_moe\.experts\.\d+\.(w\d)", r"\1feed_forward.experts.\2", tensor.sources[0]
        )
        source = re.sub(r"sinks$", "sinks.weight", source).replace("_bias", ".bias")  # as upstream's converter does
        source = re.sub(r"experts\.\d+\.", "experts.", source)
        assert names.get_name(source, try_suffixes=(".weight", ".bias")) == tensor.name


@pytest.mark.parametrize("model", CONFIGS)
def test_keys_are_those_of_gguf_py(model: str) -> None:
    config = config_of(model)
    row = ARCHITECTURES[config["model_type"]]
    settings = row.settings(config, PATH)
    found = {**row.metadata(settings), **row.derive(config, settings, PATH).metadata}
    known = {
        value.replace("{arch}", row.name)
        for group in (Keys.LLM, Keys.Attention, Keys.Rope, Keys.Tokenizer)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert found.keys() <= known


def test_only_known_models() -> None:
    assert find_architecture({"model_type": "mixtral"}, PATH).model_type == "mixtral"
    with pytest.raises(InputError) as caught:
        find_architecture({"model_type": "gpt9"}, PATH)
    assert caught.value.hint.startswith("Known are llama, mistral, mixtral, qwen2")


@pytest.mark.parametrize(
    ("model", "changes", "problem"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp computes qwen2 models with 'silu' only"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 99},
            "query_pre_attn_scalar is 99.0; llama.cpp scales by 24 in a model of 3",
        ),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types is not 5 with a window and one without"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window is null"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("phi3 long", {"rope_scaling": {"type": "yarn"}}, "rope scaling of type 'yarn' is not known for this model"),
        ("phi3 long", {"rope_scaling": {"type": "su", "long_factor": [1]}}, "long_factor is not a list of 6 positive"),
        ("phi3 long", {"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
        ("deepseek", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ("deepseek_v2", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, which is odd"),
        ("deepseek_v2", {"q_lora_rank": None}, "only of 26 and 27 layers"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts per token of only 4"),
    ],
)
def test_what_llama_cpp_does_not_compute(model: str, changes: dict[str, Any], problem: str) -> None:
    config = {**config_of(model), **changes}
    row = ARCHITECTURES[config["model_type"]]
    with pytest.raises(InputError, match=problem):
        row.derive(config, row.settings(config, PATH), PATH)
