"""Overwrite weights of a model that is loaded: to see what it would say if they were others.

    with Model(path, placement=PROCESSOR, mmap=False, repack=False) as model:
        weights = LoadedWeights(model)
        weights.write("output.weight", 0, other_bytes)

llama.cpp has no function that names its tensors, but the eval callback sees each of them as a source of some node.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localmix.native.model import Context, Model
from localmix.native.tensors import EvalCallback, Tensor, typed_ggml
from localmix.tensor_types import TensorType, row_bytes

_CELLS = 256  # llama.cpp's smallest cache


@dataclass(frozen=True)
class _Place:
    """Where a weight lies.

    Attributes:
        address: of its first byte.
        bytes: of all its rows.
    """

    address: int
    bytes: int
    type: TensorType


class LoadedWeights:
    """The matrices that a model computes with, writable.

    Args:
        model: read into this process's own memory: without mmap, without repacking and without a GPU.

    Raises:
        InputError: llama.cpp cannot compute a token with this model.
    """

    def __init__(self, model: Model) -> None:
        self._places: dict[str, _Place] = {}
        callback = EvalCallback(self._look, lambda _: None)
        with Context(model, context_length=_CELLS, batch=1, micro_batch=1, threads=1, callback=callback) as context:
            context.decode([max(0, model.vocabulary.bos)], [0], logits=True)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def write(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes at an offset of a weight, as its type stores them.

        Raises:
            KeyError: the model does not compute with a weight of that name.
            ValueError: it is not so long.
        """
        place = self._places[name]
        if not 0 <= offset <= offset + data.nbytes <= place.bytes:
            raise ValueError(f"{data.nbytes} bytes at {offset} of the {place.bytes} of {name}")
        memory = (ctypes.c_uint8 * data.nbytes).from_address(place.address + offset)
        np.ctypeslib.as_array(memory)[:] = data.reshape(-1).view(np.uint8)

    def type_of(self, name: str) -> TensorType:
        """The type in which a weight is held."""
        return self._places[name].type

    def _look(self, node: Tensor) -> bool:
        """Remember the sources of a node that are weights: they have data, a name with a suffix, and no sources."""
        base = typed_ggml()
        for source in node.src:
            if not source:
                break
            tensor = source.contents
            if not tensor.data or not tensor.name.endswith(b".weight") or tensor.op != 0 or tensor.view_src:
                continue
            # a copy on another device is called DEVICE#NAME#0; what is written there the next token overwrites
            if b"#" in tensor.name or not base.ggml_backend_buffer_is_host(tensor.buffer):
                continue
            kind = TensorType(tensor.type)
            rows = int(np.prod(tensor.ne[1:]))
            place = _Place(tensor.data, rows * row_bytes(kind, int(tensor.ne[0])), kind)
            self._places[tensor.name.decode("utf-8", "replace")] = place
        return False
