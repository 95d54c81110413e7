"""Matrices of one type that ggml multiplies with a vector, one after another, as it does to generate a token.

There are enough of them that no cache holds them all: each is read from memory again, like a model's weights.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache

import numpy as np

from localmix.errors import CapacityError
from localmix.native.devices import cpu_buffer_type, processor_handle
from localmix.native.kernels import quantize_rows
from localmix.native.repacking import reordering_buffer_type
from localmix.native.tensors import InitParameters, Tensor, typed_ggml
from localmix.tensor_types import TensorType, row_bytes

COLUMNS, ROWS = 4096, 4096  # usual for a model of 7B
_DIFFERENT_ROWS = 64  # the others repeat them
_CONTEXT_BYTES = 1 << 20  # room for the heads of the tensors, and for a graph of `_MOST_MATRICES`
_MOST_MATRICES = 1024


class WeightRing:
    """A context manager that holds the matrices, in the order in which llama.cpp would keep them for the processor.

    Args:
        kind: one of `tensor_types.ENCODABLE`.
        least_bytes: of all matrices together.
        threads: for `turn`.

    Attributes:
        weights: of all matrices.

    Raises:
        CapacityError: there is no memory for them.
        InputError: llama.cpp cannot be loaded.
    """

    def __init__(self, kind: TensorType, least_bytes: int, threads: int) -> None:
        self.kind = kind
        self._matrix_bytes = row_bytes(kind, COLUMNS) * ROWS
        self._matrices = min(_MOST_MATRICES, max(2, -(-least_bytes // self._matrix_bytes)))
        self.weights = self._matrices * ROWS * COLUMNS
        self._threads = threads
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._backend: int | None = None

    def __enter__(self) -> WeightRing:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        base = _functions()
        for buffer in self._buffers:
            base.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            base.ggml_free(context)
        if self._backend:
            base.ggml_backend_free(self._backend)
        self._buffers, self._contexts, self._backend = [], [], None

    def turn(self) -> float:
        """Multiply every matrix with the vector once.

        Returns:
            Seconds for all of them.
        """
        start = time.perf_counter()
        status = _functions().ggml_backend_graph_compute(self._backend, self._graph)
        seconds = time.perf_counter() - start
        if status:
            raise CapacityError(f"ggml has no memory to multiply matrices of {self.kind.name}.")
        return seconds

    def _build(self) -> None:
        base = _functions()
        self._backend = base.ggml_backend_dev_init(processor_handle(), None)
        _set_threads()(self._backend, self._threads)
        # in contexts of their own, since each context's tensors go to one kind of memory
        heads = base.ggml_init(InitParameters(_CONTEXT_BYTES, None, True))
        steps = base.ggml_init(InitParameters(_CONTEXT_BYTES, None, True))
        self._contexts += [heads, steps]
        matrices = [base.ggml_new_tensor_3d(heads, self.kind, COLUMNS, ROWS, 1) for _ in range(self._matrices)]
        vector = base.ggml_new_tensor_3d(steps, TensorType.F32, COLUMNS, 1, 1)
        self._products = [base.ggml_mul_mat(steps, matrix, vector) for matrix in matrices]
        self._allocate(heads, reordering_buffer_type(self.kind, ROWS) or cpu_buffer_type())
        self._allocate(steps, cpu_buffer_type())
        random = np.random.default_rng(0)
        sample = random.standard_normal((_DIFFERENT_ROWS, COLUMNS), np.float32)
        rows = np.tile(quantize_rows(self.kind, sample, np.ones(COLUMNS, np.float32)), (ROWS // _DIFFERENT_ROWS, 1))
        for matrix in matrices:
            base.ggml_backend_tensor_set(matrix, rows.ctypes.data, 0, rows.nbytes)
        base.ggml_backend_tensor_set(vector, sample[0].ctypes.data, 0, sample[0].nbytes)
        self._graph = base.ggml_new_graph_custom(steps, _MOST_MATRICES, False)
        for product in self._products:
            base.ggml_build_forward_expand(self._graph, product)

    def _allocate(self, context: int, buffer_type: int) -> None:
        buffer = _functions().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            size = self._matrices * self._matrix_bytes
            raise CapacityError(f"There is no memory for {size >> 20} MiB of {self.kind.name}.")
        self._buffers.append(buffer)


@cache
def _functions() -> ctypes.CDLL:
    """libggml-base with the prototypes of what is called here too."""
    base = typed_ggml()
    pointer, size, tensor = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(Tensor)
    for name, result, arguments in (
        ("ggml_backend_dev_init", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_free", None, [pointer]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
        ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        ("ggml_backend_tensor_set", None, [tensor, pointer, size, size]),
        ("ggml_new_graph_custom", pointer, [pointer, size, ctypes.c_bool]),
        ("ggml_build_forward_expand", None, [pointer, tensor]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@cache
def _set_threads() -> ctypes._CFunctionType:
    """The processor back end's own function; it lies in a library that is chosen by the processor."""
    base = _functions()
    registry = base.ggml_backend_dev_backend_reg(processor_handle())
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)
