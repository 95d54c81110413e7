"""A library with one small model of random weights, made once by the real command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import Shape, read_shard, write_checkpoint, write_shard
from tests.commands import CommandLine

EOS = 2
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。\n"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    shape = Shape(hidden=256, feed_forward=256, layers=2)
    write_checkpoint(folder / "fox", shape)
    for shard in (folder / "fox").glob("*.safetensors"):
        tensors = read_shard(shard)
        if "lm_head.weight" in tensors:
            dtype, values = tensors["lm_head.weight"]
            rows = values.copy()
            rows[EOS] = 0  # so that it babbles until it is stopped
            tensors["lm_head.weight"] = dtype, rows
            write_shard(shard, tensors)
    (folder / "corpus.txt").write_text(TEXT * 60, encoding="utf-8")
    CommandLine(folder / "home", folder)("convert", "fox")
    return folder


@pytest.fixture
def localmix(made_once: Path, tmp_path: Path) -> CommandLine:
    """The command line in a folder of its own, with the library's model `fox` in BF16 and a corpus."""
    shutil.copytree(made_once, tmp_path / "work")
    command_line = CommandLine(tmp_path / "work" / "home", tmp_path / "work")
    state = command_line.home / "state.json"
    state.write_text(state.read_text().replace(str(made_once), str(tmp_path / "work")))
    return command_line


@pytest.fixture
def empty(tmp_path: Path) -> CommandLine:
    """The command line with an empty library."""
    return CommandLine(tmp_path / "home", tmp_path)
