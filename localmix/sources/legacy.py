"""GGUF files of before April 2024: one tensor for each expert, which llama.cpp no longer loads, as stacked ones.

A stacked tensor holds its experts one after the other, and every row of a quantized tensor stands for itself, so
that stacking moves bytes and changes none. Only where experts of one layer have different types, as the mixtures of
those days gave them by chance, the poorer ones are written again in the richest type.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.sources.base import TensorInfo
from localmix.sources.documents import listed
from localmix.tensor_types import BLOCKS, FLOAT_TYPES, TensorType, widen

_OF_ONE_EXPERT = re.compile(r"(?P<head>blk\.\d+\.ffn_(?:gate|down|up))\.(?P<expert>\d{1,4})\.weight")

_MOST_NAMED = 8


@dataclass(frozen=True)
class Stacked:
    """A tensor, and the names under which it is stored: its own one, or those of its experts in order."""

    info: TensorInfo
    sources: tuple[str, ...]


def place_in_stack(name: str) -> tuple[str, int] | None:
    """The stacked tensor that one of a single expert is a part of, and the expert; None for any other tensor."""
    match = _OF_ONE_EXPERT.fullmatch(name)
    return (f"{match['head']}_exps.weight", int(match["expert"])) if match else None


def stack_experts(tensors: Sequence[TensorInfo], experts: int, subject: str) -> list[Stacked]:
    """The tensors of a file with those of single experts put together; a stack stands where its first expert stood.

    Args:
        experts: how many the metadata says there are; 0 when it says nothing.
        subject: the file, for messages.

    Raises:
        InputError: experts are missing, have different shapes, or stand there stacked too.
    """
    found: dict[str, dict[int, TensorInfo]] = {}
    for info in tensors:
        place = place_in_stack(info.name)
        if place:
            found.setdefault(place[0], {})[place[1]] = info
    count = experts or 1 + max((number for stack in found.values() for number in stack), default=0)
    _require_all(found, count, subject)
    stacks = {name: _stack(name, [of[number] for number in range(count)], subject) for name, of in found.items()}
    result: dict[str, Stacked] = {}
    for info in tensors:
        place = place_in_stack(info.name)
        name = place[0] if place else info.name
        if place is None and name in stacks:
            raise InputError(f"{subject} holds {name} as one tensor and as one for each expert.", _AGAIN)
        result.setdefault(name, stacks.get(name) or Stacked(info, (name,)))
    return list(result.values())


_AGAIN = "Download it again, or convert the checkpoint it came from."


def _require_all(found: Mapping[str, Mapping[int, TensorInfo]], count: int, subject: str) -> None:
    missing = count * len(found) - sum(number < count for of in found.values() for number in of)
    beyond = [info.name for of in found.values() for number, info in of.items() if number >= count]
    if missing:
        # a broken count must not be counted out
        every = ((name, number) for name, of in found.items() for number in range(count) if number not in of)
        first = [name.replace("_exps", f".{number}") for name, number in itertools.islice(every, _MOST_NAMED)]
        more = f" and {missing - len(first):,} more" if missing > len(first) else ""
        raise InputError(f"{subject}: experts are missing: {', '.join(first)}{more}.", _AGAIN)
    if beyond:
        raise InputError(f"{subject} has {count} experts, and holds {listed(beyond, _MOST_NAMED)} besides.", _AGAIN)


def _stack(name: str, experts: Sequence[TensorInfo], subject: str) -> Stacked:
    first = experts[0]
    for expert in experts:
        if expert.shape != first.shape or len(expert.shape) != 2:
            raise InputError(
                f"{subject}: {expert.name} has the shape {list(expert.shape)},"
                f" which cannot be stacked with {first.name} of {list(first.shape)}.",
                _AGAIN,
            )
    kind = common_type([expert.type for expert in experts])
    return Stacked(TensorInfo(name, (len(experts), *first.shape), kind), tuple(expert.name for expert in experts))


def common_type(kinds: Sequence[TensorType]) -> TensorType:
    """The type of a stack: the one that all have, else the richest that can be written without an imatrix."""
    if len(set(kinds)) == 1:
        return kinds[0]
    from localmix.native.kernels import requires_importance

    # of two types of one size the newer one
    richest = max(set(kinds), key=lambda kind: (BLOCKS[kind][1] / BLOCKS[kind][0], kind))
    return TensorType.Q8_0 if requires_importance(richest) else richest


def recode(rows: npt.NDArray[Any], stored: TensorType, wanted: TensorType, columns: int) -> npt.NDArray[Any]:
    """Rows of one type as rows of another: `[n, bytes of a row]` of uint8 in and out."""
    from localmix.native.kernels import dequantize_rows, quantize_rows

    if stored in FLOAT_TYPES:
        wide = np.ascontiguousarray(widen(rows.view(FLOAT_TYPES[stored]), stored))
    else:
        wide = dequantize_rows(stored, np.ascontiguousarray(rows), columns)
    if wanted == TensorType.F32:
        return wide.view(np.uint8)
    return quantize_rows(wanted, wide, None)
