"""Divergence from a reference: against a direct computation, from the cache and side by side."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import InputError
from localmix.measurement.corpus import read_corpus
from localmix.measurement.divergence import Divergence, measure_divergence, open_reference
from localmix.measurement.perplexity import BrokenReference, Conditions, measure
from localmix.measurement.reference import Cache
from localmix.native.model import Context, Model
from tests.random_model import write_random_model
from tests.texts import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "text.txt", 3000)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without experts: whether another batch chooses another expert does not blur the comparison."""
    return write_random_model(tmp_path_factory.mktemp("models") / "dense.gguf", experts=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, the same tokens."""
    return write_random_model(tmp_path_factory.mktemp("models") / "other.gguf", experts=0, seed=2)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def log_probabilities(path: Path, text: Path, ctx: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every word at every scored place, chunk by chunk, and the targets."""
    with (
        Model(path) as model,
        Context(model, context_length=ctx, batch=ctx, micro_batch=ctx, threads=1) as context,
    ):
        chunks = model.tokenize(text.read_bytes().removesuffix(b"\n"))[: count * ctx].reshape(count, ctx)
        rows = []
        for chunk in chunks:
            context.clear()
            context.decode(np.r_[1, chunk[1:]], np.arange(ctx), 0, True)
            exact = context.logits()[ctx // 2 : -1].astype(np.float64)
            exact -= exact.max(1, keepdims=True)
            rows.append(exact - np.log(np.exp(exact).sum(1, keepdims=True)))
    return np.concatenate(rows), chunks[:, ctx // 2 + 1 :].ravel()


@pytest.mark.parametrize("ctx", [128, 300])
def test_it_is_the_sum_over_the_vocabulary(dense: Path, other: Path, text: Path, cache: Cache, ctx: int) -> None:
    model, targets = log_probabilities(other, text, ctx, 5)
    reference, _ = log_probabilities(dense, text, ctx, 5)
    values = (np.exp(reference) * (reference - model)).sum(1)
    nll, reference_nll = -model[np.arange(len(targets)), targets], -reference[np.arange(len(targets)), targets]
    ppl, reference_ppl = math.exp(nll.mean()), math.exp(reference_nll.mean())
    same = (model.argmax(1) == reference.argmax(1)).mean()

    found = [
        measure_divergence(dense, [other], text, ctx, 5, threads=1, cache=kept)[0] for kept in (cache, cache, None)
    ]
    divergence = found[0].divergence
    assert divergence is not None
    root = math.sqrt(len(values) - 1)
    assert divergence.mean == pytest.approx(values.mean(), rel=2e-3)
    assert divergence.error == pytest.approx(values.std() / root, rel=5e-3)
    assert divergence.median == pytest.approx(np.median(values), rel=2e-2)
    assert divergence.percentile_99 == pytest.approx(np.percentile(values, 99), rel=2e-2)
    assert divergence.maximum == pytest.approx(values.max(), rel=2e-2)
    assert divergence.same_top == pytest.approx(same, abs=2 / len(values))
    assert divergence.same_top_error == pytest.approx(math.sqrt(same * (1 - same)) / root, abs=2e-3)
    assert found[0].delta_ppl == pytest.approx(ppl - reference_ppl, rel=1e-2, abs=1e-3)
    paired = (ppl * nll - reference_ppl * reference_nll).std() / root
    assert found[0].delta_error == pytest.approx(paired, rel=1e-2)
    assert found[0].reference == "dense.gguf"
    # recorded now, out of the cache, and side by side
    for again in found[1:]:
        assert again.divergence == divergence and again.ppl == found[0].ppl
    assert found[0].memory_bytes and found[1].memory_bytes and found[2].memory_bytes is None


@pytest.mark.parametrize("cached", [True, False])
def test_a_reference_does_not_diverge_from_itself(random_model: Path, text: Path, cache: Cache, cached: bool) -> None:
    found = measure_divergence(random_model, [random_model], text, 128, 3, threads=1, cache=cache if cached else None)[
        0
    ]
    assert found.divergence is not None
    assert found.divergence.mean <= 1e-6 and found.divergence.maximum <= 1e-6
    assert found.divergence.same_top == 1
    assert abs(found.delta_ppl or 0) <= 1e-6


def test_a_cached_reference_does_not_run_again(dense: Path, other: Path, text: Path, cache: Cache) -> None:
    corpus, conditions = read_corpus([text]), Conditions(128, 3, threads=1)
    first = open_reference(dense, corpus, conditions, cache)
    assert first.stored is not None and first.perplexity is not None
    assert first.perplexity.prompt_ms_per_token
    steps: list[str] = []
    second = open_reference(dense, corpus, conditions, cache, progress=lambda *step: steps.append(step[2]))
    assert steps == []  # not even its checksum
    assert second.stored == first.stored and second.perplexity is not None
    assert (second.perplexity.ppl, second.perplexity.error) == (first.perplexity.ppl, first.perplexity.error)
    assert second.perplexity.memory_bytes == first.perplexity.memory_bytes
    assert second.perplexity.prompt_ms_per_token is None
    timed = open_reference(dense, corpus, conditions, cache, speed=True).perplexity
    assert timed is not None and timed.speed is not None and timed.prompt_ms_per_token
    assert second.measure(other).ppl == first.measure(other).ppl


def test_other_tokens_leave_the_perplexity(random_model: Path, tmp_path: Path, text: Path, cache: Cache) -> None:
    longer = write_random_model(tmp_path / "longer.gguf", embedding_rows=300)
    alone = measure(longer, text, 128, 2, threads=1)
    for kept in (cache, None):
        (found,) = measure_divergence(random_model, [longer], text, 128, 2, threads=1, cache=kept)
        assert (found.ppl, found.error) == (alone.ppl, alone.error)
        assert found.divergence is None and found.delta_ppl is None and found.reference == ""
        assert found.notes[-1].startswith("longer.gguf and random.gguf do not have the same tokens")


def test_numbers_that_are_none_say_whose_they_are(random_model: Path, tmp_path: Path, text: Path, cache: Cache) -> None:
    broken = write_random_model(tmp_path / "broken.gguf", poison="output.weight")
    for kept in (cache, None):
        with pytest.raises(InputError, match="In chunk 1 the model gives no finite probability"):
            measure_divergence(random_model, [broken], text, 128, 2, threads=1, cache=kept)
    with pytest.raises(BrokenReference, match="In chunk 1 the reference gives no finite probability"):
        measure_divergence(broken, [random_model], text, 128, 2, threads=1)
    with pytest.raises(InputError, match="In chunk 1 the model gives no finite probability"):
        open_reference(broken, read_corpus([text]), Conditions(128, 2, threads=1), cache)
    assert len(list(cache.folder.glob("*.logits"))) == 1


def test_the_statistics_of_one_token() -> None:
    assert Divergence.of(np.array([0.5]), np.array([True])) == Divergence(0.5, 0, 0.5, 0.5, 0.5, 1, 0)
