from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmix.architectures.bert import BERT
from localmix.convert import convert
from localmix.errors import InputError
from localmix.sources.open import open_source
from tests.checkpoints import read_shard, write_shard
from tests.commands import CommandLine
from tests.model_families import config_of, write_model


def pooling_of(folder: Path, modules: Any, pooling: Any = None) -> Any:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    config, path = config_of("bert"), folder / "config.json"
    derived = BERT.derive(config, BERT.settings(config, path), path)
    return derived.metadata.get("bert.pooling_type"), derived.notes


POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}


@pytest.mark.parametrize(
    ("pooling", "number"),
    [
        ({"pooling_mode_mean_tokens": True}, 1),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode": "mean", "pooling_mode_mean_tokens": True, "include_prompt": True}, 1),
    ],
)
def test_pooling(tmp_path: Path, pooling: Any, number: int) -> None:
    found, notes = pooling_of(tmp_path, [POOLING, {"type": "Dense", "path": "2_Dense"}], pooling)
    assert found.value == number
    assert "modules.json names a Dense" in notes[0]
    assert pooling_of(tmp_path, [])[0] is None


@pytest.mark.parametrize(
    ("modules", "pooling", "problem"),
    [
        ({}, {}, "not a list of modules"),
        ([3], {}, "not a list of modules"),
        ([{**POOLING, "path": "../secret"}], {}, "not a list of modules"),
        ([{**POOLING, "path": "/etc"}], {}, "not a list of modules"),
        ([POOLING], {"pooling_mode_max_tokens": True}, "pooling by .* is not known"),
        ([POOLING], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pooling by"),
        ([POOLING], {"pooling_mode": "weightedmean"}, "pooling by .*weightedmean.* is not known"),
        ([POOLING], [], "holds list"),
    ],
)
def test_odd_notes(tmp_path: Path, modules: Any, pooling: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        pooling_of(tmp_path, modules, pooling)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """`bert.` in front, gamma and beta, and a buffer of positions."""
    folder = write_model(tmp_path / "model", "bert")
    with open_source(folder) as source:
        names = [tensor.name for tensor in source.tensors]
        assert any("pooler" in note for note in source.notes)
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in read_shard(folder / "model.safetensors").items()
    }
    renamed["cls.predictions.bias"] = renamed["bert.pooler.dense.bias"]
    write_shard(folder / "model.safetensors", renamed)
    with open_source(folder) as source:
        assert [tensor.name for tensor in source.tensors] == names


@pytest.mark.parametrize("command", ["chat model.gguf -p Hello", "ppl model.gguf --corpus text --ctx 16"])
def test_it_writes_no_text(tmp_path: Path, command: str) -> None:
    convert(write_model(tmp_path / "model", "bert"), tmp_path / "model.gguf", threads=1)
    (tmp_path / "text").write_text("Hello. " * 99)
    problem = CommandLine(tmp_path / "home", tmp_path).fails(*command.split(), expect=3)
    assert "model.gguf is a bert model: it sees a text as a whole" in problem
