from __future__ import annotations

from dataclasses import dataclass

import pytest

from localmix.serving.model_names import find_named


@dataclass
class Named:
    name: str


ENGINES = [Named("tinymix:Q8_0"), Named("tinymix:Q4_K_M"), Named("Mixtral-8x7B-v0.1:Q4_K_M"), Named("minilm")]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("tinymix:Q8_0", "tinymix:Q8_0"),
        ("tinymix", "tinymix:Q8_0"),
        ("TinyMix:q4_k_m", "tinymix:Q4_K_M"),
        ("tinymix:Q4_K", "tinymix:Q4_K_M"),
        ("tinymix-Q4_K_M.gguf", "tinymix:Q4_K_M"),
        ("tinymix-Q4_K_M", "tinymix:Q4_K_M"),
        ("models/tinymix-Q4_K_M.gguf", "tinymix:Q4_K_M"),
        ("mixtral-8x7b-v0.1", "Mixtral-8x7B-v0.1:Q4_K_M"),
        ("mixtral-8x7b-v0.1.Q4_K_M.gguf", "Mixtral-8x7B-v0.1:Q4_K_M"),
        ("minilm", "minilm"),
        ("minilm.gguf", "minilm"),
        ("tinymix:Q2_K", None),
        ("tinymix-Q2_K.gguf", None),
        ("gpt-4", None),
        ("tiny", None),
        (":", None),
        (" ", None),
        ("/", None),
        ("\0", None),
    ],
)
def test_a_model_is_found_by_what_people_call_it(asked: str, name: str | None) -> None:
    found = find_named(ENGINES, asked)
    assert (found.name if found else None) == name
