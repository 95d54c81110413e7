"""The program around gateway and engines: addresses to show, its private folder, its signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmix.errors import CapacityError
from localmix.serving.engine import Engine, GivenUp
from localmix.serving.engine_options import EngineOptions
from localmix.serving.policy import Policy
from localmix.serving.service import Event, Listening, Loading, Ready, Stop, private_folder, run, stopped_by_signals
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://localhost:80"),
        ("::", "http://localhost:80"),
        ("::1", "http://[::1]:80"),
    ],
)
def test_what_to_type_into_a_browser(host: str, url: str) -> None:
    assert Listening(host, 80).url == url


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_the_folder_is_private_and_those_of_killed_runs_go(short: Path) -> None:
    program = "import time; from localmix.serving.service import private_folder\n"
    program += "with private_folder() as folder: print(folder, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TMPDIR": str(short), "PYTHONPATH": str(ROOT)}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other,
        private_folder() as living,
    ):
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        assert left.parent == living.parent == short and living.stat().st_mode & 0o777 == 0o700
        for folder in (left, living):
            os.utime(folder, (0, 0))
        with private_folder() as folder:
            assert left.exists() and living.exists()
        assert not folder.exists()
        other.kill()
        other.wait()
        with private_folder():
            assert not left.exists() and living.exists()
    assert not list(short.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="sockets")
def test_a_path_that_is_too_long_for_sockets_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with private_folder() as folder:
        assert len(os.fsencode(folder / "12345678.sock")) < 100


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_signals_ask_first_and_then_insist() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    async def main() -> None:
        stop = Stop()
        with stopped_by_signals(stop):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.politely.wait(), 5)
            assert not stop.at_once.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(stop.at_once.wait(), 5)

    asyncio.run(main())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


FILES = """
import resource, sys
from localmix.serving.service import allow_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, min(hard, 512)))
for count in (300, 100, 100_000):
    allow_files(count)
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of files")
def test_as_many_files_as_clients_need_may_be_open() -> None:
    run = subprocess.run([sys.executable, "-c", FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["300", "300", "512"]


@pytest.mark.upstream
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_it_ends_when_every_engine_is_given_up(upstream: Path, tinymix_bf16: Path, short: Path) -> None:
    told: list[Event] = []
    options = EngineOptions(tinymix_bf16, "tinymix", 256, threads=1)
    engine = Engine(upstream / "llama-server", options, short, tell=told.append, pauses=())

    def tell(event: Event) -> None:
        told.append(event)
        if isinstance(event, Ready):
            os.kill(engine.pid or 0, signal.SIGKILL)

    async def main() -> None:
        await asyncio.wait_for(run([engine], Policy(port=0), lambda access: None, tell, Stop()), 20)

    with pytest.raises(CapacityError, match="was killed"):
        asyncio.run(main())
    assert isinstance(told[0], Listening) and isinstance(told[1], Loading)
    assert Ready(told[0].url, ("tinymix",), told[-2].page) == told[-2]  # type: ignore[union-attr]
    assert isinstance(told[-1], GivenUp) and engine.pid is None
