"""`localmix imatrix`: what it says of the experts."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.commands import CommandLine
from tests.conftest import TINYMIX
from tests.random_model import write_random_model


@pytest.mark.parametrize("experts", [8, 20])
def test_the_use_of_experts_is_a_row_for_each_layer(tmp_path: Path, experts: int) -> None:
    write_random_model(tmp_path / "model.gguf", layers=3, experts=experts)
    run = CommandLine(tmp_path, tmp_path)
    options = ("--corpus", str(TINYMIX / "heldout.txt"), "--ctx", "64", "--chunks", "2", "--threads", "1")
    counts = run("imatrix", "model.gguf", "-o", "a.gguf", *options, "--json").json["coverage"]["experts"]
    head, _, *rows = run("imatrix", "model.gguf", "-o", "b.gguf", *options).out.partition("\n\n")[2].splitlines()
    assert head.split()[:6] == ["Tokens", "of", "layer", "fewest", "median", "most"]
    assert head.count("expert") == (8 if experts == 8 else 0)
    for row, (layer, used) in zip(rows, counts.items(), strict=True):
        each = used if experts == 8 else []
        assert len(used) == experts
        assert row.split() == [layer, *map(str, (min(used), round(statistics.median(used)), max(used), *each))]
