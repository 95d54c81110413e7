"""`localmix serve` as a user runs it: real processes with small models, one set of them for all tests of a session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from localmix.convert import convert
from tests.commands import CommandLine
from tests.tool_caller import write_tool_caller
from tests.word_embedder import write_word_embedder

CHAT, CALLER, EMBEDDER = "tinymix:BF16", "caller:BF16", "words:F32"
KEY = "a-key-of-the-tests"
DOCUMENTS = Path(__file__).parents[2] / "examples" / "docqa" / "texts"


@dataclass(frozen=True)
class Served:
    """A running `localmix serve`.

    Attributes:
        url: without a slash at the end; the API is under `/v1`.
        models: their names, as clients use them.
        has_page: whether llama-server was built with its web page.
    """

    url: str
    models: tuple[str, ...]
    has_page: bool
    log: Path
    process: subprocess.Popen[str]


@contextmanager
def serving(
    folder: Path, models: Sequence[Path], *options: str, variables: dict[str, str] | None = None
) -> Iterator[Served]:
    """Run `localmix serve` until the block ends, then as Ctrl-C ends it; it must leave with exit code 0.

    Args:
        folder: for its library and its log.
        variables: of its environment, beside the usual ones.
    """
    own = {name: str(folder / name) for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR")}
    (folder / "XDG_RUNTIME_DIR").mkdir(parents=True, exist_ok=True, mode=0o700)
    localmix = CommandLine(folder / "home", folder, own | (variables or {}))
    arguments: tuple[str | Path, ...] = (
        "serve",
        *models,
        "--port",
        "0",
        "--threads",
        "1",
        "--slots",
        "2",
        "--json",
        *options,
    )
    with (
        (folder / "stderr").open("w") as errors,
        localmix.popen(*arguments, stderr=errors, start_new_session=os.name != "nt") as process,
    ):
        try:
            assert process.stdout is not None
            events = map(json.loads, iter(process.stdout.readline, ""))
            ready = next((event for event in events if event["event"] == "ready"), None)
            assert ready is not None, f"localmix serve ended:\n{(folder / 'stderr').read_text()}"
            yield Served(ready["url"], tuple(ready["models"]), ready["page"], Path(ready["log"]), process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert process.returncode == 0, (folder / "stderr").read_text()


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory, tinymix_bf16: Path) -> dict[str, Path]:
    """GGUF files by the names that they are served under: TinyMix, TinyMix with tools, and an embedding model that
    knows the words of docqa's texts."""
    folder = tmp_path_factory.mktemp("served")
    paths = {name: folder / name.split(":")[0] / f"{name.replace(':', '-')}.gguf" for name in (CALLER, EMBEDDER)}
    for path in paths.values():
        path.parent.mkdir()
    convert(write_tool_caller(folder / "checkpoints" / "caller"), paths[CALLER], threads=1)
    texts = [part for path in DOCUMENTS.iterdir() for part in path.read_text(encoding="utf-8").split("\n\n")]
    convert(write_word_embedder(folder / "checkpoints" / "words", texts), paths[EMBEDDER], "f32", threads=1)
    return {CHAT: tinymix_bf16, **paths}


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, upstream: Path, served_models: dict[str, Path]
) -> Iterator[Served]:
    """All three models at once, without a key."""
    with serving(tmp_path_factory.mktemp("serve"), list(served_models.values())) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, upstream: Path, tinymix_bf16: Path) -> Iterator[Served]:
    """TinyMix alone, for those who know `KEY`."""
    folder = tmp_path_factory.mktemp("guarded")
    with serving(folder, [tinymix_bf16], variables={"LOCALMIX_API_KEY": KEY}) as running:
        yield running
