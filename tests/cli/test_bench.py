"""`localmix bench` as a user runs it."""

from __future__ import annotations

import csv
import io
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.commands import CommandLine
from tests.random_model import write_random_model

FEW = ("-t", "1", "-p", "16", "-n", "4", "-r", "2")


@pytest.fixture
def localmix(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "home", tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")})


@pytest.fixture
def library(localmix: CommandLine, random_model: Path) -> CommandLine:
    """A model of two types; both are the same weights, which is nothing to a benchmark."""
    folder = localmix.home / "small"
    folder.mkdir(parents=True)
    for kind in ("F32", "Q8_0"):
        shutil.copy(random_model, folder / f"small-{kind}.gguf")
    return localmix


def test_a_row_for_each_type_and_what_is_swept(library: CommandLine) -> None:
    run = library("bench", "small", "--types", "F32,Q8_0", *FEW, "--depth", "0,8", "--kv-type", "f16,q8_0")
    lines = run.out.splitlines()
    assert lines[0].split() == ["Type", "Size", "MiB", "KV", "Test", "Tokens/s", "±", "ms/token", "Memory", "MiB"]
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["F32"] * 8 + ["Q8_0"] * 8
    assert [row[3] for row in rows[:4]] == ["pp16", "tg4", "pp16", "tg4"]
    assert "threads 1; 2 runs; llama.cpp" in lines[-1]
    # each row is told as soon as it is there
    assert run.err.count("tokens/s") == 16
    assert "small F32, KV f16, pp16 @ d8: " in run.err


def test_csv_markdown_and_json_hold_the_same(library: CommandLine) -> None:
    run = library("bench", "small:F32", *FEW, "--pg", "8,2", "--csv")
    rows = list(csv.DictReader(io.StringIO(run.out)))
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [("16", "0"), ("0", "4"), ("8", "2")]
    assert float(rows[0]["avg_ts"]) > 0
    run = library("bench", "small:F32", *FEW, "-n", "0", "--markdown")
    assert run.out.startswith("| Type | Size MiB | Test |")
    run = library("bench", "small:F32", *FEW, "-n", "0", "--device", "cpu", "--json")
    (row,) = run.json["rows"]
    assert (row["model"], row["type"], row["n_threads"]) == ("small", "F32", 1)
    assert row["n_gpu_layers"] == 0
    assert row["memory_bytes"] > 10e6


def test_a_row_that_fails_says_so(localmix: CommandLine, tmp_path: Path) -> None:
    # heads of 16 numbers have no whole block of q8_0
    path = write_random_model(tmp_path / "thin.gguf", hidden=64, feed_forward=64, experts=0)
    run = localmix("bench", path, *FEW, "--kv-type", "q8_0,f16", expect=3)
    assert [line.split()[4] == "failed" for line in run.out.splitlines()[2:-1]] == [True, True, False, False]
    assert "Note: thin F32, KV q8_0, pp16: thin.gguf with a context of" in run.err


def test_a_broken_file_is_said_before_anything_runs(library: CommandLine) -> None:
    path = library.home / "small" / "small-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[:5000])
    run = library("bench", "small", "--types", "F32,Q8_0", *FEW, expect=3)
    assert "small-Q8_0.gguf" in run.err
    assert "tokens/s" not in run.err


def test_what_no_memory_has_room_for_is_refused_before_anything_runs(library: CommandLine) -> None:
    many = str(1 << 20)  # whose attention mask takes 2 TB
    run = library(
        "bench", "small", "--types", "F32,Q8_0", "-p", f"16,{many}", "--batch", many, "--ubatch", many, expect=4
    )
    assert "was trained for a context of 2048, not 1048576" in run.err
    assert "small-F32.gguf needs" in run.err and "Or go on anyway with --force." in run.err
    assert "tokens/s" not in run.err and run.out == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--threads", "0"), "'0' is not a number from 1 to 512"),
        (("--depth", "1,x"), "'x' is not a number"),
        (("--gpu-layers", "all"), "or auto"),
        (("--kv-type", "q3"), "'q3' is not one of f16"),
        (("--pg", "8"), "is not P,G"),
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("--types", "Q2_K"), "small has no file of type Q2_K"),
        (("--device", "npu"), "no device npu"),
    ],
)
def test_a_wrong_option_is_a_sentence(library: CommandLine, words: tuple[str, ...], sentence: str) -> None:
    run = library("bench", "small", *words, expect=2)
    assert sentence in run.err
    assert run.out == ""


def test_types_of_tensors(localmix: CommandLine) -> None:
    run = localmix("bench", "--types", "q8_0,Q2_K", "--threads", "1", "--again")
    lines = run.out.splitlines()
    assert lines[0].split() == ["Type", "BPW", "GB/s", "ns/1000", "weights", "Time", "÷", "Q4_K"]
    rows = [line.split() for line in lines[2:4]]
    assert [row[:2] for row in rows] == [["Q8_0", "8.50"], ["Q2_K", "2.62"]]
    for _, bits, bandwidth, nanoseconds, _ in rows:
        # 1000 weights of so many bits
        assert float(bandwidth) == pytest.approx(float(bits) / 8 * 1000 / float(nanoseconds), rel=0.02)
    assert "1 thread; llama.cpp" in run.out and "Measured earlier" not in run.out
    kept = localmix("bench", "--types", "Q8_0,Q4_K", "--threads", "1")
    assert kept.out.splitlines()[2].split() == rows[0]
    assert "Measured earlier; --again measures anew." in kept.out
    document = localmix("bench", "--types", "Q4_K", "--threads", "1", "--json").json
    assert document["kept"] and document["threads"] == 1 and document["processor"]
    (row,) = document["rows"]
    assert (row["type"], row["bpw"], row["against_q4_k"]) == ("Q4_K", 4.5, 1.0)
    table = list(csv.DictReader(io.StringIO(localmix("bench", "--types", "Q4_K", "--threads", "1", "--csv").out)))
    assert float(table[0]["ns_per_1000_weights"]) == row["ns_per_1000_weights"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--types", "Q4_K_M"), "no tensor type 'Q4_K_M'. Did you mean Q4_K"),
        (("--types", ","), "No type was named"),
        (("--types", "Q4_K", "--depth", "5"), "--depth does not go with --types alone"),
        (("--types", "Q4_K", "--threads", "1,2"), "one number of threads"),
        (("small", "--types"), "in types that are named"),
        (("small", "--again"), "in types that are named"),
    ],
)
def test_what_does_not_go_with_types_is_a_sentence(library: CommandLine, words: tuple[str, ...], sentence: str) -> None:
    run = library("bench", *words, expect=2)
    assert sentence in " ".join(run.err.split())
    assert run.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
def test_ctrl_c_ends_the_timing_of_types(localmix: CommandLine) -> None:
    process = localmix.popen("bench", "--types", "--threads", "1", "--again")
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
def test_ctrl_c_prints_what_is_there(library: CommandLine) -> None:
    process = library.popen("bench", "small:F32", "-t", "1", "-p", "8", "-n", "100000", "-r", "1")
    assert process.stderr is not None
    told = process.stderr.readline()  # the first row is done; the second takes minutes
    assert "pp8: " in told or "trained" in told
    if "trained" in told:
        assert "pp8: " in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "pp8" in out and "tg100000" not in out
    assert "Traceback" not in err
