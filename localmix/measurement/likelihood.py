"""Rows of logits reduced to what is measured: likelihood of the target, divergence from a reference, top token.

The lanes do it where they were built (`native.lanes`), numpy elsewhere: float32 exponentials and float64 sums
in both, as llama.cpp computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localmix.native import lanes

# elements of a block of logits whose exponentials stay in a core's cache while they are summed
BLOCK = 1 << 17


@dataclass(frozen=True)
class Likelihoods:
    """One value for each row; natural logarithms.

    Attributes:
        nll: float64, -log of the probability that the model gives the target.
        reference_nll: float64, the same of the reference.
        divergence: float64, Kullback-Leibler divergence of the model from the reference, 0 where they are equal;
            rounding can take it below 0.
        same_top: bool, whether both hold the same token likeliest, the first of several.

    Without a reference the last three are empty.
    """

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same_top: NDArray[np.bool_]


def likelihoods(
    logits: NDArray[np.float32], targets: NDArray[np.int32], reference: NDArray[np.float32] | None = None
) -> Likelihoods:
    """Reduce rows of logits; what is no number in them comes out as NaN or infinity.

    Args:
        logits: float32 `[rows, vocabulary]`, contiguous.
        targets: int32 `[rows]`.
        reference: logits of the reference for the same tokens, of the same shape.
    """
    kernel = lanes.likelihoods(lanes.chosen())
    if kernel is None:
        return _by_numpy(logits, targets, reference)
    rows, vocabulary = logits.shape
    targets = np.ascontiguousarray(targets, np.int32)
    found = np.empty((rows, 4))
    other = None if reference is None else reference.ctypes.data
    kernel(logits.ctypes.data, other, rows, vocabulary, targets.ctypes.data, found.ctypes.data)
    return _columns(found, reference is not None)


def _by_numpy(
    logits: NDArray[np.float32], targets: NDArray[np.int32], reference: NDArray[np.float32] | None
) -> Likelihoods:
    count, vocabulary = logits.shape
    step = max(1, BLOCK // vocabulary)
    found = np.empty((count, 4))
    # what is no number is told by the result
    with np.errstate(all="ignore"):
        for start in range(0, count, step):
            rows = slice(start, start + step)
            block, chosen = logits[rows], (np.arange(min(step, count - start)), targets[rows])
            largest = block.max(axis=1, keepdims=True)
            shifted = block - largest
            log_sum = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
            found[rows, 0] = log_sum - shifted[chosen]
            if reference is None:
                continue
            other = reference[rows] - reference[rows].max(axis=1, keepdims=True)
            weights = np.exp(other)
            total = weights.sum(axis=1, dtype=np.float64)
            found[rows, 1] = np.log(total) - other[chosen]
            # a token that the reference excludes counts nothing, whatever the model says
            terms = np.where(weights > 0, weights * (other - shifted), np.float32(0))
            found[rows, 2] = terms.sum(axis=1, dtype=np.float64) / total + (log_sum - np.log(total))
            found[rows, 3] = shifted.argmax(axis=1) == other.argmax(axis=1)
    return _columns(found, reference is not None)


def _columns(found: NDArray[np.float64], paired: bool) -> Likelihoods:
    count = len(found) if paired else 0
    return Likelihoods(found[:, 0], found[:count, 1], found[:count, 2], found[:count, 3] != 0)
