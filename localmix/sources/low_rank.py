"""Low-rank changes of stored weights, added in float32 to the rows that are read and to no others.

The formulas are those of PEFT (peft/tuners/lora/layer.py and dora.py): `W + scale * (B @ A)`, and with magnitudes
`magnitude / norm(W + scale * (B @ A)) * (W + scale * (B @ A))`. What PEFT rounds in between is not rounded here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.native.kernels import quantize_rows
from localmix.sources.documents import shown
from localmix.sources.positional import is_noting
from localmix.sources.safetensors import WEIGHT_DTYPES, StoredTensor
from localmix.tensor_types import TensorType, widen

Floats = npt.NDArray[Any]  # float32; float64 for the rare tensor that is stored so

# Products are made in tiles of a fixed place and size. A sum's last bit depends on the shape of the matrices that
# BLAS is given, and so it does not depend on which rows are asked for. OpenBLAS keeps products of up to 2**18
# multiplications in the calling thread (interface/gemm.c); here the slices are what is spread over the cores.
_TILE_ROWS = 16
_TILE_PRODUCTS = 1 << 18

# What NaN and Inf have in their exponent, of the types with 16 bits.
_EXPONENTS = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}

# Weights that are read at once to take the norms of columns.
_BLOCK_WEIGHTS = 1 << 20


def to_floats(rows: npt.NDArray[Any], dtype: str) -> Floats:
    """Rows of a stored dtype in float32, F64 as it is."""
    if dtype == "BF16":
        return widen(rows, TensorType.BF16)
    return rows if dtype == "F64" else rows.astype(np.float32, copy=False)


def to_stored(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Floats rounded once, to the nearest value of a stored dtype (ties to even)."""
    if dtype == "BF16":
        narrow = quantize_rows(TensorType.BF16, np.ascontiguousarray(values, np.float32), None)
        return narrow.view(WEIGHT_DTYPES[dtype])
    return values.astype(WEIGHT_DTYPES[dtype])


def read_matrix(tensor: StoredTensor) -> npt.NDArray[np.float32]:
    """A whole factor in float32, `[first dimension, all others]`."""
    return to_floats(tensor.read_rows(0, tensor.shape[0]), tensor.dtype).astype(np.float32, copy=False)


@dataclass(frozen=True)
class ExpertPart:
    """Where one expert's matrix lies in factors that are stacked over all experts.

    PEFT keeps `A` as `[experts * rank, in]` and `B` as `[out, rank * experts]`, the expert running fastest in `B`
    (`ParamWrapper.get_delta_weight`).

    Attributes:
        number, count: which expert, of how many.
        start, stop: its rows of `B`, where one matrix holds two of the model's.
    """

    number: int
    count: int
    start: int
    stop: int


class Factors:
    """The two matrices of a low-rank change, and their product by rows.

    Args:
        a, b: as stored: `[rank, in]` and `[out, rank]`, with further dimensions for a convolution.
        transposed: the change is `(B @ A).T`, as for an embedding, or a weight that is stored as `[in, out]`.
        expert: the part of one expert.
    """

    def __init__(
        self, a: StoredTensor, b: StoredTensor, *, transposed: bool = False, expert: ExpertPart | None = None
    ) -> None:
        self.a = a
        self.b = b
        self._transposed = transposed
        self._expert = expert

    def load(self) -> LoadedFactors:
        """Both matrices in memory, ready to be multiplied."""
        a, b = read_matrix(self.a), read_matrix(self.b)
        if self._expert is not None:
            part = self._expert
            rank = a.shape[0] // part.count
            a = a[part.number * rank : (part.number + 1) * rank]
            b = b[part.start : part.stop].reshape(part.stop - part.start, rank, part.count)[:, :, part.number]
        return LoadedFactors(a.T, b.T) if self._transposed else LoadedFactors(b, a)


class LoadedFactors:
    """`left @ right`, rows at a time; every row has the same bits whichever others it is asked for with."""

    def __init__(self, left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> None:
        rows, rank = left.shape
        self.columns = right.shape[1]
        width = max(_TILE_ROWS, _TILE_PRODUCTS // (_TILE_ROWS * max(1, rank)) // _TILE_ROWS * _TILE_ROWS)
        tiles = self.columns // width
        self._left = np.zeros((-(-rows // _TILE_ROWS) * _TILE_ROWS, rank), np.float32)
        self._left[:rows] = left
        whole = right[:, : tiles * width].reshape(rank, tiles, width)
        self._tiles = np.ascontiguousarray(whole.swapaxes(0, 1))
        self._rest = np.ascontiguousarray(right[:, tiles * width :])

    def product(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `[start:stop)`, a new array."""
        first, last = start // _TILE_ROWS * _TILE_ROWS, -(-stop // _TILE_ROWS) * _TILE_ROWS
        left = self._left[first:last].reshape(-1, _TILE_ROWS, self._left.shape[1])
        found = np.empty((last - first, self.columns), np.float32)
        tiles, _, width = self._tiles.shape
        if tiles:
            tiled = found[:, : tiles * width].reshape(-1, _TILE_ROWS, tiles, width).swapaxes(1, 2)
            np.matmul(left[:, None], self._tiles, out=tiled)
        if self._rest.size:
            np.matmul(left, self._rest, out=found[:, tiles * width :].reshape(len(left), _TILE_ROWS, -1))
        return found[start - first : stop - first]


@dataclass(frozen=True)
class LowRankChange:
    """What one adapter adds to one tensor.

    Attributes:
        factors: of the product.
        scale: alpha over the rank, or over its root.
        weight: how much of the whole change is added.
        load: the factors in memory; remembers the last few.
        magnitude: DoRA's lengths of the rows, or of the columns.
        of_columns: whether the magnitudes are those of the columns.
        weights: the tensor that is changed, for the norms of its columns.
    """

    factors: Factors
    scale: float
    weight: float
    load: Callable[[Factors], LoadedFactors]
    magnitude: StoredTensor | None = None
    of_columns: bool = False
    weights: StoredTensor | None = None
    _norms: list[npt.NDArray[np.float32]] = field(default_factory=list, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def added(self, rows: Floats, start: int) -> Floats:
        """What is to be added to `rows`, which are `[start:start + len(rows))` of the tensor."""
        product = self.load(self.factors).product(start, start + len(rows))
        if self.magnitude is None:
            product *= np.float32(self.scale * self.weight)
            return product
        product *= np.float32(self.scale)
        magnitude = read_matrix(self.magnitude).reshape(-1)
        if self.of_columns:
            factor = (magnitude / self._column_norms())[None, :]
        else:
            norms = np.linalg.norm(rows + product, axis=1)
            factor = (magnitude[start : start + len(rows)] / norms)[:, None]
        changed: Floats = (factor - 1) * rows + factor * product
        changed *= np.float32(self.weight)
        return changed

    def _column_norms(self) -> npt.NDArray[np.float32]:
        """Lengths of the columns of the changed tensor, from one pass over its rows, a block at a time."""
        assert self.weights is not None
        with self._lock:
            if not self._norms:
                loaded = self.load(self.factors)
                squares = np.zeros(loaded.columns, np.float64)
                for first, last in _blocks(self.weights.shape[0], loaded.columns):
                    rows = to_floats(self.weights.read_rows(first, last), self.weights.dtype)
                    changed = rows + np.float32(self.scale) * loaded.product(first, last)
                    squares += np.einsum("rc,rc->c", changed, changed, dtype=np.float64)
                self._norms.append(np.sqrt(squares).astype(np.float32))
            return self._norms[0]


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_WEIGHTS // max(1, columns))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


@dataclass(frozen=True)
class BiasChange:
    """What the bias of an adapter's second matrix adds to the bias of the layer."""

    bias: StoredTensor
    scale: float

    def added(self, rows: Floats, start: int) -> Floats:
        """What is to be added to `rows`, which are `[start:start + len(rows))` of the tensor."""
        added: Floats = read_matrix(self.bias)[start : start + len(rows)] * np.float32(self.scale)
        return added


@dataclass(frozen=True)
class ReplacedRows:
    """Single rows that an adapter holds whole: the embeddings of chosen tokens."""

    indices: tuple[int, ...]
    values: StoredTensor

    def replace(self, rows: Floats, start: int) -> None:
        """Put those that lie in `rows`, which are `[start:start + len(rows))` of the tensor."""
        for position, index in enumerate(self.indices):
            if start <= index < start + len(rows):
                rows[index - start] = to_floats(self.values.read_rows(position, position + 1), self.values.dtype)[0]


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A stored tensor with adapters laid over it: changed while it is read, and rounded once to `dtype`.

    Attributes:
        origin: what is read: the checkpoint's own tensor, or the whole one that an adapter holds instead.
        changes: are added to it.
        rows: are put in the place of its own.
        adapters: folders of the adapters, for messages.
    """

    origin: StoredTensor = field(kw_only=True)
    changes: tuple[LowRankChange | BiasChange, ...] = ()
    rows: ReplacedRows | None = None
    adapters: tuple[Path, ...] = ()

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """As `StoredTensor.read_rows`.

        Raises:
            InputError: the sum is NaN, or too large for `dtype`.
        """
        # A tensor of more than two dimensions may be asked for by rows of its last one.
        columns, own = math.prod(self.shape[1:]), math.prod(self.origin.shape[1:])
        if columns != own:
            first, last = start * columns // own, -(-stop * columns // own)
            found = self._changed(first, last).reshape(-1, columns)
            return found[start - first * own // columns :][: stop - start]
        return self._changed(start, stop)

    def _changed(self, start: int, stop: int) -> npt.NDArray[Any]:
        rows = to_floats(self.origin.read_rows(start, stop), self.origin.dtype)
        if is_noting():
            return to_stored(rows, self.dtype)
        with np.errstate(all="ignore"):  # what is no number is told below, with its place
            if self.changes:
                added = [change.added(rows, start) for change in self.changes]  # each to what is stored
                for change in added:
                    rows += change
            if self.rows is not None:
                self.rows.replace(rows, start)
            found = to_stored(rows, self.dtype)
        self._check_finite(found, rows, start)
        return found

    def _check_finite(self, found: npt.NDArray[Any], rows: Floats, start: int) -> None:
        exponent = _EXPONENTS.get(self.dtype)
        # by the bits, which costs less than widening
        bad = ~np.isfinite(found) if exponent is None else found.view(np.uint16) & exponent == exponent
        if bad.any():
            row, column = (int(at) for at in np.argwhere(bad)[0])
            value = rows[row, column]
            named = f"{shown(self.name)} at row {start + row}, column {column}"
            folders = " and ".join(map(str, self.adapters))
            if np.isfinite(value):
                raise InputError(
                    f"{folders} makes {named} {value:g}, which {self.dtype} cannot hold.",
                    "Give it less weight with --lora DIR=SCALE.",
                )
            raise InputError(
                f"{folders} makes {named} {value}.", "Adapter or checkpoint are damaged; take them from their origin."
            )
