"""`localmix pull` as a user runs it, from a small hub on this machine."""

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
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    write_checkpoint(tmp_path / "served" / "fox", Shape(hidden=256, feed_forward=256, layers=2, shards=3))
    with serve() as hub:
        hub.add(NAME, tmp_path / "served" / "fox")
        yield hub


@pytest.fixture
def localmix(empty: CommandLine, served: Hub) -> CommandLine:
    return dataclasses.replace(empty, variables=served.variables)


def wait_for(served: Hub, count: int) -> None:
    """Until so many bytes of shards were sent."""
    deadline = time.monotonic() + 20
    while served.bytes_of("model-") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pull_then_the_usual_road(localmix: CommandLine, served: Hub) -> None:
    run = localmix("pull", NAME)
    assert "all checked" in run.out
    pulled = localmix("pull", NAME, "--json").json
    assert pulled["path"] == str(localmix.home / "fox" / "fox")
    assert pulled["fetched"] == 0
    assert pulled["bytes"] == sum(file["bytes"] for file in pulled["files"])
    content = served.repositories[NAME][SHARD]
    assert pulled["sha256"][SHARD] == hashlib.sha256(content).hexdigest()
    assert "fox (checkpoint)" in localmix("ls").out
    assert localmix("info", NAME, "--json").json["path"] == localmix("info", "--json").json["path"] == pulled["path"]
    assert "fox has no GGUF file" in localmix.fails("bench", NAME, expect=3)
    localmix("quantize", "Q8_0")
    assert (localmix.home / "fox" / "fox-Q8_0.gguf").exists()
    assert SHARD in localmix("rm", "fox", "--yes", "--json").out
    assert not (localmix.home / "fox").exists()


def test_ctrl_c_is_130_and_the_same_command_goes_on(localmix: CommandLine, served: Hub) -> None:
    served.bytes_per_second = 400_000
    run = localmix.popen("pull", NAME)
    wait_for(served, 500_000)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "The same command goes on from there." in err
    assert "Traceback" not in err
    assert "fox (unfinished)" in localmix("ls").out
    served.bytes_per_second = 0
    localmix("pull", NAME)
    total = sum(len(content) for content in served.repositories[NAME].values())
    # what the connections had under way when they were cut
    assert served.bytes_of("") < 1.02 * total + 4 * (1 << 20)


def test_ctrl_c_does_not_wait_for_a_silent_server(localmix: CommandLine, served: Hub) -> None:
    served.silence = 12
    served.silent = [SHARD]
    run = localmix.popen("pull", NAME)
    wait_for(served, 1_000_000)
    time.sleep(0.3)
    started = time.monotonic()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode == 130
    assert time.monotonic() - started < 5


def test_kill_and_the_same_command_goes_on(localmix: CommandLine, served: Hub) -> None:
    served.bytes_per_second = 300_000
    run = localmix.popen("pull", NAME)
    folder = localmix.home / "fox" / "fox"
    deadline = time.monotonic() + 20
    while not list(folder.glob(".model-*.part.json")):  # what is older than two seconds is on the disk
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.communicate()
    served.bytes_per_second = 0
    served.sent.clear()
    pulled = localmix("pull", NAME, "--json").json
    assert served.bytes_of("model-") < sum(len(c) for n, c in served.repositories[NAME].items() if "model-" in n)
    for file in pulled["files"]:
        assert Path(file["path"]).read_bytes() == served.repositories[NAME][file["name"]]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the limit on a file's size is POSIX")
def test_a_file_too_large_for_its_file_system_is_4(localmix: CommandLine, served: Hub) -> None:
    import resource

    limit = (400_000, 400_000)
    run = localmix.popen("pull", NAME, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = run.communicate(timeout=60)
    assert run.returncode == 4, err
    assert "larger than its file system allows" in err
    assert "LOCALMIX_HOME may name" in err
    localmix("pull", NAME)


def test_a_token_and_a_mirror_come_from_the_hubs_own_variables(localmix: CommandLine, served: Hub) -> None:
    served.token = "hf_secret"
    assert "HF_TOKEN" in localmix.fails("pull", NAME, expect=6)
    dataclasses.replace(localmix, variables=served.variables)("pull", NAME)


def test_wrong_words_and_no_network(localmix: CommandLine, served: Hub) -> None:
    localmix.fails("pull", "fox", expect=2)
    localmix.fails("pull", f"{NAME}:Q4_K", "--include", "*", expect=2)
    assert "localmix pull org/fox" in localmix.fails("bench", NAME, expect=5)
    away = {**served.variables, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot be reached" in dataclasses.replace(localmix, variables=away).fails("pull", NAME, expect=6)
    for endpoint in ("http://[bad", "http://127.0.0.1:99999", "nonsense", "ftp://hub"):
        odd = {**served.variables, "HF_ENDPOINT": endpoint}
        assert "HF_ENDPOINT" in dataclasses.replace(localmix, variables=odd).fails("pull", NAME, expect=2)
    odd = {**served.variables, "HF_TOKEN": "bäd"}
    assert "no token has" in dataclasses.replace(localmix, variables=odd).fails("pull", NAME, expect=2)
    offline = {**served.variables, "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in dataclasses.replace(localmix, variables=offline).fails("pull", NAME, expect=6)
    assert not localmix.home.exists() or not list(localmix.home.iterdir())


def test_plan_info_and_fit_read_only_heads(localmix: CommandLine, served: Hub, tmp_path: Path) -> None:
    planned = localmix("plan", NAME, "Q4_K", "Q8_0", "--json").json
    here = localmix("plan", tmp_path / "served" / "fox", "Q4_K", "Q8_0", "--json").json
    assert planned["types"] == here["types"]
    assert planned["path"] == NAME
    assert planned["download_bytes"] > sum(len(c) for n, c in served.repositories[NAME].items() if "model-" in n)
    run = localmix("info", NAME)
    assert hashlib.sha256(served.repositories[NAME][SHARD]).hexdigest() in run.out
    assert "3 files of weights" in run.err
    assert localmix("fit", NAME, "Q4_K", "--json").json["path"] == NAME
    assert served.bytes_of("model-") <= 3 * 3 * (1 << 18)
    assert not localmix.home.exists()
    localmix.fails("plan", "org/none", "Q4_K", expect=6)
