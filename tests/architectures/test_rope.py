from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmix.architectures import ARCHITECTURES
from localmix.architectures.base import Derived
from localmix.errors import InputError

PATH = Path("config.json")
CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def derive(**changes: Any) -> Derived:
    row, config = ARCHITECTURES["llama"], {**CONFIG, **changes}
    return row.derive(config, row.settings(config, PATH), PATH)


def test_llama3_factors_follow_the_definition() -> None:
    """Short waves stay, long ones are stretched by the factor, and between them it rises without a jump."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = derive(rope_theta=5e5, rope_scaling={**scaling, "original_max_position_embeddings": 8192})
    factors = found.tensors["rope_freqs.weight"]
    assert factors.shape == (64,) and factors.dtype == np.float32
    for index, factor in enumerate(factors):
        wave = 2 * math.pi * 5e5 ** (2 * index / 128)
        if wave < 8192 / 4:
            assert factor == 1
        elif wave > 8192:
            assert factor == 8
        else:
            share = (8192 / wave - 1) / 3
            assert factor == pytest.approx(1 / ((1 - share) / 8 + share), rel=1e-5)
    assert "llama.rope.scaling.type" not in found.metadata


def test_trained_context_is_the_models_own_unless_said() -> None:
    found = derive(rope_scaling={"rope_type": "yarn", "factor": 2})
    assert found.metadata["llama.rope.scaling.original_context_length"].value == 4096


def test_dynamic_scaling_is_left_out_and_said() -> None:
    found = derive(rope_scaling={"type": "dynamic", "factor": 2})
    assert found.metadata.keys() == {"llama.rope.dimension_count", "llama.rope.freq_base"}
    assert "dynamic" in found.notes[0]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "longrope", "factor": 2},
        {"type": None},
        {"type": ["linear"]},
        {"type": "yarn", "factor": "8"},
        {"type": "yarn", "factor": 8, "original_max_position_embeddings": 0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": float("nan"), "low_freq_factor": 1, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
    ],
)
def test_impossible_blocks(block: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json: "):
        derive(rope_scaling=block)
