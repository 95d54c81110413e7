"""Every key of every JSON file of a checkpoint, set to odd values: it can be written, or it is a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmix.errors import InputError
from localmix.gguf_format import encode_header
from localmix.sources.checkpoint import open_checkpoint
from tests.checkpoints import edit_json, write_checkpoint

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    float("nan"),
    float("-inf"),
    "text",
    "\ud800",
    [],
    [[1]],
    {},
    {"content": 3},
    {"id": -1, "content": "<s>"},
    ["x"] * 1000,
]

FILES = {
    "config.json": "llama-rope-llama3",
    "tokenizer_config.json": "mistral-added-tokens",
    "added_tokens.json": "mistral-added-tokens",
    "tokenizer.json": "mixtral-fast-tokenizer",
    "generation_config.json": "mixtral-generation",
    "model.safetensors.index.json": "mixtral-padded",
}


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON document, of long ones the first thirty."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [path] if path else []
    for key, value in list(inner)[:30]:
        found += places(value, (*path, key))
    return found


@pytest.mark.parametrize("name", FILES)
def test_odd_values(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model", FILES[name])
    original = (folder / name).read_text(encoding="utf-8")
    refused = 0
    for place in places(json.loads(original)):
        for value in ODD if len(place) < 4 else ODD[::3]:

            def change(content: Any, place: tuple[Any, ...] = place, value: Any = value) -> None:
                for key in place[:-1]:
                    content = content[key]
                content[place[-1]] = value

            (folder / name).write_text(original, encoding="utf-8")
            edit_json(folder / name, change)
            try:
                with open_checkpoint(folder) as source:
                    encode_header(source.metadata, source.tensors)
            except InputError as error:
                assert str(folder) in error.message and "\n" not in error.message, (place, value)
                assert len(str(error)) < 1000, (place, value)
                refused += 1
            except Exception as error:
                raise AssertionError(f"{name}: {place} = {value!r}") from error
    assert refused
