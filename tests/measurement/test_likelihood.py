"""Likelihoods and divergences against a computation in float64, by every instruction set and by numpy."""

from __future__ import annotations

import numpy as np
import pytest

from localmix.measurement.likelihood import BLOCK, likelihoods
from localmix.native import lanes

WAYS = [*lanes.instruction_sets(), "ggml"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv(lanes.SWITCH, name)
    assert (lanes.likelihoods(lanes.chosen()) is None) == (name == "ggml")
    return name


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    largest = exact.max(1, keepdims=True)
    return exact - largest - np.log(np.exp(exact - largest).sum(1, keepdims=True))


@pytest.mark.parametrize("vocabulary", [3, 277, 5000, 2 * BLOCK])
def test_they_are_those_of_a_float64_softmax(way: str, vocabulary: int) -> None:
    generator = np.random.default_rng(3)
    logits = (generator.standard_normal((20, vocabulary)) * 10).astype(np.float32)
    reference = logits + (generator.standard_normal(logits.shape) * 0.5).astype(np.float32)
    logits[5] += 10_000  # a softmax does not see a shift
    logits[6, 0] = reference[6, 0] = -np.inf
    targets = generator.integers(1, vocabulary, 20).astype(np.int32)
    found = likelihoods(logits, targets, reference)
    rows = np.arange(20)
    model, other = log_softmax(logits), log_softmax(reference)
    weights = np.exp(other)
    with np.errstate(invalid="ignore"):
        expected = np.where(weights > 0, weights * (other - model), 0).sum(1)
    assert np.allclose(found.nll, -model[rows, targets], rtol=1e-6, atol=1e-6)
    assert np.allclose(found.reference_nll, -other[rows, targets], rtol=1e-6, atol=1e-6)
    assert np.allclose(found.divergence, expected, rtol=1e-5, atol=2e-6)
    assert (found.same_top == (logits.argmax(1) == reference.argmax(1))).all()
    alone = likelihoods(logits, targets)
    assert np.allclose(alone.nll, found.nll, rtol=1e-12)
    assert (len(alone.reference_nll), len(alone.divergence), len(alone.same_top)) == (0, 0, 0)


def test_a_model_does_not_diverge_from_itself(way: str) -> None:
    logits = np.random.default_rng(4).standard_normal((50, 999), np.float32) * 8
    found = likelihoods(logits, np.zeros(50, np.int32), logits.copy())
    assert (found.divergence == 0).all() and found.same_top.all()
    assert (found.nll == found.reference_nll).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_shows(way: str, value: float) -> None:
    logits = np.random.default_rng(5).standard_normal((3, 100), np.float32)
    broken = logits.copy()
    broken[1, 77] = value
    targets = np.zeros(3, np.int32)
    assert np.isfinite(likelihoods(broken, targets).nll).tolist() == [True, False, True]
    assert np.isfinite(likelihoods(broken, targets, logits).divergence).tolist() == [True, False, True]
    assert np.isfinite(likelihoods(logits, targets, broken).divergence).tolist() == [True, False, True]


def test_what_the_model_excludes_and_the_reference_does_not_is_infinitely_far(way: str) -> None:
    logits = np.zeros((1, 40), np.float32)
    excluding = logits.copy()
    excluding[0, 3] = -np.inf
    targets = np.zeros(1, np.int32)
    assert likelihoods(excluding, targets, logits).divergence[0] == np.inf
    assert likelihoods(logits, targets, excluding).divergence[0] == pytest.approx(np.log(40 / 39))
