"""kill -9 at any moment: no output under its name, and the same command ends with the bytes of a quiet run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from localmix.presets import load_presets
from localmix.quantize import quantize
from tests.random_model import write_random_model

RUN = textwrap.dedent("""
    import sys
    from pathlib import Path
    from localmix.plan import Planner
    from localmix.presets import load_presets
    from localmix.sources.open import open_source
    from localmix.stream import write_outputs

    with open_source(Path(sys.argv[1])) as source:
        planner = Planner(source)
        outputs = [
            (planner.plan(load_presets().find(name)), Path(sys.argv[2]) / f"{name}.gguf")
            for name in ("Q5_K_M", "Q8_0")
        ]
        first = []

        def progress(done, total, label):
            if not first:
                first.append(done)
                print(done, flush=True)

        write_outputs(source, outputs, threads=2, progress=progress, journal_seconds=0.01)
    print("finished", flush=True)
""")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def journal(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / ".Q8_0.gguf.journal").read_text()
    return ""


def start(model: Path, folder: Path) -> subprocess.Popen[str]:
    # ggml's own kernels are slow enough to be killed at work.
    environment = {**os.environ, "LOCALMIX_KERNELS": "ggml"}
    command = [sys.executable, "-c", RUN, str(model), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("kill") / "model.gguf", layers=8)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("quiet")
    outputs = [(load_presets().find(name), folder / f"{name}.gguf") for name in ("Q5_K_M", "Q8_0")]
    quantize(model, outputs)
    return {path.name: sha256(path) for _, path in outputs}


def test_twenty_kills_and_the_same_bytes(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    moments = random.Random(1)
    started_with: list[int] = []
    kills = 0
    while kills < 20:
        run = start(model, tmp_path)
        assert run.stdout is not None
        started_with.append(int(run.stdout.readline()))
        known = journal(tmp_path)
        # half of the kills at any moment, half when the journal has grown: those have something to go on from
        while kills % 2 and run.poll() is None and journal(tmp_path) in (known, ""):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        run.send_signal(signal.SIGKILL)
        rest = run.stdout.read()
        run.stdout.close()
        run.wait()
        if "finished" in rest:  # faster than the kill: begin again
            assert {path.name: sha256(path) for path in tmp_path.iterdir()} == expected
            for path in tmp_path.iterdir():
                path.unlink()
            continue
        kills += 1
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    run = start(model, tmp_path)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == expected
    # at least one run began where a killed one had been, not at the first slice
    assert max(started_with) > min(started_with)


def test_another_source_does_not_go_on_from_what_was_left(model: Path, tmp_path: Path) -> None:
    run = start(model, tmp_path)
    assert run.stdout is not None
    run.stdout.readline()
    time.sleep(0.1)
    run.kill()
    run.stdout.close()
    run.wait()
    other = write_random_model(tmp_path / "other.gguf", layers=8, seed=5)
    done = start(other, tmp_path).communicate(timeout=120)
    assert "finished" in done[0]
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    quantize(other, [(load_presets().find("Q8_0"), quiet / "Q8_0.gguf")])
    assert sha256(quiet / "Q8_0.gguf") == sha256(tmp_path / "Q8_0.gguf")


def test_a_broken_journal_means_from_the_start(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    for content in ("", "{", '{"fingerprint": 3}', '{"fingerprint": "x", "done": "ff"}'):
        (tmp_path / ".Q8_0.gguf.journal").write_text(content)
        (tmp_path / ".Q8_0.gguf.partial").write_bytes(b"rubbish")
        quantize(model, [(load_presets().find("Q8_0"), tmp_path / "Q8_0.gguf")])
        assert sha256(tmp_path / "Q8_0.gguf") == expected["Q8_0.gguf"]
        assert [path.name for path in tmp_path.iterdir()] == ["Q8_0.gguf"]
