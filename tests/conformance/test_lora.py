"""`merge` against PEFT's own `merge_and_unload`, for adapters of every kind.

What PEFT made is kept in fixtures/lora.json, recorded by record_lora.py; with peft installed it is also asked again,
for every value.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from localmix.merge import merge
from localmix.sources.adapter import Lora
from localmix.tensor_types import TensorType, widen
from tests.adapters import KINDS, read_checkpoint, write_pair
from tests.conformance.record_lora import FIXTURE, Values, merge_with_peft, sample

# In BF16 linear layers have the same bits. PEFT rounds the change of an embedding and of stacked experts before it is
# added. In F32 the two differ by the order in which products are added up.
_MOST_ULPS = {"BF16": 2, "F32": 16}


@cache
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return found


def merged(folder: Path, name: str, dtype: str) -> Values:
    base, adapter = write_pair(folder, name, dtype)
    merge(base, [Lora(adapter)], folder / "merged", threads=1)
    return {
        tensor: widen(values, TensorType[stored])
        for tensor, (stored, values) in read_checkpoint(folder / "merged").items()
    }


def ulps(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float64]:
    """Difference in units of the last place that `dtype` has at their size; at the tensor's mean size for less."""
    bits = {"BF16": 8, "F32": 24}[dtype]
    size = np.maximum(np.abs(theirs), np.abs(theirs).mean()).astype(np.float64)
    return np.abs(ours.astype(np.float64) - theirs) / 2.0 ** (np.floor(np.log2(size)) + 1 - bits)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", KINDS)
def test_same_as_recorded(tmp_path: Path, name: str, dtype: str) -> None:
    ours = merged(tmp_path, name, dtype)
    theirs = recorded()[name][dtype]
    assert {tensor: list(values.shape) for tensor, values in ours.items()} == {
        tensor: values["shape"] for tensor, values in theirs.items()
    }
    for tensor, values in ours.items():
        wanted = np.array(theirs[tensor]["samples"], np.float32)
        got = np.array(sample(values), np.float32)
        assert ulps(got, wanted, dtype).max() <= _MOST_ULPS[dtype], tensor


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", KINDS)
def test_same_as_peft(tmp_path: Path, name: str, dtype: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    ours = merged(tmp_path, name, dtype)
    theirs = merge_with_peft(tmp_path / "base", tmp_path / name, KINDS[name])
    differences = np.concatenate([ulps(ours[tensor], theirs[tensor], dtype).reshape(-1) for tensor in theirs])
    if os.environ.get("LOCALMIX_SHOW_ULPS"):
        print(f"{name} {dtype}: {differences.max():.2f} ulps, {(differences > 0.5).mean():.2%} differ")
    assert differences.max() <= _MOST_ULPS[dtype]
