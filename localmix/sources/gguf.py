"""A GGUF file, split or not, as a Source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.gguf_format import StoredTensor, read_header
from localmix.sources.base import MetaValue, Source, TensorInfo
from localmix.sources.positional import PositionalFile
from localmix.tensor_types import FLOAT_TYPES, row_bytes

# llama.cpp, llama_split_path
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


class GGUFFile(Source):
    """Weights and metadata of a GGUF file; the parts of a split one are found beside the given part.

    Args:
        path: the file, or any part of a split one.

    Raises:
        InputError: a part is broken, or parts are missing or contradict each other.
        FileError: a file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        paths = _split_parts(path)
        headers = [read_header(part) for part in paths]
        self.metadata: dict[str, MetaValue] = {
            key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")
        }
        architecture = self.metadata.get("general.architecture")
        if architecture is None or not isinstance(architecture.value, str):
            raise InputError(f"{path} names no architecture.", "Only GGUF files of models can be used here.")
        self._parts = [PositionalFile(part) for part in paths]
        self._places: dict[str, tuple[PositionalFile, StoredTensor]] = {}
        for part, header in zip(self._parts, headers, strict=True):
            for stored in header.tensors:
                if stored.info.name in self._places:
                    raise InputError(f"Tensor '{stored.info.name}' stands in {part.path} and in an earlier part.")
                self._places[stored.info.name] = part, stored
        self.tensors: Sequence[TensorInfo] = [stored.info for _, stored in self._places.values()]

    def read(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        part, stored = self._places[tensor.name]
        size = row_bytes(tensor.type, tensor.columns)
        rows = np.empty((stop - start, size), np.uint8)
        part.read_into(stored.offset + start * size, rows.reshape(-1).data)
        return rows.view(FLOAT_TYPES.get(tensor.type, np.dtype(np.uint8)))

    def files(self) -> Sequence[Path]:
        return [part.path for part in self._parts]

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _split_parts(path: Path) -> list[Path]:
    """All parts of a split file, or the file itself."""
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise InputError(
            f"{path} is split into {count} parts, and these are missing: {', '.join(missing)}.",
            f"Put them into {path.parent}.",
        )
    return parts
