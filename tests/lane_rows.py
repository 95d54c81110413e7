"""Rows and importance rows on which lanes and ggml must agree: the usual, the extreme and the degenerate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from localmix.tensor_types import TensorType

Array = npt.NDArray[np.float32]


def rows(count: int, columns: int, seed: int = 0) -> Iterator[tuple[str, Array]]:
    """`(name, [count, columns])` for each kind of row; columns a multiple of 256, all values finite."""
    random = np.random.default_rng(seed)
    shape = (count, columns)
    normal = random.standard_normal(shape).astype(np.float32)
    heavy = random.standard_cauchy(shape)
    blocks = np.repeat(random.integers(-30, 20, (count, columns // 32)), 32, axis=1)
    signs = np.where(np.arange(columns) % 2, 1, -1)

    def outlier(rest: float, value: float) -> Array:
        found = rest * normal
        found[:, 5::256] = value
        return found

    cases = {
        "normal": 0.02 * normal,
        "uniform": random.uniform(-1, 1, shape),
        "all positive": abs(normal),
        "all negative": -abs(normal) - 1,
        "heavy-tailed": np.clip(heavy, -1e6, 1e6),
        "cubed heavy tails": np.clip(heavy**3, -1e30, 1e30),
        "zero": np.zeros(shape),
        "negative zero": -np.zeros(shape),
        "constant": np.repeat(normal[:, :1], columns, axis=1),
        "constant negative": np.repeat(-abs(normal[:, :1]), columns, axis=1),
        "denormal": 1e-40 * normal.astype(np.float64),
        "nearly denormal": 1e-36 * normal.astype(np.float64),
        "tiny": 1e-20 * normal,
        "at ggml's epsilon": 1e-15 * normal,
        "below half precision": 1e-7 * normal,
        "large": 1e6 * normal,
        "scale overflows half": 1e18 * normal,
        "huge": np.clip(1e38 * normal.astype(np.float64), -3.4e38, 3.4e38),
        "one outlier among zeros": outlier(0, 3),
        "one outlier": outlier(1e-3, -1e4),
        "alternating": np.broadcast_to(signs, shape),
        "alternating, scaled": signs * abs(normal[:, :1]),
        "small integers": np.round(3 * normal),
        "every block another scale": normal * 10.0**blocks,
        "sparse": np.where(random.random(shape) < 0.95, 0, normal),
    }
    for name, values in cases.items():
        yield name, np.ascontiguousarray(values, np.float32)


def importances(columns: int, seed: int = 0) -> Iterator[tuple[str, Array | None]]:
    """`(name, [columns])`; the first is None."""
    random = np.random.default_rng(seed)
    uniform = random.random(columns)
    yield "no importance", None
    cases = {
        "uniform": uniform + 0.1,
        "ones": np.ones(columns),
        "zero": np.zeros(columns),
        "half zero": np.where(random.random(columns) < 0.5, 0, uniform),
        "tiny": 1e-30 * uniform,
        "denormal": 1e-42 * uniform,
        "heavy-tailed": np.clip(uniform**-3.0, 0, 1e9),
        "huge": 1e36 * uniform,
    }
    for name, values in cases.items():
        yield name, values.astype(np.float32)


def ggml_takes(kind: TensorType, values: Array, importance: Array | None) -> bool:
    """Whether ggml quantizes this, certainly: on a grid it aborts the process when all distances overflow."""
    if not kind.name.startswith(("IQ1", "IQ2", "IQ3")):
        return True
    high = float(abs(values).max())
    weight = max(high, 1e-30) ** 2
    if importance is not None:
        weight = max(weight, 2 * high * float(importance.max()))
    return high < 1e17 and max(weight, 1) * high**2 < 1e36
