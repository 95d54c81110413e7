"""Matrices of one type that ggml multiplies with a vector, one after another, as it does to generate a token.

There are enough of them that no cache holds them all: each is read from memory again, like a model's weights.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache

import numpy as np
from numpy.typing import NDArray

from localmix.errors import CapacityError
from localmix.native.devices import cpu_buffer_type, processor_handle
from localmix.native.kernels import quantize_rows
from localmix.native.repacking import reordering_buffer_type
from localmix.native.tensors import InitParameters, Tensor, typed_ggml
from localmix.tensor_types import TensorType, row_bytes

COLUMNS, ROWS = 4096, 4096  # usual for a model of 7B
_DIFFERENT_ROWS = 64  # the others repeat them
_MOST_MATRICES = 1024
_CONTEXT_BYTES = _MOST_MATRICES << 12  # room for the heads of the tensors and the graphs
_GRAPH_NODES = 16  # a product and what it is made of
_SETTINGS_BYTES = 1 << 12  # more than ggml's struct for a pool of threads has


class WeightRing:
    """A context manager that holds the matrices, in the order in which llama.cpp would keep them for the processor.

    Args:
        kind: one of `tensor_types.ENCODABLE`.
        least_bytes: of all matrices together.
        threads: for `turn`.

    Attributes:
        matrices: how many there are, of `ROWS` × `COLUMNS`.

    Raises:
        CapacityError: there is no memory for them.
        InputError: llama.cpp cannot be loaded.
    """

    def __init__(self, kind: TensorType, least_bytes: int, threads: int) -> None:
        self.kind = kind
        self._matrix_bytes = row_bytes(kind, COLUMNS) * ROWS
        self.matrices = min(_MOST_MATRICES, max(2, -(-least_bytes // self._matrix_bytes)))
        self._threads = threads
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._backend: int | None = None
        self._pool: int | None = None

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
        if self._pool:
            _processor_function("ggml_threadpool_free", None, ctypes.c_void_p)(self._pool)
        self._buffers, self._contexts, self._backend, self._pool = [], [], None, None

    def turn(self) -> NDArray[np.float64]:
        """Multiply every matrix with the vector once.

        Returns:
            Seconds of each: what disturbs one of them leaves the others.

        Raises:
            CapacityError: ggml has no memory for it.
        """
        compute = _functions().ggml_backend_graph_compute
        seconds = np.empty(self.matrices)
        for index, graph in enumerate(self._graphs):
            start = time.perf_counter()
            status = compute(self._backend, graph)
            seconds[index] = time.perf_counter() - start
            if status:
                raise CapacityError(f"ggml has no memory to multiply matrices of {self.kind.name}.")
        return seconds

    def _build(self) -> None:
        base = _functions()
        self._backend = base.ggml_backend_dev_init(processor_handle(), None)
        pointer = ctypes.c_void_p
        _processor_function("ggml_backend_set_n_threads", None, pointer, ctypes.c_int)(self._backend, self._threads)
        # else a build without OpenMP starts its threads again for each product
        settings = ctypes.create_string_buffer(_SETTINGS_BYTES)
        base.ggml_threadpool_params_init(settings, self._threads)
        self._pool = _processor_function("ggml_threadpool_new", pointer, pointer)(settings)
        _processor_function("ggml_backend_cpu_set_threadpool", None, pointer, pointer)(self._backend, self._pool)
        # in contexts of their own, since each context's tensors go to one kind of memory
        heads = base.ggml_init(InitParameters(_CONTEXT_BYTES, None, True))
        steps = base.ggml_init(InitParameters(_CONTEXT_BYTES, None, True))
        self._contexts += [heads, steps]
        matrices = [base.ggml_new_tensor_3d(heads, self.kind, COLUMNS, ROWS, 1) for _ in range(self.matrices)]
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
        self._graphs = [base.ggml_new_graph_custom(steps, _GRAPH_NODES, False) for _ in matrices]
        for graph, product in zip(self._graphs, self._products, strict=True):
            base.ggml_build_forward_expand(graph, product)

    def _allocate(self, context: int, buffer_type: int) -> None:
        buffer = _functions().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            size = self.matrices * self._matrix_bytes
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
        ("ggml_threadpool_params_init", None, [pointer, ctypes.c_int]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@cache
def _processor_function(name: str, result: type | None, *arguments: type) -> ctypes._CFunctionType:
    """A function of the processor's back end, whose library is chosen by the processor."""
    base = _functions()
    registry = base.ggml_backend_dev_backend_reg(processor_handle())
    address = base.ggml_backend_reg_get_proc_address(registry, name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(address)
