"""The same perplexity as `llama-perplexity`, to all digits that it prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from localmix.perplexity import measure
from tests.texts import write_text

TINYMIX = Path(__file__).parents[2] / "examples" / "tinymix"


def upstream_perplexity(tools: Path, model: Path, text: Path, ctx: int, chunks: int) -> float:
    """Its running value after the last chunk: the tool may end before its log has written the final line."""
    command = [tools / "llama-perplexity", "-m", model, "-f", text, "-c", ctx, "--chunks", chunks, "-t", 1]
    for _ in range(3):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        match = re.search(rf"\[{chunks}\]([0-9.]+)", done.stdout + done.stderr)
        if match:
            return float(match[1])
    raise AssertionError(done.stderr)


@pytest.mark.upstream
@pytest.mark.parametrize(("ctx", "chunks"), [(512, 21), (1024, 9), (600, 8), (4096, 2)])
def test_tinymix(upstream: Path, tinymix_bf16: Path, ctx: int, chunks: int) -> None:
    text = TINYMIX / "heldout.txt"
    found = measure(tinymix_bf16, text, ctx, chunks, threads=1)
    assert found.chunks == chunks
    assert found.ppl == pytest.approx(
        upstream_perplexity(upstream, tinymix_bf16, text, ctx, chunks), rel=1e-5, abs=1e-4
    )


@pytest.mark.upstream
@pytest.mark.parametrize("ctx", [64, 384])
def test_random_weights(upstream: Path, random_model: Path, tmp_path: Path, ctx: int) -> None:
    text = write_text(tmp_path / "text.txt", 6000)
    found = measure(random_model, text, ctx, threads=1)
    expected = upstream_perplexity(upstream, random_model, text, ctx, found.chunks)
    assert found.ppl == pytest.approx(expected, rel=1e-5)


@pytest.mark.upstream
def test_a_byte_order_mark_and_crlf_count_as_they_do_upstream(
    upstream: Path, random_model: Path, tmp_path: Path
) -> None:
    plain = write_text(tmp_path / "plain.txt", 3000).read_bytes()
    text = tmp_path / "windows.txt"
    text.write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    found = measure(random_model, text, 128, threads=1)
    expected = upstream_perplexity(upstream, random_model, text, 128, found.chunks)
    assert found.ppl == pytest.approx(expected, rel=1e-5)
