"""The same perplexity and error as `llama-perplexity`, to all digits that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmix.measurement.perplexity import measure
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.rope_scaling import RopeScaling
from tests.conformance import upstream_perplexity
from tests.random_model import write_random_model
from tests.texts import write_text

TINYMIX = Path(__file__).parents[2] / "examples" / "tinymix"


def check(tools: Path, model: Path, text: Path, ctx: int, chunks: int | None = None) -> None:
    """Ours against the tool's."""
    found = measure(model, text, ctx, chunks, threads=1)
    assert chunks in (None, found.chunks)
    ppl, error = upstream_perplexity.perplexity(tools, model, text, ctx, found.chunks)
    assert found.ppl == pytest.approx(ppl, rel=1e-5, abs=6e-5)
    assert found.error == pytest.approx(error, rel=1e-4, abs=6e-6)


@pytest.mark.upstream
@pytest.mark.parametrize(("ctx", "chunks"), [(512, 21), (1024, 9), (600, 8), (4096, 2)])
def test_tinymix(upstream: Path, tinymix_bf16: Path, ctx: int, chunks: int) -> None:
    check(upstream, tinymix_bf16, TINYMIX / "heldout.txt", ctx, chunks)


@pytest.mark.upstream
@pytest.mark.parametrize("ctx", [512, 1024])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K"])
def test_quantized(upstream: Path, tinymix_bf16: Path, tmp_path: Path, kind: str, ctx: int) -> None:
    path = tmp_path / f"tinymix-{kind}.gguf"
    quantize(tinymix_bf16, [(load_presets().find(kind), path)], threads=1)
    check(upstream, path, TINYMIX / "heldout.txt", ctx, 4096 // ctx)


@pytest.mark.upstream
@pytest.mark.parametrize("ctx", [64, 384, 512, 1024])
@pytest.mark.parametrize("experts", [0, 8])
def test_random_weights(upstream: Path, tmp_path: Path, experts: int, ctx: int) -> None:
    model = write_random_model(tmp_path / "random.gguf", experts=experts)
    check(upstream, model, write_text(tmp_path / "text.txt", 6000), ctx)


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("rope", "options"),
    [
        (RopeScaling("linear", 2.0), ("--rope-scaling", "linear", "--rope-scale", "2")),
        (RopeScaling("yarn", 4.0), ("--rope-scaling", "yarn", "--rope-scale", "4")),
        (RopeScaling(freq_base=20000.0), ("--rope-freq-base", "20000")),
    ],
)
def test_stretched_positions(upstream: Path, tinymix_bf16: Path, rope: RopeScaling, options: tuple[str, ...]) -> None:
    text = TINYMIX / "heldout.txt"
    found = measure(tinymix_bf16, text, 512, 2, threads=1, rope=rope)
    ppl, error = upstream_perplexity.perplexity(upstream, tinymix_bf16, text, 512, 2, *options)
    assert found.ppl == pytest.approx(ppl, rel=1e-5, abs=6e-5)
    assert found.error == pytest.approx(error, rel=1e-4, abs=6e-6)


@pytest.mark.upstream
def test_a_byte_order_mark_and_crlf_count_as_they_do_upstream(
    upstream: Path, random_model: Path, tmp_path: Path
) -> None:
    plain = write_text(tmp_path / "plain.txt", 3000).read_bytes()
    text = tmp_path / "windows.txt"
    text.write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    check(upstream, random_model, text, 128)
