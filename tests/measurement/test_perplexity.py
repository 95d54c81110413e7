"""Perplexity against a direct computation, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import FileError, InputError, UsageError
from localmix.measurement.likelihood import likelihoods
from localmix.measurement.perplexity import measure
from localmix.native.library import LLAMA_CPP_COMMIT
from localmix.native.model import Context, Model
from tests.random_model import write_random_model
from tests.texts import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "text.txt", 6000)


@pytest.mark.parametrize(("ctx", "limit"), [(16, 100), (128, 5), (200, None), (512, None), (2048, None)])
def test_it_is_the_mean_over_the_second_halves(random_model: Path, text: Path, ctx: int, limit: int | None) -> None:
    """Chunk by chunk, each alone in a context: no sequences side by side, no micro-batches."""
    steps: list[tuple[int, int, str]] = []
    found = measure(random_model, text, ctx, limit, threads=1, progress=lambda *step: steps.append(step))
    with (
        Model(random_model) as model,
        Context(model, context_length=ctx, batch=ctx, micro_batch=ctx, threads=1) as context,
    ):
        tokens = model.tokenize(text.read_bytes().removesuffix(b"\n"))
        count = min(len(tokens) // ctx, limit or 10**6)
        values = []
        for chunk in tokens[: count * ctx].reshape(count, ctx):
            context.clear()
            context.decode(np.r_[1, chunk[1:]], np.arange(ctx), 0, True)
            rows = context.logits()[ctx // 2 : -1]
            values.append(likelihoods(rows, chunk[ctx // 2 + 1 :]).nll)
    flat = np.concatenate(values)
    assert (found.chunks, found.tokens, found.context) == (count, len(flat), ctx)
    assert found.ppl == pytest.approx(math.exp(flat.mean()), rel=2e-4)
    assert found.error == pytest.approx(flat.std() / math.sqrt(len(flat) - 1) * found.ppl, rel=2e-3)
    assert np.allclose(found.token_nll.reshape(count, -1).mean(axis=1), [chunk.mean() for chunk in values], rtol=2e-3)
    assert (found.model, found.corpus) == ("random.gguf", "text.txt")
    assert steps[0] == (0, count, "chunks") and steps[-1] == (count, count, "chunks")
    assert found.speed is None and found.seconds > 0
    assert (found.threads, found.engine) == (1, f"llama.cpp {LLAMA_CPP_COMMIT}")
    assert found.memory_bytes is not None and found.memory_bytes > random_model.stat().st_size


def test_many_short_chunks_share_one_small_cache(random_model: Path, text: Path) -> None:
    """Each alone would have at least 256 cells: at 16 tokens that is 16 times the memory."""
    short = measure(random_model, text, 16, 256, threads=1)
    long = measure(random_model, text, 2048, 2, threads=1)
    assert short.memory_bytes is not None and long.memory_bytes is not None
    assert short.memory_bytes < long.memory_bytes + (8 << 20)


def test_speed_comes_with_it_and_a_long_context_is_noted(tmp_path: Path, text: Path) -> None:
    path = write_random_model(tmp_path / "short.gguf", context=64)
    found = measure(path, text, 128, 2, threads=1, speed=True)
    assert found.speed is not None and found.speed.ms_per_token > 0
    assert found.notes == ("short.gguf was trained with 64 tokens of context, and is measured with 128.",)


def test_nan_names_the_chunk(tmp_path: Path, text: Path) -> None:
    path = write_random_model(tmp_path / "broken.gguf", poison="output.weight")
    with pytest.raises(InputError, match=r"In chunk 1 the model gives no finite probability at token 65"):
        measure(path, text, 128, threads=1)


def test_refusals(tmp_path: Path, random_model: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"text\.txt is too short: a context of 4096 needs 8192 tokens"):
        measure(random_model, text, 4096)
    with pytest.raises(UsageError, match="4 tokens"):
        measure(random_model, text, 4)
    with pytest.raises(FileError, match=r"none\.gguf does not exist"):
        measure(tmp_path / "none.gguf", text)
    with pytest.raises(FileError, match=r"none\.txt"):
        measure(random_model, tmp_path / "none.txt")
