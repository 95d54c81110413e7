"""`convert` against llama.cpp's own converter: the same metadata and the same bytes of every tensor.

What upstream wrote is kept in fixtures/, recorded by record_convert.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmix.convert import convert
from tests.checkpoints import SHAPES, write_checkpoint
from tests.conformance.record_convert import FIXTURES, TYPES, describe_file, fixture_name
from tests.model_families import CONFIGS, write_model

TINYMIX = Path(__file__).parents[2] / "examples" / "tinymix"

# Names and descriptions are each program's own; the file type depends on the type that is asked for.
_OURS = ("general.name", "general.basename", "general.finetune", "general.version", "general.description")

# Upstream writes them for some models only: a plan needs the vocabulary's size of all.
_ADDITIONS = (".vocab_size", ".rope.freq_base")


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in (*_OURS, "general.file_type")}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_same_as_upstream(tmp_path: Path, name: str, kind: str) -> None:
    folder = write_checkpoint(tmp_path / name, name)
    convert(folder, tmp_path / "ours.gguf", kind)
    ours, theirs = describe_file(tmp_path / "ours.gguf"), expected(name)
    assert comparable(ours["metadata"]) == comparable(theirs["metadata"])
    assert ours["tensors"] == theirs["tensors"][kind]


@pytest.mark.parametrize("model", CONFIGS)
def test_every_architecture_is_as_upstream_has_it(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path / "model", model)
    theirs = expected(fixture_name(model))
    for kind in TYPES:
        convert(folder, tmp_path / "ours.gguf", kind, threads=1)
        ours = describe_file(tmp_path / "ours.gguf")
        additions = {key for key in ours["metadata"].keys() - theirs["metadata"] if key.endswith(_ADDITIONS)}
        metadata = {key: value for key, value in ours["metadata"].items() if key not in additions}
        assert comparable(metadata) == comparable(theirs["metadata"])
        assert ours["tensors"] == theirs["tensors"][kind]


@pytest.mark.skipif(not (TINYMIX / "config.json").exists(), reason="examples/tinymix is not trained")
@pytest.mark.parametrize("kind", TYPES)
def test_tinymix_same_as_upstream(tmp_path: Path, kind: str) -> None:
    convert(TINYMIX, tmp_path / "ours.gguf", kind)
    ours, theirs = describe_file(tmp_path / "ours.gguf"), expected("tinymix")
    assert comparable(ours["metadata"]) == comparable(theirs["metadata"])
    assert ours["tensors"] == theirs["tensors"][kind]
