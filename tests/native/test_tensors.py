"""The mirror of ggml_tensor and the eval callback, on a real graph."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from localmix.native.model import Context, Model
from localmix.native.tensors import EvalCallback, Tensor, operations, read, weight_name


def test_operations_are_two_numbers() -> None:
    found = operations()
    assert 0 < found.mul_mat < found.mul_mat_id


def test_the_callback_sees_what_the_products_read(random_model: Path) -> None:
    """The routing matmul's output must be what numpy computes from its sources."""
    checked: list[str] = []

    def wanted(tensor: Tensor) -> bool:
        return tensor.op == operations().mul_mat and b"ffn_gate_inp" in tensor.src[0].contents.name

    def computed(tensor: Tensor) -> None:
        weights = read(tensor.src[0].contents, np.float32)[0, 0]
        activations = read(tensor.src[1].contents, np.float32)[0, 0]
        result = read(tensor, np.float32)[0, 0]
        assert result.shape == (40, 8)
        assert np.allclose(activations @ weights.T, result, atol=0.02)
        checked.append(weight_name(tensor.src[0].contents))

    callback = EvalCallback(wanted, computed)
    with Model(random_model) as model, Context(model, context_length=256, callback=callback) as context:
        context.decode(np.arange(20, 60), np.arange(40), 0, True)
    assert checked == ["blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"]


@pytest.mark.parametrize("place", ["wanted", "computed"])
def test_an_exception_stops_the_graph_and_comes_out_of_decode(random_model: Path, place: str) -> None:
    calls = {"wanted": 0, "computed": 0}

    def count(name: str) -> None:
        calls[name] += 1
        if name == place and calls[name] == 5:
            raise ZeroDivisionError

    def wanted(_: Tensor) -> bool:
        count("wanted")
        return True

    callback = EvalCallback(wanted, lambda _: count("computed"))
    with Model(random_model) as model, Context(model, context_length=256, callback=callback) as context:
        with pytest.raises(ZeroDivisionError):
            context.decode([5, 6], [0, 1])
        assert calls[place] == 5
        context.clear()
        context.decode([5, 6], [0, 1])  # and the context lives on
    assert calls[place] > 20


def test_read_follows_strides() -> None:
    values = np.arange(24, dtype=np.int32)
    tensor = Tensor()
    tensor.type = 26
    tensor.ne[:] = [3, 2, 1, 1]
    tensor.nb[:] = [4, 40, 96, 96]
    tensor.data = values.ctypes.data
    assert read(tensor, np.int32)[0, 0].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert ctypes.sizeof(Tensor) % 16 == 0


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "CUDA0#blk.0.attn_k.weight#0", "x#blk.0.attn_k.weight"])
def test_weight_names(name: str) -> None:
    tensor = Tensor()
    tensor.name = name.encode()
    assert weight_name(tensor) == "blk.0.attn_k.weight"
