"""The ring computes what it says: its products against the decoded matrix times the vector."""

from __future__ import annotations

import numpy as np
import pytest

from localmix.native.kernels import dequantize_rows, quantize_rows
from localmix.native.tensors import read
from localmix.native.weight_ring import COLUMNS, ROWS, WeightRing
from localmix.tensor_types import TensorType


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K", "Q2_K", "IQ3_S", "IQ4_NL"])
def test_products_are_those_of_the_matrix(kind: str) -> None:
    with WeightRing(TensorType[kind], 1, threads=1) as ring:
        assert ring.matrices == 2
        seconds = ring.turn()
        assert len(seconds) == 2 and (seconds > 0).all()
        found = [read(product.contents, np.float32).reshape(-1) for product in ring._products]
        sample = np.random.default_rng(0).standard_normal((64, COLUMNS), np.float32)
        encoded = quantize_rows(TensorType[kind], sample, np.ones(COLUMNS, np.float32))
        expected = np.tile(dequantize_rows(TensorType[kind], encoded, COLUMNS) @ sample[0], ROWS // 64)
        for values in found:
            # ggml rounds the vector to 8 bits; a sum of 4096 products of normal numbers is about 64
            assert np.abs(values - expected).max() < 2


def test_more_bytes_make_a_larger_ring() -> None:
    with WeightRing(TensorType.Q4_0, 40 << 20, threads=1) as ring:
        assert ring.matrices == len(ring._products) == 5  # of 9 MiB each
