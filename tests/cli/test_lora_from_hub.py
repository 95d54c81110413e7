"""`--lora` on a model of the hub: adapters lie here, shards are merged as they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters import KINDS, write_adapter
from tests.checkpoints import write_checkpoint
from tests.commands import CommandLine
from tests.hub_server import serve

NAME = "org/fox"


# of magnitudes over columns a whole tensor is needed before its first row is merged
@pytest.mark.parametrize("kind", ["vocabulary", "embedding-magnitudes"])
def test_the_same_bytes_as_from_the_disk(empty: CommandLine, tmp_path: Path, kind: str) -> None:
    # large enough that a tensor is not in what is fetched of a file to plan
    shape = replace(KINDS[kind].shape, hidden=512, feed_forward=256, layers=1)
    base = write_checkpoint(tmp_path / "fox", shape)
    adapter = write_adapter(tmp_path / kind, base, replace(KINDS[kind], shape=shape))
    with serve() as hub:
        hub.add(NAME, tmp_path / "fox")
        localmix = replace(empty, variables=hub.variables)
        planned = localmix("plan", NAME, "Q8_0", "--lora", adapter, "--json").json
        coming = localmix("quantize", "Q8_0", NAME, "--lora", adapter, "--json").json
        converted = localmix("convert", NAME, "--lora", adapter, "--json").json
    localmix("quantize", "Q8_0", tmp_path / "fox", "--lora", adapter, "-o", "here.gguf")
    localmix("convert", tmp_path / "fox", "--lora", adapter, "-o", "here-BF16.gguf")
    made = Path(coming["outputs"][0]["path"])
    assert planned["types"][0]["bytes"] == made.stat().st_size
    assert made.read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert Path(converted["path"]).read_bytes() == (tmp_path / "here-BF16.gguf").read_bytes()
    files = {path.name for path in (localmix.home / f"fox+{kind}").iterdir()}
    assert files == {f"fox+{kind}-Q8_0.gguf", f"fox+{kind}-BF16.gguf"}
