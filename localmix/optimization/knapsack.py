"""Knapsack: one option for each item, so that the sum of what is lost is least and the sum of bytes keeps to a limit.

The relaxed problem is solved exactly by taking the steps of every item's convex hull in the order of what they gain for
a byte. What room is left is filled by exchanges: the best step of one item, or of two at once, as long as one helps.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Sizes = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]
Choice = npt.NDArray[np.intp]


def solve(sizes: Sizes, losses: Losses, limit: int, start: Choice | None = None) -> Choice | None:
    """An option for each item.

    Args:
        sizes: bytes of each option, `[items, options]`.
        losses: what it loses, `[items, options]`, infinite where an item has fewer options.
        limit: bytes that the chosen options may have together.
        start: begin with these options, which keep to the limit, instead of those of the relaxed problem: the
            answer loses no more than they do.

    Returns:
        `[items]`, or None when even the smallest options do not keep to the limit.
    """
    possible = np.isfinite(losses)
    smallest = np.where(possible, sizes, np.iinfo(np.int64).max).min(axis=1)
    if int(smallest.sum()) > limit or not possible.any(axis=1).all():
        return None
    chosen = _relaxed(sizes, losses, limit) if start is None else start.copy()
    return _exchange(sizes, losses, limit, chosen)


def _hull(sizes: Sizes, losses: Losses) -> list[int]:
    """Options of one item on the lower convex hull of (bytes, loss), from the smallest on, each losing less."""
    hull: list[int] = []
    for option in np.lexsort((losses, sizes)):
        if not np.isfinite(losses[option]) or (hull and losses[option] >= losses[hull[-1]]):
            continue
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            straight = (losses[before] - losses[option]) * (sizes[last] - sizes[before])
            if straight < (losses[before] - losses[last]) * (sizes[option] - sizes[before]):
                break
            hull.pop()
        hull.append(int(option))
    return hull


def _relaxed(sizes: Sizes, losses: Losses, limit: int) -> Choice:
    """The smallest options, and then steps along the hulls in the order of their gain for a byte until one fits not."""
    hulls = [_hull(*options) for options in zip(sizes, losses, strict=True)]
    steps = [
        ((losses[item, low] - losses[item, high]) / (sizes[item, high] - sizes[item, low]), item, low, high)
        for item, hull in enumerate(hulls)
        for low, high in itertools.pairwise(hull)
    ]
    chosen: Choice = np.array([hull[0] for hull in hulls], np.intp)
    room = limit - int(sizes[np.arange(len(hulls)), chosen].sum())
    for _, item, low, high in sorted(steps, key=lambda step: -step[0]):
        grown = int(sizes[item, high] - sizes[item, low])
        if grown > room:
            break
        chosen[item] = high
        room -= grown
    return chosen


def _exchange(sizes: Sizes, losses: Losses, limit: int, chosen: Choice) -> Choice:
    """Change one item, or two at once, for the better until no such change is left."""
    # one more item that always stays: beside it, another can change alone
    sizes = np.vstack([sizes, np.zeros_like(sizes[:1])])
    losses = np.vstack([losses, np.full_like(losses[:1], np.inf)])
    losses[-1, 0] = 0.0
    chosen = np.append(chosen, 0)
    items = np.arange(len(sizes))
    all_items, all_options = np.nonzero(np.isfinite(losses))
    while True:
        room = limit - int(sizes[items, chosen].sum())
        grown = sizes[all_items, all_options] - sizes[items, chosen][all_items]
        lost = losses[all_items, all_options] - losses[items, chosen][all_items]
        first, second = _best_pair(all_items, grown, lost, room)
        # an exchange that helps by a rounding error may be undone by the next one
        gain = lost[first] + lost[second]
        if not gain < -1e-12 * float(losses[items, chosen].sum()):
            return chosen[:-1]
        for move in (first, second):
            if lost[move] != 0 or grown[move] != 0:
                chosen[all_items[move]] = all_options[move]


def _best_pair(owners: npt.NDArray[np.intp], grown: Sizes, lost: Losses, room: int) -> tuple[int, int]:
    """The two moves of different items that lose least together and fit; staying is a move, too."""
    order = np.argsort(grown, kind="stable")
    # for each number of smallest moves: the best of them, and the best that is of another item
    best = np.empty(len(order), np.intp)
    other = np.empty(len(order), np.intp)
    top = runner = -1
    for place, move in enumerate(order):
        if top < 0 or lost[move] < lost[top]:
            if top >= 0 and owners[top] != owners[move]:
                runner = top
            top = int(move)
        elif owners[move] != owners[top] and (runner < 0 or lost[move] < lost[runner]):
            runner = int(move)
        best[place], other[place] = top, runner
    places = np.searchsorted(grown[order], room - grown, side="right") - 1
    fitting = np.flatnonzero(places >= 0)
    partner = best[places[fitting]]
    partner = np.where(owners[partner] == owners[fitting], other[places[fitting]], partner)
    together = np.where(partner >= 0, lost[fitting] + lost[partner], np.inf)
    winner = int(together.argmin())
    return int(fitting[winner]), int(partner[winner])
