from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localmix.architectures import ARCHITECTURES

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
PATH = Path("config.json")


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


def test_infill_tokens_belong_to_code_llama_alone() -> None:
    assert ARCHITECTURES["llama"].extra_tokens.keys() == {32016}
    assert not ARCHITECTURES["mixtral"].extra_tokens
