"""`localmix quantize TYPE REPO` as a user runs it, from a small hub on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Shape, write_checkpoint
from tests.commands import CommandLine
from tests.hub_server import Hub, serve

NAME = "org/fox"
SHARDS = 12


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    shape = Shape(hidden=256, feed_forward=256, layers=4, shards=SHARDS)
    write_checkpoint(tmp_path / "served" / "fox", shape)
    with serve() as hub:
        hub.add(NAME, tmp_path / "served" / "fox")
        yield hub


@pytest.fixture
def localmix(empty: CommandLine, served: Hub) -> CommandLine:
    return dataclasses.replace(empty, variables=served.variables)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expected(localmix: CommandLine, folder: Path) -> str:
    """What quantizing from the disk gives."""
    here = folder / "here.gguf"
    localmix("quantize", "Q4_K", folder / "served" / "fox", "-o", here)
    return sha256(here)


def whole_shards(served: Hub) -> set[str]:
    """Shards that were sent in full."""
    files = served.repositories[NAME]
    return {name for name, count in served.sent.items() if name.startswith("model-") and count >= len(files[name])}


def begun_shards(served: Hub) -> set[str]:
    """Shards of which more than a head was sent."""
    return {name for name, count in served.sent.items() if name.startswith("model-") and count > 2 << 16}


def wait_for(served: Hub, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(whole_shards(served)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on(localmix: CommandLine, served: Hub, sent: signal.Signals, tmp_path: Path) -> None:
    served.bytes_per_second = 6_000_000
    run = localmix.popen("quantize", "Q4_K", NAME)
    wait_for(served, 6)
    run.send_signal(sent)
    _, err = run.communicate(timeout=30)
    assert run.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    assert sent == signal.SIGKILL or "The same command goes on from there." in err
    assert "Traceback" not in err
    assert "fox (unfinished)" in localmix("ls").out
    done = whole_shards(served)
    served.bytes_per_second = 0
    served.sent.clear()
    made = localmix("quantize", "Q4_K", NAME, "--json").json
    # the last two were sent, but may not have been written when the signal came
    assert len(done & begun_shards(served)) <= 2
    assert sha256(Path(made["outputs"][0]["path"])) == expected(localmix, tmp_path)
    assert sorted(path.name for path in (localmix.home / "fox").iterdir()) == ["fox-Q4_K_M.gguf"]


def test_what_the_library_says_of_it_afterwards(localmix: CommandLine, served: Hub) -> None:
    localmix("quantize", "Q4_K", NAME, "--dry-run")
    assert not (localmix.home / "fox").exists()
    assert begun_shards(served) == set()
    localmix("quantize", "Q8_0", NAME)
    assert "org/fox" in localmix.fails("quantize", "Q4_K", "fox", expect=3)
    assert localmix("info", NAME, "--json").json["architecture"] == "llama"
    assert "Q8_0" in localmix("bench", NAME, "-p", "8", "-n", "4", "-r", "1").out
    assert [row["name"] for row in localmix("ls", "--json").json["models"]] == ["fox"]
    localmix("quantize", "Q4_K", NAME, "--keep")
    served.repositories["other/fox"] = served.repositories[NAME]
    assert "made from org/fox" in localmix.fails("quantize", "Q4_K", "other/fox", expect=2)
    localmix.fails("quantize", "Q4_K", "fox", "--keep", expect=2)
    localmix("rm", "fox", "--yes")
    assert not (localmix.home / "fox").exists()


def test_what_a_stopped_run_left_can_be_removed(localmix: CommandLine, served: Hub) -> None:
    served.bytes_per_second = 3_000_000
    run = localmix.popen("quantize", "Q4_K", NAME)
    wait_for(served, 1)
    run.kill()
    run.communicate()
    localmix("rm", "fox", "--yes")
    assert not (localmix.home / "fox").exists()


def test_convert_takes_it_too(localmix: CommandLine, served: Hub, tmp_path: Path) -> None:
    made = localmix("convert", NAME, "--json").json
    localmix("convert", tmp_path / "served" / "fox", "-o", tmp_path / "here.gguf")
    assert made["path"] == str(localmix.home / "fox" / "fox-BF16.gguf")
    assert sha256(Path(made["path"])) == sha256(tmp_path / "here.gguf")
    served.repositories["org/cat"] = served.repositories[NAME]
    assert "localmix pull org/cat" in localmix.fails("convert", "org/cat", "--upstream", expect=2)
    assert not list((localmix.home / "fox").glob(".*"))


def test_convert_joins_the_pieces_of_a_file_that_was_cut(localmix: CommandLine, served: Hub, tmp_path: Path) -> None:
    localmix("convert", tmp_path / "served" / "fox", "-o", tmp_path / "fox.gguf")
    content = (tmp_path / "fox.gguf").read_bytes()
    size = len(content) // 3
    names = ("part1of3", "part2of3", "part3of3")
    pieces = (content[:size], content[size : 2 * size], content[2 * size :])
    served.repositories["org/fox-GGUF"] = {
        "fox.Q8_0.gguf": b"another",
        **{f"big/fox.i1-BF16.gguf.{name}": piece for name, piece in zip(names, pieces, strict=True)},
    }
    told = localmix.fails("pull", "org/fox-GGUF:BF16", expect=2)
    assert "is a piece of a file that was cut" in told and "`localmix convert org/fox-GGUF:BF16`" in told
    plan = localmix("plan", "org/fox-GGUF:BF16", "Q8_0", "--json").json
    assert plan["types"][0]["type"] == "Q8_0"
    made = localmix("convert", "org/fox-GGUF:BF16", "--json").json
    assert made["path"] == str(localmix.home / "fox.i1" / "fox.i1-BF16.gguf")
    assert Path(made["path"]).read_bytes() == content


def test_a_missing_folder_is_not_made(localmix: CommandLine, served: Hub, tmp_path: Path) -> None:
    assert "mkdir" in localmix.fails("quantize", "Q4_K", NAME, "-o", tmp_path / "none" / "x.gguf", expect=5)
    assert not (tmp_path / "none").exists()
