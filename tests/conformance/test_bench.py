"""The same work as `llama-bench` under the same names: tokens, cuts of batches, fields. Not times."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from localmix import worker
from localmix.measurement.speed import Settings, SpeedTest
from tests.commands import CommandLine
from tests.speed_jobs import count_work

REPETITIONS = 3
COUNTERS = re.compile(
    r"prompt eval time = .*?/ +(\d+) tokens.*?\beval time = .*?/ +(\d+) runs.*?graphs reused = +(\d+)", re.DOTALL
)


def llama_bench(tools: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [tools / "llama-bench", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)


@pytest.mark.upstream
def test_as_many_tokens_in_the_same_cuts(upstream: Path, random_model: Path) -> None:
    tests = [SpeedTest(50, 0), SpeedTest(0, 7), SpeedTest(45, 5)]
    runs = [(test, Settings(1, batch=32, micro_batch=16, depth=depth)) for test in tests for depth in (0, 70)]
    ours = worker.run(count_work, random_model, runs, REPETITIONS)
    theirs = []
    for test in tests:
        for depth in (0, 70):  # a run for each: llama-bench takes a filled cache from one test to the next
            done = llama_bench(
                upstream, "-m", random_model, "-t", 1, "-r", REPETITIONS, "-b", 32, "-ub", 16, "-d", depth,
                "-p", 0, "-n", 0, "-pg", f"{test.prompt},{test.generated}", "-v", "-o", "json",
            )  # fmt: skip
            theirs += [tuple(map(int, found)) for found in COUNTERS.findall(done.stderr)]
    assert ours == theirs


@pytest.mark.upstream
def test_the_same_fields_say_the_same(upstream: Path, random_model: Path, tmp_path: Path) -> None:
    localmix = CommandLine(tmp_path / "home", tmp_path)
    both = ("-t", 1, "-r", 2, "-p", 16, "-n", 4, "-d", "0,8", "-b", "16,32")
    run = localmix(
        "bench", random_model, *map(str, both), "--ubatch", "8", "--kv-type", "q8_0", "--pg", "8,2", "--json"
    )
    done = llama_bench(
        upstream, "-m", random_model, *both, "-ub", 8, "-ctk", "q8_0", "-ctv", "q8_0", "-pg", "8,2", "-o", "json"
    )
    ours, theirs = run.json["rows"], json.loads(done.stdout)
    assert len(ours) == len(theirs) == 12
    timed = {"avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"}
    # the build of the tools tells no commit, or that of the folder it was built in
    shared = ours[0].keys() & theirs[0].keys() - timed - {"build_commit"}
    assert {"n_prompt", "n_gen", "n_depth", "n_batch", "n_ubatch", "type_k", "model_size", "cpu_info"} <= shared
    assert timed <= ours[0].keys()
    for mine, other in zip(ours, theirs, strict=True):
        assert {name: mine[name] for name in shared} == {name: other[name] for name in shared}
        assert len(mine["samples_ns"]) == len(other["samples_ns"]) == 2
        assert mine["avg_ns"] == pytest.approx(sum(mine["samples_ns"]) / 2, abs=1)
        assert mine["avg_ts"] == pytest.approx(sum(mine["samples_ts"]) / 2)
