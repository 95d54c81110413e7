"""Which weights llama.cpp reorders for the processor: those it copies into memory of their own.

Weights stay mapped from the file, and the system can drop and read them again, unless a kernel of this processor
wants them in another order (`Model(repack=True)`). Then they are copied, and the copy is anonymous memory.
"""

from __future__ import annotations

import ctypes
from functools import cache

from localmix.native.devices import processor_handle
from localmix.native.tensors import InitParameters, Tensor, typed_ggml
from localmix.tensor_types import TensorType

_CONTEXT_BYTES = 1 << 16  # room for the heads of a few tensors
_COLUMNS = 256  # what a kernel wants does not depend on the columns, and every block divides these


def is_repacked(kind: TensorType, rows: int, experts: int = 0) -> bool:
    """Whether this processor takes a matrix in another order than the file's.

    Asks as llama.cpp does when it places a weight (`select_weight_buft` in llama-model-loader.cpp).

    Args:
        rows: of the matrix, or of each expert's.
        experts: matrices stacked in one tensor; 0 for a plain matrix.

    Raises:
        InputError: llama.cpp cannot be loaded.
    """
    return reordering_buffer_type(kind, rows, experts) is not None


@cache
def reordering_buffer_type(kind: TensorType, rows: int, experts: int = 0) -> int | None:
    """The `ggml_backend_buffer_type_t` whose memory holds such a matrix in another order; None if it stays as it is.

    Args, Raises:
        As `is_repacked`.
    """
    return next((found for found in _extra_buffer_types() if _takes(found, kind, rows, experts)), None)


@cache
def _extra_buffer_types() -> list[int]:
    """The `ggml_backend_buffer_type_t` of each order that the processor's kernels know."""
    base = _functions()
    registry = base.ggml_backend_dev_backend_reg(processor_handle())
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    found = list_types(processor_handle())
    types: list[int] = []
    while found and found[len(types)]:
        types.append(found[len(types)])
    return types


def _takes(buffer_type: int, kind: TensorType, rows: int, experts: int) -> bool:
    base = _functions()
    context = base.ggml_init(InitParameters(_CONTEXT_BYTES, None, True))
    buffer = base.ggml_backend_buft_alloc_buffer(buffer_type, 0)
    try:
        new = base.ggml_new_tensor_3d
        weight = new(context, kind, _COLUMNS, rows, experts or 1)
        if experts:
            activations = new(context, TensorType.F32, _COLUMNS, 2, 512)
            chosen = new(context, TensorType.I32, 2, 512, 1)
            product = base.ggml_mul_mat_id(context, weight, activations, chosen)
        else:
            activations = new(context, TensorType.F32, _COLUMNS, 512, 1)
            product = base.ggml_mul_mat(context, weight, activations)
        weight.contents.buffer = buffer
        return bool(base.ggml_backend_dev_supports_op(processor_handle(), product))
    finally:
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)


@cache
def _functions() -> ctypes.CDLL:
    """libggml-base with the prototypes of what is called here too."""
    base = typed_ggml()
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_buft_alloc_buffer", pointer, [pointer, ctypes.c_size_t]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_dev_supports_op", ctypes.c_bool, [pointer, ctypes.POINTER(Tensor)]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base
