from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf import MODEL_ARCH, Keys, get_tensor_name_map

from localmix.architectures import ARCHITECTURES, find_architecture
from localmix.errors import InputError

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
PATH = Path("config.json")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_agree_with_gguf_py(model_type: str) -> None:
    """gguf-py's own table maps every checkpoint name of ours to the same GGUF name."""
    row = ARCHITECTURES[model_type]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for tensor in row.tensors(row.settings(CONFIG, PATH)):
        # Experts are known there by the name they have after stacking.
        source = re.sub(r"block_sparse_moe\.experts\.\d+\.(w\d)", r"feed_forward.experts.\1", tensor.sources[0])
        if tensor.stacked:
            source = source.removeprefix("model.")
        assert names.get_name(source, try_suffixes=(".weight", ".bias")) == tensor.name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keys_are_those_of_gguf_py(model_type: str) -> None:
    row = ARCHITECTURES[model_type]
    settings = row.settings(CONFIG, PATH)
    found = {**row.metadata(settings), **row.derive(CONFIG, settings, PATH).metadata}
    known = {
        value.replace("{arch}", row.name)
        for group in (Keys.LLM, Keys.Attention, Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert found.keys() <= known


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "theta", "epsilon", "context"),
    [
        ("llama", 8, 1e4, 1e-6, 2048),
        ("mistral", 8, 1e4, 1e-6, 131072),
        ("mixtral", 8, 1e6, 1e-5, 131072),
    ],
)
def test_defaults_of_transformers(model_type: str, kv_heads: int, theta: float, epsilon: float, context: int) -> None:
    """What a config.json leaves out is what transformers' configuration class of that model fills in."""
    row = ARCHITECTURES[model_type]
    settings = row.settings(CONFIG, PATH)
    assert settings["num_key_value_heads"] == kv_heads
    assert settings["rms_norm_eps"] == epsilon
    assert settings["max_position_embeddings"] == context
    assert row.derive(CONFIG, settings, PATH).metadata["llama.rope.freq_base"].value == theta
    null = row.settings({**CONFIG, "num_attention_heads": 16, "num_key_value_heads": None}, PATH)
    assert null["num_key_value_heads"] == 16


def test_only_known_models() -> None:
    assert find_architecture({"model_type": "mixtral"}, PATH).model_type == "mixtral"
    with pytest.raises(InputError) as caught:
        find_architecture({"model_type": "bert"}, PATH)
    assert caught.value.hint == "Known are llama, mistral, mixtral."


def test_infill_tokens_belong_to_code_llama_alone() -> None:
    assert ARCHITECTURES["llama"].extra_tokens.keys() == {32016}
    assert not ARCHITECTURES["mixtral"].extra_tokens
