"""A GGUF file, split or not, as a Source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.gguf_format import MAGIC, OLDEST_LOADED, VERSION, Header, StoredTensor, padded, read_header_of
from localmix.sources.base import MetaValue, Source, TensorInfo, text
from localmix.sources.documents import listed
from localmix.sources.joined import JoinedFile, find_pieces, next_piece
from localmix.sources.legacy import Stacked, recode, stack_experts
from localmix.sources.positional import PositionalFile
from localmix.tensor_types import FLOAT_TYPES, row_bytes

# llama.cpp, llama_split_path
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")

_PRE = "tokenizer.ggml.pre"

# What writers put behind the last tensor: less than one unit of the alignment that they use.
_MOST_PADDING = 1 << 16

_Part = PositionalFile | JoinedFile


class GGUFFile(Source):
    """Weights and metadata of a GGUF file; the parts of a split one are found beside the given part.

    What llama.cpp no longer reads is read here as what it would be today: tensors of single experts are stacked,
    pieces are joined, and version 1 is as good as 3.

    Args:
        path: the file, any part of a split one, or any piece of one that was cut.
        pre: llama.cpp's name for the way that the tokenizer splits, instead of what the file says.

    Attributes:
        repairs: what is done to the file that `localmix convert` would keep: what llama.cpp of today stumbles over.

    Raises:
        InputError: a part is broken, or parts are missing or contradict each other.
        FileError: a file cannot be opened.
    """

    def __init__(self, path: Path, *, pre: str | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.repairs: list[str] = []
        with ExitStack() as opened:
            self._parts = _open_parts(path, opened)
            headers = [_read_header(part) for part in self._parts]
            self.metadata: dict[str, MetaValue] = {
                key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")
            }
            architecture = self.metadata.get("general.architecture")
            if architecture is None or not isinstance(architecture.value, str):
                raise InputError(f"{path} names no architecture.", "Only GGUF files of models can be used here.")
            self._places: dict[str, tuple[_Part, StoredTensor]] = {}
            for part, header in zip(self._parts, headers, strict=True):
                for stored in header.tensors:
                    if stored.info.name in self._places:
                        raise InputError(f"Tensor '{stored.info.name}' stands in {part.path} and in an earlier part.")
                    self._places[stored.info.name] = part, stored
            self._stacks = self._stack()
            self.tensors: Sequence[TensorInfo] = [stack.info for stack in self._stacks.values()]
            self._note_age(headers, pre)
            opened.pop_all()

    def _stack(self) -> dict[str, Stacked]:
        infos = [stored.info for _, stored in self._places.values()]
        said = self.get("{arch}.expert_count")
        experts = said if type(said) is int and said > 0 else 0
        stacks = {stack.info.name: stack for stack in stack_experts(infos, experts, str(self.path))}
        joined = [stack for stack in stacks.values() if stack.sources != (stack.info.name,)]
        if joined:
            count = sum(len(stack.sources) for stack in joined)
            self.repairs.append("tensors of single experts are stacked")
            self.notes.append(f"{self.path}: {count} tensors of single experts are stacked into {len(joined)}.")
        recoded = {
            stack.info.name: [name for name in stack.sources if self._places[name][1].info.type != stack.info.type]
            for stack in joined
        }
        recoded = {name: sources for name, sources in recoded.items() if sources}
        if recoded:
            first = next(iter(recoded))
            kinds = sorted({self._places[name][1].info.type.name for name in recoded[first]})
            self.notes.append(
                f"{self.path}: experts of one layer have different types; {sum(map(len, recoded.values()))} of them"
                f" are written again in the richest one, such as {recoded[first][0]} from {', '.join(kinds)}"
                f" to {stacks[first].info.type.name}."
            )
        return stacks

    def _note_age(self, headers: Sequence[Header], pre: str | None) -> None:
        if any(isinstance(part, JoinedFile) for part in self._parts):
            self.repairs.append("pieces are joined")
            count = len(self.files())
            if count > 1:
                self.notes.append(f"{self._parts[0].path.name} is read from {count} pieces.")
        if headers[0].version < OLDEST_LOADED:
            self.repairs.append(f"GGUF version {headers[0].version} becomes {VERSION}")
            self.notes.append(f"{self.path} is of GGUF version {headers[0].version}, which llama.cpp no longer loads.")
        if pre:
            self.repairs.append("the pre-tokenizer is named")
            self.metadata[_PRE] = text(pre)
        elif self.get("tokenizer.ggml.model") == "gpt2" and _PRE not in self.metadata:
            self.notes.append(
                f"{self.path} does not say how its tokenizer splits words, as files of before May 2024:"
                " llama.cpp takes its default, and answers get worse. If you know the model's, give --pre NAME."
            )

    def read(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        size = row_bytes(tensor.type, tensor.columns)
        rows = np.empty((stop - start, size), np.uint8)
        stack = self._stacks[tensor.name]
        rows_of_source = tensor.rows // len(stack.sources)
        for number in range(start // rows_of_source, -(-stop // rows_of_source)):
            origin = number * rows_of_source
            first, last = max(start, origin), min(stop, origin + rows_of_source)
            self._read_source(stack.sources[number], tensor, first - origin, rows[first - start : last - start])
        return rows.view(FLOAT_TYPES.get(tensor.type, np.dtype(np.uint8)))

    def _read_source(self, name: str, tensor: TensorInfo, first: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` with rows of one stored tensor from `first` on, in the type of `tensor`."""
        part, stored = self._places[name]
        kind = stored.info.type
        if kind == tensor.type:
            part.read_into(stored.offset + first * target.shape[1], target.reshape(-1).data)
            return
        rows = np.empty((len(target), row_bytes(kind, tensor.columns)), np.uint8)
        part.read_into(stored.offset + first * rows.shape[1], rows.reshape(-1).data)
        target[:] = recode(rows, kind, tensor.type, tensor.columns)

    def files(self) -> Sequence[Path]:
        return [path for part in self._parts for path in (part.paths if isinstance(part, JoinedFile) else [part.path])]

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _open_parts(path: Path, opened: ExitStack) -> list[_Part]:
    pieces = find_pieces(path)
    parts: list[_Part] = []
    for part in [path] if pieces else _split_parts(path):
        parts.append(JoinedFile(pieces) if pieces else PositionalFile(part))
        opened.callback(parts[-1].close)
    return parts


def _read_header(part: _Part) -> Header:
    """The head of a part; of joined pieces also that they are as long together as it says.

    Raises:
        InputError: see `gguf_format`.
    """
    if not isinstance(part, JoinedFile):
        return read_header_of(part)
    found = ", ".join(path.name for path in part.paths)
    try:
        header = read_header_of(part)
    except InputError as error:
        begins = part.read(0, min(4, part.size)) == MAGIC
        neighbour = next_piece(part.paths[-1]) if begins else next_piece(part.paths[0], -1)
        raise InputError(error.message, f"These pieces are there: {found}. Is {neighbour} missing?") from error
    if part.size > padded(header.end, _MOST_PADDING):
        raise InputError(
            f"The pieces of {part.path} have {part.size:,} bytes together, and its head tells of {header.end:,}.",
            f"They do not belong together, or one is there twice: {found}.",
        )
    return header


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
            f"{path} is split into {count} parts, and these are missing: {listed(missing)}.",
            f"Put them into {path.parent}.",
        )
    return parts
