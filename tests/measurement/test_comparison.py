"""Rows of the table: a reference's first, failures that leave the others, averages over texts, and the verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import InputError
from localmix.measurement.comparison import Measured, averages, compare, judge, look_at
from localmix.measurement.corpus import Corpus, read_corpus
from localmix.measurement.divergence import Divergence
from localmix.measurement.measuring_child import MeasuringChild
from localmix.measurement.perplexity import Conditions, Perplexity
from localmix.measurement.reference import Cache
from localmix.presentation.table import QuantizationRow
from tests import measuring_jobs
from tests.random_model import write_random_model
from tests.texts import write_text

CONDITIONS = Conditions(64, 2, threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "one": write_random_model(folder / "one-F32.gguf", layers=1),
        "two": write_random_model(folder / "two-F32.gguf", layers=1, seed=2),
        "broken": write_random_model(folder / "broken-F32.gguf", layers=1, poison="output.weight"),
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read_corpus([write_text(tmp_path_factory.mktemp("texts") / "text.txt", 1500)])


@pytest.mark.parametrize("cached", [True, False])
def test_the_reference_comes_first_and_failures_leave_the_others(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, cached: bool
) -> None:
    subjects = [look_at(models[name]) for name in ("two", "broken", "one")]
    cache = Cache(tmp_path / "cache") if cached else None
    steps: list[str] = []
    reports = compare(subjects, corpus, CONDITIONS, False, subjects[2], cache, lambda _, __, label: steps.append(label))
    reference, other, broken = sorted((measured.row for measured in reports), key=lambda row: row.failed)
    assert (reference.model, reference.is_reference, reference.divergence) == ("one", True, None)
    assert (other.model, other.is_reference) == ("two", False)
    assert other.ppl and reference.ppl and other.delta_ppl == pytest.approx(other.ppl - reference.ppl)
    assert other.divergence is not None and other.divergence.mean > 0
    assert (other.corpus, other.context, other.chunks) == ("text.txt", 64, 2)
    assert other.pp_tps == pytest.approx(1000 / (other.prompt_ms_per_token or 0))
    assert (other.memory_bytes is None) == (not cached)
    assert broken.model == "broken" and "the model gives no finite probability" in broken.failure
    assert "F32 (2 of 3): chunks" in steps


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_reference_leaves_the_models(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, cached: bool
) -> None:
    subjects = [look_at(models[name]) for name in ("broken", "one", "two")]
    cache = Cache(tmp_path / "cache") if cached else None
    rows = [measured.row for measured in compare(subjects, corpus, CONDITIONS, False, subjects[0], cache)]
    assert [(row.model, row.failed, row.is_reference) for row in rows] == [
        ("broken", True, True),
        ("one", False, False),
        ("two", False, False),
    ]
    assert rows[1].ppl and rows[1].divergence is None


def test_a_reference_alone_is_measured_against_itself(models: dict[str, Path], corpus: Corpus) -> None:
    one = look_at(models["one"])
    rows = [measured.row for measured in compare([one], corpus, CONDITIONS, False, one)]
    assert [row.is_reference for row in rows] == [True, False]
    assert rows[1].divergence is not None and rows[1].divergence.mean <= 1e-6


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_with_other_tokens_has_its_perplexity(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, cached: bool
) -> None:
    longer = look_at(write_random_model(tmp_path / "longer-F32.gguf", layers=1, embedding_rows=300))
    cache = Cache(tmp_path / "cache") if cached else None
    for subjects in ([longer], [longer, look_at(models["two"])]):
        done = list(compare(subjects, corpus, CONDITIONS, False, look_at(models["one"]), cache))
        rows = {measured.row.model: measured.row for measured in done}
        assert rows["one"].is_reference and rows["one"].ppl
        assert rows["longer"].ppl and rows["longer"].divergence is None and not rows["longer"].failed
        assert len(rows) == 1 + len(subjects) and ("two" not in rows or rows["two"].divergence)
        notes = [note for measured in done if measured.perplexity for note in measured.perplexity.notes]
        assert sum("do not have the same tokens" in note for note in notes) == 1


def test_a_model_that_kills_the_child_leaves_the_others(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path
) -> None:
    lethal = write_random_model(tmp_path / "lethal-F32.gguf", layers=1, duplicate=True)
    subjects = [look_at(path) for path in (models["two"], lethal, models["one"])]
    with MeasuringChild() as child:
        first = child.run(measuring_jobs.process_id)
        found = compare(subjects, corpus, CONDITIONS, False, child=child)
        rows = [next(found).row]
        assert child.run(measuring_jobs.process_id) == first
        rows += [measured.row for measured in found]
        assert child.run(measuring_jobs.process_id) != first
    assert [(row.model, row.failed) for row in rows] == [("two", False), ("lethal", True), ("one", False)]
    assert "lethal-F32.gguf makes llama.cpp abort" in rows[1].failure


def test_the_only_model_raises_its_error(models: dict[str, Path], corpus: Corpus) -> None:
    with pytest.raises(InputError, match="no finite probability"):
        list(compare([look_at(models["broken"])], corpus, CONDITIONS, False))


def row(
    corpus: str, path: str, nll: np.ndarray, reference: np.ndarray | None = None, **more: object
) -> QuantizationRow:
    """The row for the likelihoods of a text's tokens."""
    ppl, root = math.exp(nll.mean()), math.sqrt(len(nll) - 1)
    found = QuantizationRow(
        "m", "T", Path(path), 1, 8.0, ppl, float(nll.std()) / root * ppl, corpus=corpus, tokens=len(nll)
    )
    if reference is not None:
        other = math.exp(reference.mean())
        found = replace(
            found,
            delta_ppl=ppl - other,
            delta_error=float((ppl * nll - other * reference).std()) / root,
            divergence=Divergence(0.1 * len(corpus), 0.03, 0.05, 1.0, float(len(nll)), 0.9, 0.04),
        )
    return replace(found, **more)  # type: ignore[arg-type]


def test_averages_count_every_text_the_same() -> None:
    random = np.random.default_rng(1)
    references = [random.normal(2, 1, 400), random.normal(3, 1, 100)]
    models = [reference + random.normal(0.1, 0.2, len(reference)) for reference in references]
    rows = [row(name, "r", nll, is_reference=True) for name, nll in zip("ab", references, strict=True)]
    rows += [row(name, "m", nll, reference) for name, nll, reference in zip("ab", models, references, strict=True)]
    rows += [row("a", "f", models[0]), row("b", "f", models[1], failure="it broke")]
    reference, model = averages(rows)
    assert reference.is_reference and reference.delta_ppl is None
    assert model.corpus == "average of 2" and model.tokens == 500
    ppl = math.exp(np.mean([nll.mean() for nll in models]))
    other = math.exp(np.mean([nll.mean() for nll in references]))
    assert model.ppl == pytest.approx(ppl) and model.delta_ppl == pytest.approx(ppl - other)
    errors = [nll.std() / math.sqrt(len(nll) - 1) for nll in models]
    assert model.error == pytest.approx(ppl * math.hypot(*errors) / 2)
    paired = [
        (ppl * nll - other * reference).std() / math.sqrt(len(nll) - 1)
        for nll, reference in zip(models, references, strict=True)
    ]
    assert model.delta_error == pytest.approx(math.hypot(*paired) / 2)
    assert model.divergence is not None
    assert model.divergence.error == pytest.approx(math.hypot(0.03, 0.03) / 2)
    assert (model.divergence.mean, model.divergence.maximum) == (pytest.approx(0.1), 400)
    timed = [
        replace(one, prompt_ms_per_token=ms, memory_bytes=size)
        for one, ms, size in zip(rows[:2], (1, 3), (7, 5), strict=True)
    ]
    (average,) = averages(timed)
    assert (average.prompt_ms_per_token, average.pp_tps, average.memory_bytes) == (2, 500, 7)


def measured(kind: str, size: int, nll: np.ndarray, divergence: np.ndarray | None = None) -> Measured:
    ppl = math.exp(nll.mean())
    found = Perplexity(
        f"m-{kind}.gguf", "a", (), 8, 1, len(nll), ppl, 0.1, float(nll.mean()), 1, 1.0, 1.0, token_nll=nll
    )
    if divergence is not None:
        found = replace(
            found,
            token_divergence=divergence,
            divergence=Divergence.of(divergence, np.ones(len(divergence), bool)),
        )
    return Measured(QuantizationRow("m", kind, Path(kind), size, 8.0, ppl), found)


def test_the_verdict_by_perplexity() -> None:
    random = np.random.default_rng(2)
    nll = random.normal(2, 1, 10_000)
    worse = nll + random.normal(0.05, 0.1, len(nll))
    found = judge(measured("Q8_0", 1000, nll), measured("Q2_K", 400, worse))
    assert (found.better, found.size_ratio) == ("m-Q8_0.gguf", 0.4)
    assert found.kld_difference is found.kld_difference_error is None
    assert found.ppl_ratio == pytest.approx(math.exp((worse - nll).mean()))
    assert found.ppl_ratio_error == pytest.approx(found.ppl_ratio * 0.001, rel=0.05)
    lower, low, high = 100 * (1 - 1 / found.ppl_ratio), math.exp(nll.mean()), math.exp(worse.mean())
    error = 100 * found.ppl_ratio_error / found.ppl_ratio**2
    assert found.sentence == (
        f"Q8_0 is better than Q2_K: its perplexity is {lower:.2f} ± {error:.2f} % lower"
        f" ({low:.4f} against {high:.4f}), and it is 150.0 % larger."
    )
    turned = judge(measured("Q2_K", 400, worse), measured("Q8_0", 1000, nll))
    assert (turned.better, turned.sentence) == (found.better, found.sentence)
    assert turned.ppl_ratio == pytest.approx(1 / found.ppl_ratio)
    assert judge(measured("A", 999_900, worse), measured("B", 1_000_000, nll)).sentence.endswith("and it is as large.")


def test_a_difference_within_its_error_is_none() -> None:
    random = np.random.default_rng(3)
    nll = random.normal(2, 1, 10_000)
    noise = random.normal(0, 0.1, len(nll))
    found = judge(measured("Q8_0", 1000, nll), measured("Q6_K", 800, nll + noise))
    assert found.better == ""
    assert found.sentence.startswith("This text shows no difference in perplexity between Q8_0 and Q6_K (")
    assert found.sentence.endswith(" ± 0.10 %); Q6_K is 20.0 % smaller.")
    # as many tokens, but their noise is not the same in both
    one, other = random.gamma(1, 0.02, (2, len(nll)))
    unclear = judge(measured("A", 10, nll, one), measured("B", 10, nll, other))
    assert unclear.better == ""
    assert unclear.sentence.startswith("This text shows no difference in KLD between A and B (")
    assert unclear.sentence.endswith("); B is as large.")


def test_the_verdict_by_divergence_from_a_third() -> None:
    random = np.random.default_rng(4)
    nll = random.normal(2, 1, 10_000)
    near, more = random.gamma(1, 0.02, (2, len(nll)))
    # the perplexities show nothing: what counts is how far each is from the model that both stand for
    found = judge(measured("Q3_K_M", 1000, nll, near + more), measured("mix", 990, nll, near))
    assert found.better == "m-mix.gguf"
    assert found.kld_difference == pytest.approx(-more.mean())
    assert found.kld_difference_error == pytest.approx(more.std() / math.sqrt(len(nll) - 1))
    low, high = near.mean(), (near + more).mean()
    assert found.sentence == (
        f"mix is better than Q3_K_M: its KLD is {100 * (1 - low / high):.1f} % lower ({low:.5f} against {high:.5f},"
        f" {more.mean():.5f} ± {found.kld_difference_error:.5f} less), and it is 1.0 % smaller."
    )


def test_two_files_of_one_type_are_told_apart_by_name() -> None:
    nll = np.random.default_rng(5).normal(2, 1, 1000)
    first, second = measured("Q4_K", 100, nll), measured("Q4_K", 100, nll + 0.1)
    assert second.perplexity is not None
    second = replace(second, perplexity=replace(second.perplexity, model="m-recipe.gguf"))
    assert judge(first, second).sentence.startswith("m-Q4_K.gguf is better than m-recipe.gguf: its perplexity is 9.52")


def test_tokens_carry_their_divergence(models: dict[str, Path], corpus: Corpus) -> None:
    pair = list(compare([look_at(models["two"])], corpus, CONDITIONS, False, look_at(models["one"])))
    (found,) = (one.perplexity for one in pair if one.perplexity and one.perplexity.divergence)
    assert found.divergence is not None
    assert len(found.token_divergence) == found.tokens
    assert found.divergence.mean == pytest.approx(found.token_divergence.mean())
