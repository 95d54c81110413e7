"""The same importance matrix as `llama-imatrix`, and one that its tools read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from localmix.imatrix import collect
from localmix.importance import load_importance
from tests.random_model import write_random_model
from tests.texts import write_text

TINYMIX = Path(__file__).parents[2] / "examples" / "tinymix"


def compare(tools: Path, model: Path, text: Path, folder: Path, ctx: int, chunks: int | None) -> None:
    """Collect twice, with both programs; counts must be equal and sums within 1e-5 of the largest."""
    found = collect(model, [text], folder / "ours.gguf", ctx, chunks, threads=1)
    command = [tools / "llama-imatrix", "-m", model, "-f", text, "-c", ctx, "-t", 1]
    command += ["--chunks", found.chunks, "-o", folder / "theirs.gguf"]
    subprocess.run(list(map(str, command)), capture_output=True, check=True)
    ours, theirs = load_importance(folder / "ours.gguf"), load_importance(folder / "theirs.gguf")
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    assert set(ours.entries) == set(theirs.entries)
    for name, expected in theirs.entries.items():
        entry = ours.entries[name]
        assert np.array_equal(entry.counts, expected.counts), name
        assert np.abs(entry.sums - expected.sums).max() <= 1e-5 * expected.sums.max(), name


@pytest.mark.upstream
@pytest.mark.parametrize(("ctx", "chunks"), [(512, 21), (1024, 5)])
def test_tinymix(upstream: Path, tinymix_bf16: Path, tmp_path: Path, ctx: int, chunks: int) -> None:
    compare(upstream, tinymix_bf16, TINYMIX / "calibration.txt", tmp_path, ctx, chunks)


@pytest.mark.upstream
@pytest.mark.parametrize(("ctx", "experts"), [(128, 8), (200, 4), (512, 0)])
def test_random_weights(upstream: Path, tmp_path: Path, ctx: int, experts: int) -> None:
    model = write_random_model(tmp_path / "random.gguf", experts=experts)
    compare(upstream, model, write_text(tmp_path / "text.txt", 5000), tmp_path, ctx, None)


@pytest.mark.upstream
def test_llama_imatrix_reads_ours(upstream: Path, random_model: Path, tmp_path: Path) -> None:
    """Given two files and no text it adds them up: twice ours is ours doubled."""
    text = write_text(tmp_path / "text.txt", 2000)
    ours = tmp_path / "ours.gguf"
    collect(random_model, [text], ours, 128, threads=1)
    command = [upstream / "llama-imatrix", "-m", random_model, "--in-file", ours, "--in-file", ours]
    command += ["-o", tmp_path / "sum.gguf"]
    subprocess.run(list(map(str, command)), capture_output=True, check=True)
    once, twice = load_importance(ours), load_importance(tmp_path / "sum.gguf")
    assert set(once.entries) == set(twice.entries)
    for name, entry in once.entries.items():
        assert np.array_equal(2 * entry.counts, twice.entries[name].counts)
        assert np.array_equal(2 * entry.sums, twice.entries[name].sums)
    assert tuple(twice.datasets) == ("text.txt", "text.txt")
