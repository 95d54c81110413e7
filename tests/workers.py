"""Real workers for tests: `localmix worker` as a process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from localmix.distribution.rpc_server import find_rpc_server
from localmix.errors import InputError
from tests.commands import CommandLine

LONG = "root ::= w w w w w w w w\nw ::= [a-z ]{400}\n"  # a grammar that no reply comes to the end of


def require_rpc_server() -> Path:
    """The ggml-rpc-server of this machine; without one the test is skipped."""
    try:
        return find_rpc_server()
    except InputError as error:
        pytest.skip(f"{error.message} `make vendor` builds it")


@contextlib.contextmanager
def running_worker(
    folder: Path,
    *options: str,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    variables: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A worker on a free port: its address as `--rpc` takes it, and the process.

    Args:
        prefix: words before the command, such as those of `ip netns exec`.
        variables: of its environment, beside the usual ones.
    """
    require_rpc_server()
    arguments = ["worker", "--host", host, "--port", "0", "--threads", "1", "--json", *options]
    command = CommandLine(folder / "home", folder, variables or {})
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "localmix", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=command.environment,
    )
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "listening", ready
        yield (f"[{host}]" if ":" in host else host) + f":{ready['port']}", process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        process.stdout.close()
