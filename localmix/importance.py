"""The importance matrix (imatrix): how strongly each input column of a weight is driven, read and written.

Two formats: GGUF (`NAME.in_sum2` and `NAME.counts` for each weight) and the older `.dat`, which is read only.
Source of both layouts: llama.cpp, tools/imatrix and common/imatrix-loader.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType as ValueType

from localmix.errors import InputError
from localmix.gguf_format import MAGIC, MAX_NAME_BYTES, encode_header, padded, read_header
from localmix.output import write_atomically
from localmix.sources.base import TensorInfo, array, text, u32
from localmix.sources.legacy import place_in_stack
from localmix.sources.positional import PositionalFile
from localmix.tensor_types import TensorType

_SUMS, _COUNTS = ".in_sum2", ".counts"
# the matrix of a model of 10^12 weights takes 100 MB
MAX_BYTES = 1 << 32
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


@dataclass(frozen=True)
class Coverage:
    """How many tokens of the calibration text each expert saw.

    Attributes:
        tokens: by layer, one count for each expert; empty for a model without experts.
    """

    tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def least(self) -> tuple[int, int, int] | None:
        """Layer, expert and tokens of the one that saw the fewest; None without experts."""
        seen = [(count, layer, expert) for layer, counts in self.tokens.items() for expert, count in enumerate(counts)]
        if not seen:
            return None
        count, layer, expert = min(seen)
        return layer, expert, count

    @property
    def summary(self) -> str:
        """The least covered expert, for people; empty without experts."""
        if self.least is None:
            return ""
        layer, expert, tokens = self.least
        return f"the least used expert ({expert} of layer {layer}) saw {tokens:,} tokens"

    @property
    def unreached(self) -> tuple[tuple[int, int], ...]:
        """Layer and expert of those that saw nothing."""
        return tuple(
            (layer, expert)
            for layer, counts in self.tokens.items()
            for expert, count in enumerate(counts)
            if count == 0
        )


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

    @property
    def coverage(self) -> Coverage:
        """Tokens that each expert saw; all stacked weights of a layer see the same ones."""
        tokens: dict[int, tuple[int, ...]] = {}
        for name, entry in self.entries.items():
            match = re.match(r"blk\.(\d+)\..*_exps\.weight$", name)
            if match and len(entry.counts) > 1:
                tokens[int(match[1])] = tuple(int(count) for count in entry.counts)
        return Coverage(dict(sorted(tokens.items())))

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
        InputError: the file is broken, is no imatrix or far too large for one, or holds NaN or Inf.
        FileError: the file cannot be read.
    """
    file = PositionalFile(path)
    try:
        is_gguf = file.size >= len(MAGIC) and file.read(0, len(MAGIC)) == MAGIC
        importance = _load_gguf(file) if is_gguf else _load_legacy(file)
    finally:
        file.close()
    for name, entry in importance.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise InputError(f"{path} holds NaN or Inf for {name}.", "Make it again with `localmix imatrix`.")
        if (entry.counts < 0).any() or (entry.sums < 0).any():
            raise InputError(f"{path} holds negative sums for {name}, so it is no importance matrix.")
    return importance


def _no_imatrix(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is no importance matrix: {reason}.", "Make one with `localmix imatrix`.")


def _check_size(file: PositionalFile) -> None:
    if file.size > MAX_BYTES:
        raise _no_imatrix(file.path, f"it has {file.size / 2**30:,.0f} GiB, and {MAX_BYTES >> 30} are the most")


def _load_gguf(file: PositionalFile) -> Importance:
    path = file.path
    header = read_header(path)
    for tensor in header.tensors:
        if not tensor.info.name.endswith((_SUMS, _COUNTS)):
            raise _no_imatrix(path, f"it holds the tensor '{tensor.info.name}'")
        if tensor.info.type != TensorType.F32:
            raise _no_imatrix(path, f"'{tensor.info.name}' is {tensor.info.type.name}, not F32")
    _check_size(file)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in header.tensors:
        data = file.read(tensor.offset, tensor.bytes)
        found[tensor.info.name] = np.frombuffer(data, "<f4").reshape(-1, tensor.info.columns)
    entries: dict[str, Entry] = {}
    for name in sorted({key.removesuffix(_SUMS).removesuffix(_COUNTS) for key in found}):
        sums, counts = found.get(name + _SUMS), found.get(name + _COUNTS)
        if sums is None or counts is None or counts.size != sums.shape[0]:
            raise _no_imatrix(path, f"sums and counts of '{name}' do not belong together")
        entries[name] = Entry(sums, counts.reshape(-1))
    if not entries:
        raise _no_imatrix(path, "it is empty")
    metadata = {key: value.value for key, value in header.metadata.items()}
    datasets = metadata.get("imatrix.datasets", [])
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise _no_imatrix(path, "its entry imatrix.datasets is no list of names")
    return Importance(
        entries,
        tuple(datasets),
        _count(path, "imatrix.chunk_count", metadata.get("imatrix.chunk_count", 0)),
        _count(path, "imatrix.chunk_size", metadata.get("imatrix.chunk_size", 0)),
        path,
        {key: str(metadata[_ORIGIN + key]) for key in ("model", "corpus") if _ORIGIN + key in metadata},
    )


def _count(path: Path, what: str, value: Any) -> int:
    """A number of chunks or tokens from a file, which llama.cpp keeps in 32 bits."""
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise _no_imatrix(path, f"its entry {what} is {str(value)[:60]!r}, not a number from 0 to 2^31")
    return value


def _load_legacy(file: PositionalFile) -> Importance:
    """The `.dat` format: counted entries of (name, calls, values), then optionally chunks and a dataset."""
    _check_size(file)
    path, at = file.path, 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > file.size:
            raise _no_imatrix(path, "it is neither GGUF nor a whole file of the older format")
        at += count
        return file.read(at - count, count)

    def number() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    entries: dict[str, Entry] = {}
    for _ in range(number()):
        length = number()
        if length > MAX_NAME_BYTES:  # another kind of file, which may be a hundred gigabytes
            raise _no_imatrix(path, "it is neither GGUF nor a whole file of the older format")
        name = take(length).decode("utf-8", "replace")
        calls = number()
        sums = np.frombuffer(take(4 * number()), "<f4").reshape(1, -1)
        # the file holds sum / tokens * calls; calls of 0 stand for a plain sum
        entries[name] = Entry(sums, np.array([max(calls, 1)], np.float32))
    if not entries:
        raise _no_imatrix(path, "it is empty")
    chunks = _count(path, "chunks", number()) if file.size - at >= 4 else 0
    datasets = (take(number()).decode("utf-8", "replace"),) if file.size - at >= 4 else ()
    return Importance(_stack_experts(entries), datasets, chunks, 0, path)


def _stack_experts(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of single experts, as files of before April 2024 have them, put together where none is missing.

    An expert that no token reached has no entry there; how many there are is what the other layers say.
    """
    experts: dict[str, dict[int, Entry]] = {}
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        place = place_in_stack(name)
        if place is None:
            result[name] = entry
        else:
            experts.setdefault(place[0], {})[place[1]] = entry
    count = 1 + max((number for found in experts.values() for number in found), default=0)
    for name, found in experts.items():
        if len(found) == count:
            # each has a count of its own, of calls: means, as if of one call, leave nothing that looks like tokens
            means = [found[number].sums / found[number].counts for number in range(count)]
            result[name] = Entry(np.concatenate(means, axis=1), np.ones(1, np.float32))
    return result


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


def encode_importance(importance: Importance) -> bytes:
    """An imatrix file's bytes, which `llama-quantize` reads too."""
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
    return b"".join([encode_header(metadata, infos), *blobs])


def write_importance(path: Path, importance: Importance) -> None:
    """Write an imatrix file, which appears whole or not at all."""
    write_atomically(path, encode_importance(importance))
