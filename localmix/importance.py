"""The importance matrix (imatrix): how strongly each input column of a weight is driven, read and written.

Two formats: GGUF (`NAME.in_sum2` and `NAME.counts` for each weight) and the older `.dat`, which is read only.
Source of both layouts: llama.cpp, tools/imatrix and common/imatrix-loader.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType as ValueType

from localmix.errors import FileError, InputError
from localmix.gguf_format import MAGIC, encode_header, padded, read_header
from localmix.output import write_atomically
from localmix.sources.base import TensorInfo, array, text, u32
from localmix.sources.positional import PositionalFile
from localmix.tensor_types import TensorType

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ORIGIN = "localmix.imatrix."  # prefix of our own metadata, which other tools ignore


@dataclass(frozen=True)
class Entry:
    """What one weight has seen.

    Attributes:
        sums: float32 `[experts, columns]`, sum of squared inputs (one row for a weight without experts).
        counts: float32 `[experts]`, tokens that went into each row.
    """

    sums: npt.NDArray[np.float32]
    counts: npt.NDArray[np.float32]

    @property
    def uncovered(self) -> list[int]:
        """Experts that no token of the calibration text reached."""
        return [int(expert) for expert in np.flatnonzero(self.counts == 0)]


@dataclass(frozen=True)
class Importance:
    """An importance matrix as it is stored.

    Attributes:
        chunk_size: tokens of a chunk; 0 in the older format, which does not say.
        path: where it was read from.
        origin: checksums of what it was collected from, `model` and `corpus`; empty in other tools' files.
        fill_with_ones: what an expert that no token reached gets: ones, as llama.cpp gives it without a word,
            or the mean of the layer's other experts, which knows at least which columns carry the layer.
    """

    entries: Mapping[str, Entry]
    datasets: Sequence[str] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: Path = field(default_factory=Path)
    origin: Mapping[str, str] = field(default_factory=dict)
    fill_with_ones: bool = False

    def rows(self, tensor: TensorInfo) -> npt.NDArray[np.float32] | None:
        """Mean squared input of each column, float32 `[experts, columns]`; None for a tensor not covered.

        Raises:
            InputError: the entry has another size than the tensor, so it is of another model.
        """
        entry = self.entries.get(tensor.name)
        if entry is None:
            return None
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if entry.sums.size != experts * tensor.columns:
            raise InputError(
                f"{self.path} is the importance matrix of another model: {tensor.name} has"
                f" {experts} x {tensor.columns} columns here and {entry.sums.size} there.",
                "Make one for this model with `localmix imatrix`.",
            )
        counts = entry.counts[:, None]
        means = np.divide(entry.sums, counts, out=np.ones_like(entry.sums), where=counts > 0)
        covered = entry.counts > 0
        if not self.fill_with_ones and covered.any():
            means[~covered] = means[covered].mean(axis=0)
        return means.reshape(experts, tensor.columns)


def load_importance(path: Path) -> Importance:
    """Read an imatrix file of either format.

    Raises:
        InputError: the file is broken, is no imatrix, or holds NaN or Inf.
        FileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    importance = _load_gguf(path) if is_gguf else _load_legacy(path)
    for name, entry in importance.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise InputError(f"{path} holds NaN or Inf for {name}.", "Make it again with `localmix imatrix`.")
        if (entry.counts < 0).any() or (entry.sums < 0).any():
            raise InputError(f"{path} holds negative sums for {name}, so it is no importance matrix.")
    return importance


def _no_imatrix(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is no importance matrix: {reason}.", "Make one with `localmix imatrix`.")


def _load_gguf(path: Path) -> Importance:
    header = read_header(path)
    found: dict[str, npt.NDArray[np.float32]] = {}
    file = PositionalFile(path)
    try:
        for tensor in header.tensors:
            if not tensor.info.name.endswith((_SUMS, _COUNTS)):
                raise _no_imatrix(path, f"it holds the tensor '{tensor.info.name}'")
            if tensor.info.type != TensorType.F32:
                raise _no_imatrix(path, f"'{tensor.info.name}' is {tensor.info.type.name}, not F32")
            data = file.read(tensor.offset, tensor.bytes)
            found[tensor.info.name] = np.frombuffer(data, "<f4").reshape(-1, tensor.info.columns)
    finally:
        file.close()
    entries: dict[str, Entry] = {}
    for name in sorted({key.removesuffix(_SUMS).removesuffix(_COUNTS) for key in found}):
        sums, counts = found.get(name + _SUMS), found.get(name + _COUNTS)
        if sums is None or counts is None or counts.size != sums.shape[0]:
            raise _no_imatrix(path, f"sums and counts of '{name}' do not belong together")
        entries[name] = Entry(sums, counts.reshape(-1))
    if not entries:
        raise _no_imatrix(path, "it is empty")
    metadata = {key: value.value for key, value in header.metadata.items()}
    return Importance(
        entries,
        tuple(metadata.get("imatrix.datasets", ())),
        int(metadata.get("imatrix.chunk_count", 0)),
        int(metadata.get("imatrix.chunk_size", 0)),
        path,
        {key: str(metadata[_ORIGIN + key]) for key in ("model", "corpus") if _ORIGIN + key in metadata},
    )


def _load_legacy(path: Path) -> Importance:
    """The `.dat` format: counted entries of (name, calls, values), then optionally chunks and a dataset."""
    data = path.read_bytes()
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise _no_imatrix(path, "it is neither GGUF nor a whole file of the older format")
        at += count
        return data[at - count : at]

    def number() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    entries: dict[str, Entry] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        sums = np.frombuffer(take(4 * number()), "<f4").reshape(1, -1)
        # the file holds sum / tokens * calls; calls of 0 stand for a plain sum
        entries[name] = Entry(sums, np.array([max(calls, 1)], np.float32))
    if not entries:
        raise _no_imatrix(path, "it is empty")
    chunks = number() if len(data) - at >= 4 else 0
    datasets = (take(number()).decode("utf-8", "replace"),) if len(data) - at >= 4 else ()
    return Importance(entries, datasets, chunks, 0, path)


def merge_importance(parts: Sequence[Importance]) -> Importance:
    """One importance matrix that has seen the text of all parts: sums and counts add up.

    Raises:
        InputError: the parts are of different models, or only some are of the older format, whose numbers
            are means and carry no token counts.
    """
    first = parts[0]
    merged = dict(first.entries)
    for part in parts[1:]:
        if (part.chunk_size == 0) != (first.chunk_size == 0):
            raise InputError(
                f"{first.path} and {part.path} are of different formats, so their sums cannot be added.",
                "Make the older one again with `localmix imatrix`.",
            )
        for name, entry in part.entries.items():
            known = merged.get(name, Entry(np.zeros_like(entry.sums), np.zeros_like(entry.counts)))
            if known.sums.shape != entry.sums.shape:
                raise InputError(f"{first.path} and {part.path} are of different models: {name} differs in shape.")
            merged[name] = Entry(known.sums + entry.sums, known.counts + entry.counts)
    datasets = tuple(dict.fromkeys(name for part in parts for name in part.datasets))
    return Importance(merged, datasets, sum(part.chunk_count for part in parts), first.chunk_size)


def write_importance(path: Path, importance: Importance) -> None:
    """Write an imatrix file that `llama-quantize` reads too; the file appears whole or not at all."""
    metadata = {
        "general.type": text("imatrix"),
        "imatrix.datasets": array(ValueType.STRING, importance.datasets),
        "imatrix.chunk_count": u32(importance.chunk_count),
        "imatrix.chunk_size": u32(importance.chunk_size),
        **{_ORIGIN + key: text(value) for key, value in importance.origin.items()},
    }
    infos: list[TensorInfo] = []
    blobs: list[bytes] = []
    for name in sorted(importance.entries):
        entry = importance.entries[name]
        for suffix, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
            blob = np.ascontiguousarray(values, "<f4").tobytes()
            infos.append(TensorInfo(name + suffix, values.shape, TensorType.F32))
            blobs.append(blob + bytes(padded(len(blob)) - len(blob)))
    write_atomically(path, b"".join([encode_header(metadata, infos), *blobs]))
