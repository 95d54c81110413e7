"""Sampled error: how much of a tensor a type loses, from a few of its rows.

The relative error of a type is Σ h·(w − q)² ÷ Σ h·w², with the importance matrix's h (the mean squared input of a
column; 1 where there is none). Rows of one tensor lose much the same share, so that some dozens tell what all would:
docs/quality.md has the measurement.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.importance import Importance
from localmix.native.kernels import decode_rows, dequantize_rows, quantize_rows, requires_importance
from localmix.sources.base import Source, TensorInfo
from localmix.tensor_types import TensorType, fits

Floats = npt.NDArray[np.float32]
Errors = Mapping[str, Mapping[TensorType, float]]
Progress = Callable[[int, int, str], None]

# Weights of a tensor that stand for all of it, in whole rows, and how many rows there are at least.
SAMPLED_WEIGHTS = 1 << 16
LEAST_ROWS = 16

# llama-quantize refuses these without an importance row, unless the tensor is an embedding or the output
# (llama.cpp, tensor_requires_imatrix); ggml could write some of them.
_REFUSED_WITHOUT_IMPORTANCE = frozenset(
    {
        TensorType.IQ1_S,
        TensorType.IQ1_M,
        TensorType.IQ2_XXS,
        TensorType.IQ2_XS,
        TensorType.IQ2_S,
        TensorType.IQ3_XXS,
    }
)
_NEVER_REFUSED = ("token_embd.weight", "output.weight")


def can_hold(tensor: TensorInfo, kind: TensorType, has_importance: bool) -> bool:
    """Whether a tensor can have a type: its columns fit whole blocks, and what needs an importance row has one."""
    if not fits(kind, tensor.columns):
        return False
    if has_importance:
        return True
    return not requires_importance(kind) and (kind not in _REFUSED_WITHOUT_IMPORTANCE or tensor.name in _NEVER_REFUSED)


def relative_errors(
    source: Source,
    types: Iterable[TensorType],
    importance: Importance | None = None,
    *,
    tensors: Sequence[TensorInfo] | None = None,
    weights: int = SAMPLED_WEIGHTS,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, dict[TensorType, float]]:
    """The share of each tensor's weighted energy that each type loses, from sampled rows.

    Nothing but the sampled rows is read, and no more than one tensor's for each thread is held. The same rows are
    taken every time.

    Args:
        source: weights in F32, F16, BF16 or quantized.
        types: those to try; the ones that a tensor cannot hold are left out of its answer.
        importance: the importance matrix.
        tensors: those of the source to look at; by default all that have rows and columns.
        weights: how many of each tensor to take, in whole rows spread over all of it, at least one of each expert.
        threads: tensors in work at once.
        progress: called with (weights done, weights in all, tensor's name).

    Returns:
        By tensor and type: 0 for a type that keeps all, 1 for one as bad as zeros. A type that overflows is left out.

    Raises:
        InputError: NaN or Inf in a sampled row, or the importance matrix is of another model.
    """
    kinds = sorted(set(types))
    chosen = [tensor for tensor in source.tensors if len(tensor.shape) > 1] if tensors is None else list(tensors)
    found: dict[str, dict[TensorType, float]] = {tensor.name: {} for tensor in chosen}
    with ThreadPoolExecutor(threads, thread_name_prefix="sample") as pool:
        futures = {pool.submit(_errors_of, source, tensor, kinds, importance, weights): tensor for tensor in chosen}
        try:
            counts = {tensor.name: sum(map(len, sampled_rows(tensor, weights))) * tensor.columns for tensor in chosen}
            waiting, done = set(futures), 0
            while waiting:
                # short, so that Ctrl-C is heard
                finished, waiting = wait(waiting, timeout=0.1, return_when=FIRST_EXCEPTION)
                for future in finished:
                    tensor = futures[future]
                    found[tensor.name] = future.result()
                    done += counts[tensor.name]
                    if progress:
                        progress(done, sum(counts.values()), tensor.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


@dataclass(frozen=True)
class _Sample:
    """Rows of one expert, or of a tensor without experts.

    Attributes:
        weights: float32 `[rows, columns]`.
        importance: float32 `[columns]`, or None.
    """

    weights: Floats
    importance: Floats | None


def weighted_energy(values: Floats, importance: Floats | None) -> float:
    """Σ h·v² over all rows of `values`, `[rows, columns]`, with the importance `[columns]`, or 1 for h."""
    squares = np.einsum("rc,rc->c", values, values, dtype=np.float64)
    # no @: for so few numbers BLAS' threads wait for each other longer than they compute
    return float(squares.sum() if importance is None else (squares * importance).sum())


def _errors_of(
    source: Source, tensor: TensorInfo, kinds: Sequence[TensorType], importance: Importance | None, weights: int
) -> dict[TensorType, float]:
    weighted = importance.rows(tensor) if importance is not None else None
    held = [kind for kind in kinds if can_hold(tensor, kind, weighted is not None)]
    samples = _samples(source, tensor, weighted, weights)
    energy = sum(weighted_energy(sample.weights, sample.importance) for sample in samples)
    errors: dict[TensorType, float] = {}
    for kind in held:
        lost = sum(_lost(sample, kind) for sample in samples) if kind != tensor.type else 0.0
        if np.isfinite(lost):
            errors[kind] = lost / energy if energy else 0.0
    return errors


def _lost(sample: _Sample, kind: TensorType) -> float:
    if kind == TensorType.F32:
        return 0.0
    encoded = quantize_rows(kind, sample.weights, sample.importance)
    decoded = dequantize_rows(kind, encoded, sample.weights.shape[1])
    np.subtract(decoded, sample.weights, out=decoded)
    return weighted_energy(decoded, sample.importance)


def _samples(source: Source, tensor: TensorInfo, importance: Floats | None, weights: int) -> list[_Sample]:
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    of_expert = tensor.rows // experts
    samples = []
    for expert, places in enumerate(sampled_rows(tensor, weights)):
        values = np.empty((len(places), tensor.columns), np.float32)
        for number, place in enumerate(places):
            row = expert * of_expert + place
            values[number] = decode_rows(tensor.type, source.read(tensor, row, row + 1), tensor.columns).reshape(-1)
        if not np.isfinite(values).all():
            row, column = (int(at) for at in np.argwhere(~np.isfinite(values))[0])
            raise InputError(
                f"{source.path}: {tensor.name} holds {values[row, column]} at row"
                f" {expert * of_expert + places[row]}, column {column}.",
                "The checkpoint is damaged or was never finite; download or merge it again.",
            )
        row_importance = None if importance is None else np.ascontiguousarray(importance[expert])
        samples.append(_Sample(values, row_importance))
    return samples


def sampled_rows(tensor: TensorInfo, weights: int = SAMPLED_WEIGHTS) -> list[list[int]]:
    """Which rows stand for a tensor: for each expert, one at a random place of each of equal stretches.

    The places depend on the tensor's name alone, so that two runs, and a file and its checkpoint, agree.
    """
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    of_expert = tensor.rows // experts
    rows = max(LEAST_ROWS, -(-weights // tensor.columns))
    count = min(of_expert, -(-rows // experts))
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    edges = np.arange(count + 1) * of_expert // count
    return [[int(row) for row in random.integers(edges[:-1], edges[1:])] for _ in range(experts)]
