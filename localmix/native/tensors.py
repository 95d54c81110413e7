"""Look at llama.cpp's tensors while a graph runs: a mirror of `ggml_tensor`, and the eval callback.

The mirror follows `struct ggml_tensor` of the pinned ggml.h; `operations` compares it with tensors that ggml
itself makes before anything relies on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

from localmix.errors import InputError
from localmix.native.library import api, ggml
from localmix.tensor_types import TensorType

MAX_DIMENSIONS, MAX_SOURCES, MAX_NAME, OP_PARAMETERS = 4, 10, 64, 16


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`; `ne` counts elements and `nb` bytes, both from the innermost dimension out."""

    type: int
    buffer: int | None
    ne: Any
    nb: Any
    op: int
    src: Any
    data: int | None
    name: bytes


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * MAX_DIMENSIONS),
    ("nb", ctypes.c_size_t * MAX_DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * OP_PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * MAX_SOURCES),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * MAX_NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@dataclass(frozen=True)
class Operations:
    """The numbers of `enum ggml_op` that are looked for in a graph."""

    mul_mat: int
    mul_mat_id: int


@cache
def typed_ggml() -> ctypes.CDLL:
    """libggml-base with the prototypes of what is called here."""
    base = ggml()
    tensor = ctypes.POINTER(Tensor)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParameters]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_3d", tensor, [pointer, ctypes.c_int, integer, integer, integer]),
        ("ggml_mul_mat", tensor, [pointer, tensor, tensor]),
        ("ggml_mul_mat_id", tensor, [pointer, tensor, tensor, tensor]),
        ("ggml_set_name", tensor, [tensor, ctypes.c_char_p]),
        ("ggml_get_name", pointer, [tensor]),
        ("ggml_get_data", pointer, [tensor]),
        ("ggml_backend_buffer_is_host", ctypes.c_bool, [pointer]),
        ("ggml_backend_tensor_get", None, [tensor, pointer, size, size]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@cache
def operations() -> Operations:
    """Check the mirror against tensors of ggml's own making, and learn two operation numbers from them.

    Raises:
        InputError: the struct of the loaded library has another layout.
    """
    base = typed_ggml()
    context = base.ggml_init(InitParameters(1 << 20, None, False))
    try:
        new = base.ggml_new_tensor_3d
        experts = new(context, TensorType.F16, 64, 5, 4)
        activations = new(context, TensorType.F32, 64, 2, 3)
        chosen = new(context, TensorType.I32, 2, 3, 1)
        plain = new(context, TensorType.F32, 64, 7, 1)
        base.ggml_set_name(experts, b"blk.0.ffn_up_exps.weight")
        routed = base.ggml_mul_mat_id(context, experts, activations, chosen)
        product = base.ggml_mul_mat(context, plain, plain)

        seen = experts.contents
        name_at = ctypes.addressof(seen) + Tensor.name.offset  # type: ignore[attr-defined]
        sources = [ctypes.addressof(routed.contents.src[index].contents) for index in range(3)]
        agrees = (
            seen.type == TensorType.F16
            and list(seen.ne) == [64, 5, 4, 1]
            and list(seen.nb) == [2, 128, 640, 2560]
            and seen.name == b"blk.0.ffn_up_exps.weight"
            and base.ggml_get_name(experts) == name_at
            and base.ggml_get_data(experts) == seen.data
            and sources == [ctypes.addressof(tensor.contents) for tensor in (experts, activations, chosen)]
            and not routed.contents.src[3]
            and list(routed.contents.ne) == [5, 2, 3, 1]
        )
        if not agrees:
            raise InputError(
                "The loaded llama.cpp lays out its tensors in another way than localmix expects.",
                "Install the pinned llama-cpp-python again with `make setup`.",
            )
        return Operations(mul_mat=product.contents.op, mul_mat_id=routed.contents.op)
    finally:
        base.ggml_free(context)


def read(tensor: Tensor, dtype: DTypeLike) -> NDArray[Any]:
    """The values of a tensor, its dimensions outermost first (the reverse of `ne`), strides as ggml has them.

    In host memory this is a view, valid only inside the callback; from a GPU it is a copy.

    Args:
        tensor: of a type with one element per block.
        dtype: its element type, float32 or int32.
    """
    base = typed_ggml()
    itemsize = np.dtype(dtype).itemsize
    shape = tensor.ne[::-1]
    strides = tensor.nb[::-1]
    span = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + itemsize
    if tensor.buffer and not base.ggml_backend_buffer_is_host(tensor.buffer):
        memory: Any = np.empty(span, np.uint8)
        # its end is checked against ggml_nbytes, which is this span
        base.ggml_backend_tensor_get(ctypes.byref(tensor), memory.ctypes.data, 0, span)
    else:
        assert tensor.data is not None
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(tensor.data))
    return as_strided(memory[:itemsize].view(dtype), shape, strides, writeable=False)


def weight_name(tensor: Tensor) -> str:
    """A weight's name without the device before it and the suffix after it: `CUDA0#NAME#0` is NAME."""
    name = tensor.name.decode("utf-8", "replace")
    parts = name.split("#")
    return parts[1] if len(parts) > 1 else name


class EvalCallback:
    """A pair of functions as llama.cpp's `cb_eval`, safe against exceptions.

    An exception cannot cross native code: it is kept, the graph is stopped, and `raise_kept` raises it after
    the decode.

    Args:
        wanted: asked for each node before it is computed: whether `computed` shall see it.
        computed: called with the node when its sources and its values are in memory.
    """

    def __init__(self, wanted: Callable[[Tensor], bool], computed: Callable[[Tensor], None]) -> None:
        self._kept: BaseException | None = None

        def receive(address: int, ask: bool, _: int | None) -> bool:
            if self._kept is not None:
                return ask  # have this node shown, and refuse it then: only that stops the graph
            try:
                tensor = Tensor.from_address(address)
                if ask:
                    return wanted(tensor)
                computed(tensor)
                return True
            except BaseException as error:
                self._kept = error
                return ask

        operations()
        self.pointer = api().ggml_backend_sched_eval_callback(receive)

    def raise_kept(self) -> None:
        """Raise the exception that a callback met, once; nothing otherwise."""
        error, self._kept = self._kept, None
        if error is not None:
            raise error
