"""What a model file holds, for people: metadata, types, tensors, chat template, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import FileError
from localmix.gguf_format import tensor_bytes
from localmix.sources.open import open_source

_BLOCK = 4 << 20
CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class TensorSummary:
    """One tensor; `shape` with the columns last, `bytes` as `type` takes them."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type."""

    type: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FileSummary:
    """One file with weights."""

    path: Path
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Inspection:
    """A model as it lies on disk.

    Attributes:
        bytes: of the weights.
        bpw: bits per weight, over all of them.
        files: name, size and, when asked for, sha256 of each file with weights.
    """

    path: Path
    architecture: str
    parameters: int
    bytes: int
    bpw: float
    metadata: dict[str, Any]
    types: tuple[TypeShare, ...]
    tensors: tuple[TensorSummary, ...]
    chat_template: str | None
    files: tuple[FileSummary, ...]
    notes: tuple[str, ...]


def inspect(path: Path, *, sha256: bool = False, progress: Callable[[int, int, str], None] | None = None) -> Inspection:
    """Look at a GGUF file or a checkpoint folder; weights are read for the checksums only.

    Args:
        sha256: compute the checksum of every file with weights.
        progress: called with (bytes done, bytes in all, file's name) while computing checksums.

    Raises:
        LocalmixError: see `sources.open`.
    """
    with open_source(path) as source:
        tensors = tuple(
            TensorSummary(tensor.name, tensor.shape, tensor.type.name, tensor_bytes(tensor))
            for tensor in source.tensors
        )
        kinds: dict[str, list[tuple[int, int]]] = {}
        for tensor, summary in zip(source.tensors, tensors, strict=True):
            kinds.setdefault(summary.type, []).append((tensor.elements, summary.bytes))
        types = tuple(
            TypeShare(kind, len(found), sum(count for count, _ in found), sum(size for _, size in found))
            for kind, found in sorted(kinds.items(), key=lambda item: -sum(size for _, size in item[1]))
        )
        weights = sum(kind.bytes for kind in types)
        return Inspection(
            path=path,
            architecture=source.architecture,
            parameters=source.parameters,
            bytes=weights,
            bpw=weights * 8 / max(1, source.parameters),
            metadata={key: value.value for key, value in source.metadata.items() if key != CHAT_TEMPLATE},
            types=types,
            tensors=tensors,
            chat_template=source.get(CHAT_TEMPLATE),
            files=_files(source.files(), sha256, progress),
            notes=tuple(source.notes),
        )


def _files(
    paths: Sequence[Path], sha256: bool, progress: Callable[[int, int, str], None] | None
) -> tuple[FileSummary, ...]:
    sizes = {path: path.stat().st_size for path in paths}
    total, done = sum(sizes.values()), 0
    summaries = []
    for path, size in sizes.items():
        checksum = None
        if sha256:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        done += len(block)
                        if progress is not None:
                            progress(done, total, path.name)
            except OSError as error:
                raise FileError(f"{path} cannot be read: {error.strerror}.") from error
            checksum = digest.hexdigest()
        summaries.append(FileSummary(path, size, checksum))
    return tuple(summaries)
