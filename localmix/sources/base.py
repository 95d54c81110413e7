"""Source: metadata and an ordered list of tensors whose rows can be read in any order, from any thread."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt
from gguf.constants import GGUFValueType as ValueType

from localmix.errors import InputError
from localmix.tensor_types import TensorType


@dataclass(frozen=True)
class MetaValue:
    """One GGUF metadata value with its type on disk; `item_type` is set for arrays only."""

    type: ValueType
    value: Any
    item_type: ValueType | None = None


def u32(value: int) -> MetaValue:
    """An unsigned 32-bit metadata value."""
    return MetaValue(ValueType.UINT32, int(value))


def f32(value: float) -> MetaValue:
    """A 32-bit float metadata value."""
    return MetaValue(ValueType.FLOAT32, float(value))


def boolean(value: bool) -> MetaValue:
    """A boolean metadata value."""
    return MetaValue(ValueType.BOOL, bool(value))


def text(value: str) -> MetaValue:
    """A UTF-8 string metadata value."""
    return MetaValue(ValueType.STRING, value)


def array(item_type: ValueType, values: Iterable[Any]) -> MetaValue:
    """A metadata array of one item type."""
    return MetaValue(ValueType.ARRAY, list(values), item_type)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the GGUF file will name and shape it.

    `shape` is in numpy order (slowest dimension first, columns last), the reverse of ggml's `ne`.
    `type` is what `Source.read` returns, not necessarily what lies on disk: a checkpoint's norms
    and routers are handed out as F32 because every GGUF keeps them so.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def columns(self) -> int:
        """Length of one row, the unit that is quantized."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows over all leading dimensions: a stacked expert tensor `[E, R, C]` has `E * R`."""
        return math.prod(self.shape[:-1])

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Source(ABC):
    """Metadata and tensors of one model, readable slice by slice.

    Attributes:
        path: the folder or file the model came from, for messages.
        metadata: GGUF key-values in the order they are written; `general.architecture` is first.
        tensors: in the order they are written.
        notes: sentences the user should see (padded vocabulary, dropped tensors).
        recipe: what the weights depend on besides the files that hold them: the scales of merged adapters.
    """

    path: Path
    metadata: dict[str, MetaValue]
    tensors: Sequence[TensorInfo]
    notes: list[str]
    recipe: str = ""

    @abstractmethod
    def read(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `[start:stop)` as an array `[stop - start, columns]` of `FLOAT_TYPES[tensor.type]`.

        For a quantized GGUF tensor: an array of bytes, `[stop - start, bytes of a row]`.
        Safe to call from several threads at once; holds no more than the slice.

        Raises:
            InputError: the file ends early or changed since it was opened.
        """

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that hold weights, so that a run can refuse to write over them and detect change."""

    def check_unchanged(self) -> None:  # noqa: B027 (a source without weights has nothing to check)
        """Check that no file of weights was written to since it was opened.

        Raises:
            InputError: one was; what was read is a mixture of two models.
        """

    def close(self) -> None:  # noqa: B027 (nor to close)
        """Close what is open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as `llama`."""
        return str(self.metadata["general.architecture"].value)

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key stands for the architecture."""
        found = self.metadata.get(key.replace("{arch}", self.architecture))
        return default if found is None else found.value

    def numbers(self, key: str, default: Sequence[int] = (0,)) -> Sequence[int]:
        """A metadata entry that is one number, or one for each layer; at least one.

        Raises:
            InputError: it is something else, or a number is negative.
        """
        value = self.get(key)
        if value is None:
            return default
        found = value if isinstance(value, list) else [value]
        if not found or any(type(number) is not int or number < 0 for number in found):  # a bool is no number
            raise self._wrong_kind(key, value, "not a number, or one for each layer")
        return found

    def number(self, key: str, default: int = 0) -> int:
        """A metadata entry that is one number.

        Raises:
            InputError: it is something else, or negative.
        """
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise self._wrong_kind(key, value, "not a number")
        return value

    @property
    def generates(self) -> bool:
        """Whether it predicts a next token; one whose tokens see those after them, such as BERT, does not."""
        return self.get("{arch}.attention.causal") is not False

    def require_generation(self) -> None:
        """Raise InputError for a model that predicts no next token."""
        if not self.generates:
            raise InputError(
                f"{self.path} is a {self.architecture} model: it sees a text as a whole, as embedding models do, and "
                "predicts no next token.",
                "Name a model that writes text.",
            )

    def _wrong_kind(self, key: str, value: Any, wanted: str) -> InputError:
        shown = repr(value) if len(repr(value)) < 60 else repr(value)[:60] + "…"
        return InputError(
            f"{self.path}: the metadata entry {key.replace('{arch}', self.architecture)} is {shown}, {wanted}.",
            "Download the model again, or set the entry with `localmix quantize COPY --override-kv`.",
        )


@dataclass
class ShapeOnlySource(Source):
    """A model without weights, from `config.json` alone: can be planned, not read."""

    path: Path
    metadata: dict[str, MetaValue]
    tensors: Sequence[TensorInfo]
    notes: list[str] = field(default_factory=list)

    def read(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        raise InputError(
            f"{self.path} has no weights; it can only be planned.", "Put its .safetensors files beside config.json."
        )

    def files(self) -> Sequence[Path]:
        return ()
