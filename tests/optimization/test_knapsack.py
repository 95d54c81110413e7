from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmix.optimization.knapsack import solve


def problem(seed: int, items: int, options: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and losses as of tensors and types: more bits lose less, not always, and some options are missing."""
    random = np.random.default_rng(seed)
    bits = np.linspace(1.5, 9, options) + random.normal(0, 0.2, options)
    sizes = (random.integers(1, 60, (items, 1)) * bits * 64).astype(np.int64)
    losses = random.lognormal(0, 1, (items, 1)) * 4.0**-bits * random.lognormal(0, 0.3, (items, options))
    losses[random.random(losses.shape) < 0.2] = np.inf
    losses[:, 0] = random.lognormal(0, 1, items)
    return sizes, losses


def best_of_all(sizes: np.ndarray, losses: np.ndarray, limit: int) -> float:
    """By trying everything."""
    least = np.inf
    for chosen in itertools.product(range(sizes.shape[1]), repeat=len(sizes)):
        picked = (np.arange(len(sizes)), list(chosen))
        if sizes[picked].sum() <= limit:
            least = min(least, losses[picked].sum())
    return float(least)


def loss(losses: np.ndarray, chosen: np.ndarray) -> float:
    return float(losses[np.arange(len(losses)), chosen].sum())


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_one_item_alone_gets_its_best_option_that_fits(seed: int, share: float) -> None:
    sizes, losses = problem(seed, items=1, options=6)
    limit = int(sizes.min() + share * (sizes.max() - sizes.min()))
    chosen = solve(sizes, losses, limit)
    if chosen is None:
        assert best_of_all(sizes, losses, limit) == np.inf
        return
    assert sizes[0, chosen[0]] <= limit
    assert loss(losses, chosen) == best_of_all(sizes, losses, limit)


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_an_answer_keeps_to_the_limit_and_no_exchange_of_two_makes_it_better(seed: int, share: float) -> None:
    sizes, losses = problem(seed, items=5, options=5)
    smallest = int(sizes[:, 0].sum())
    limit = smallest + int(share * (sizes.max(axis=1).sum() - smallest))
    chosen = solve(sizes, losses, limit)
    if chosen is None:
        assert np.where(np.isfinite(losses), sizes, 1 << 40).min(axis=1).sum() > limit
        return
    rows = np.arange(5)
    assert sizes[rows, chosen].sum() <= limit
    for one, other in itertools.combinations(range(5), 2):
        for pair in itertools.product(range(5), repeat=2):
            tried = chosen.copy()
            tried[[one, other]] = pair
            if sizes[rows, tried].sum() <= limit:
                assert loss(losses, tried) >= loss(losses, chosen) * (1 - 1e-9)


def test_hardly_ever_is_there_anything_better() -> None:
    worse = []
    for seed in range(40):
        sizes, losses = problem(seed, items=5, options=5)
        limit = int(sizes[:, 2].sum())
        chosen = solve(sizes, losses, limit)
        assert chosen is not None
        worse.append(loss(losses, chosen) / best_of_all(sizes, losses, limit))
    assert sum(ratio < 1.0001 for ratio in worse) >= 30
    assert float(np.mean(worse)) < 1.02


def test_a_mixtral_fills_its_limit_to_a_thousandth() -> None:
    sizes, losses = problem(7, items=995, options=25)
    limit = int(sizes[:, 12].sum())
    chosen = solve(sizes, losses, limit)
    assert chosen is not None
    assert 0.999 * limit < sizes[np.arange(995), chosen].sum() <= limit


def test_a_start_is_never_made_worse() -> None:
    sizes, losses = problem(3, items=30, options=8)
    losses[:, 4] = losses[:, 0] / 2  # there in every row
    start = np.full(30, 4)
    limit = int(sizes[:, 4].sum())
    chosen = solve(sizes, losses, limit, start)
    assert chosen is not None
    assert loss(losses, chosen) < loss(losses, start)
    assert sizes[np.arange(30), chosen].sum() <= limit


def test_what_cannot_fit_is_none() -> None:
    sizes, losses = np.array([[10, 20], [10, 20]]), np.array([[1.0, 0.5], [1.0, 0.5]])
    assert solve(sizes, losses, 19) is None
    assert solve(sizes, losses, 20) is not None
    assert solve(sizes, np.array([[np.inf, np.inf], [1.0, 0.5]]), 100) is None


@pytest.mark.parametrize("limit", [40, 10**12])
def test_with_room_for_everything_the_least_loss_is_taken(limit: int) -> None:
    sizes, losses = np.array([[10, 20], [10, 20]]), np.array([[1.0, 0.5], [0.4, 0.5]])
    chosen = solve(sizes, losses, limit)
    assert chosen is not None
    assert chosen.tolist() == [1, 0]
