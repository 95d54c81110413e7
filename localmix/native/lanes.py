"""The lane kernels (docs/kernels.md): ggml's quantization, one block in each SIMD lane, with ggml's own bytes.
Beside them a function that reduces rows of logits to likelihoods and divergences.

The library is optional. Where it was not built, where the processor is unknown or a type has no kernel,
`kernel` answers None and ggml does the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.native.library import ggml
from localmix.tensor_types import TensorType

# Built beside the sources: by the wheel into the package, by an editable install into the checkout.
LIBRARY = Path(__file__).with_name("lanes") / "localmix_lanes.so"

# LOCALMIX_KERNELS: `ggml` switches the lanes off, the name of an instruction set asks for that one.
SWITCH = "LOCALMIX_KERNELS"

_QUANTIZE = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
)
_LIKELIHOODS = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)

# The I-quants that stand on a grid, and the number of theirs (GridName in grids.h).
_GRIDS = {
    TensorType.IQ2_XXS: 0,
    TensorType.IQ2_XS: 1,
    TensorType.IQ2_S: 2,
    TensorType.IQ1_S: 3,
    TensorType.IQ1_M: 3,
    TensorType.IQ3_XXS: 4,
    TensorType.IQ3_S: 5,
}
_grid_lock = threading.Lock()


@dataclass(frozen=True)
class Kernels:
    """Which kernels quantize here, for `localmix doctor`.

    Attributes:
        name: `ggml`, or the instruction set of the lanes.
        reason: why it is ggml; empty otherwise.
        types: what the lanes quantize, with or without an importance row; the others go to ggml.
    """

    name: str
    reason: str
    types: tuple[str, ...]

    @property
    def description(self) -> str:
        """One line for people."""
        if self.reason:
            return f"ggml's own, the slower ones: {self.reason}"
        return f"lanes for {self.name}: {', '.join(self.types)}; ggml's for other types"


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        lanes = ctypes.CDLL(os.fspath(LIBRARY))
        lanes.localmix_isa.restype = ctypes.c_char_p
        lanes.localmix_kernel.restype = ctypes.c_void_p
        lanes.localmix_reference_calls.restype = ctypes.c_int64
        lanes.localmix_set_reference.argtypes = [ctypes.c_void_p]
        lanes.localmix_set_reference.restype = None
        lanes.localmix_set_grid.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    lanes.localmix_set_reference(ctypes.cast(ggml().ggml_quantize_chunk, ctypes.c_void_p))
    return lanes


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that are compiled in and that this processor runs, the widest last."""
    lanes = _library()
    if lanes is None:
        return ()
    names = []
    index = 0
    while name := lanes.localmix_isa(index):
        if lanes.localmix_isa_runs(index):
            names.append(name.decode())
        index += 1
    return tuple(names)


def chosen() -> str:
    """The instruction set that quantizes here, or `ggml`."""
    wish = os.environ.get(SWITCH, "").strip().lower()
    found = instruction_sets()
    if wish:
        return wish if wish in found else "ggml"
    return found[-1] if found else "ggml"


def _index(instruction_set: str) -> int:
    """The library's number of one of `instruction_sets()`."""
    lanes, index = _library(), 0
    while lanes is not None and lanes.localmix_isa(index).decode() != instruction_set:
        index += 1
    return index


def _grid_points(kind: TensorType) -> npt.NDArray[np.uint16]:
    """A type's grid as gguf-py decodes it, each point a word of levels, the first lowest."""
    # For its tables only, which no other command needs.
    from gguf import quants

    quant = getattr(quants, kind.name)
    quant.init_grid()
    levels = np.searchsorted(quant.grid_map, quant.grid.reshape(quant.grid_shape))
    # Eight levels of two bits, or four of three.
    bits = {8: 2, 4: 3}[levels.shape[1]]
    return np.asarray((levels << bits * np.arange(levels.shape[1])).sum(1), np.uint16)


def _has_its_grid(lanes: ctypes.CDLL, kind: TensorType) -> bool:
    if kind not in _GRIDS:
        return True
    with _grid_lock:
        points = _grid_points(kind)
        return bool(lanes.localmix_set_grid(_GRIDS[kind], points.ctypes.data, points.size))


@functools.cache
def kernel(kind: TensorType, weighted: bool, instruction_set: str) -> Any:
    """A function with the signature of ggml's `quantize_*` (ggml-quants.h), or None where ggml has to do it.

    Args:
        weighted: whether an importance row will be given.
        instruction_set: one of `instruction_sets()`; any other gives None.
    """
    lanes = _library()
    if lanes is None or instruction_set not in instruction_sets():
        return None
    address = lanes.localmix_kernel(_index(instruction_set), int(kind), int(weighted))
    return _QUANTIZE(address) if address and _has_its_grid(lanes, kind) else None


@functools.cache
def likelihoods(instruction_set: str) -> Any:
    """The function that reduces rows of logits (likelihood.h), or None where numpy has to do it."""
    lanes = _library()
    if lanes is None or instruction_set not in instruction_sets():
        return None
    lanes.localmix_likelihoods.restype = ctypes.c_void_p
    address = lanes.localmix_likelihoods(_index(instruction_set))
    return _LIKELIHOODS(address) if address else None


def reference_calls() -> int:
    """How many pieces of rows the lanes have handed to ggml because they could not give equal bytes."""
    lanes = _library()
    return 0 if lanes is None else int(lanes.localmix_reference_calls())


def kernels() -> Kernels:
    """Which kernels quantize here, and why."""
    name = chosen()
    if name == "ggml":
        if wish := os.environ.get(SWITCH):
            reason = f"{SWITCH} asks for {wish}" + (", which does not run here" if wish.lower() != "ggml" else "")
        elif not LIBRARY.is_file():
            reason = "the lane kernels were not built: no C++ compiler when localmix was installed"
        else:
            reason = f"{LIBRARY.name} cannot be loaded here"
        return Kernels(name, reason, ())
    types = tuple(kind.name for kind in TensorType if kernel(kind, False, name) or kernel(kind, True, name))
    return Kernels(name, "", types)
