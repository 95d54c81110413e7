"""Record what ggml writes for each type on x86-64, in its own order of roundings: fixtures/lanes.json.

    python tests/conformance/record_lanes.py

Lanes must give these digests on every processor. The rows come from integers and exact products only, so that
they are the same everywhere; nothing in them overflows, because the sign of a NaN is the processor's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from localmix.native.kernels import quantize_rows, requires_importance
from localmix.native.lanes import chosen, kernel
from localmix.tensor_types import TensorType

FIXTURE = Path(__file__).with_name("fixtures") / "lanes.json"


def portable_rows() -> tuple[np.ndarray, np.ndarray]:
    """`[45, 1024]` of bell-shaped values, outliers and zeros among them, and an importance row."""
    random = np.random.default_rng(11)
    rows = random.integers(-(2**18), 2**18, (4, 45, 1024)).sum(0).astype(np.float32) * np.float32(2**-22)
    rows[5:10] *= np.float32(2**-40)
    rows[10:15, 7::97] *= np.float32(64)
    rows[15:20, ::3] = 0
    rows[20:25] = np.round(rows[20:25] * 16)
    rows[25, :] = 0
    rows[26, :] = 0.25
    importance = random.integers(0, 2**16, 1024).astype(np.float32) * np.float32(2**-14)
    importance[100:110] = 0
    return rows, importance


def digest(kind: TensorType, weighted: bool, kernels: str) -> str:
    """Of the bytes of the portable rows."""
    rows, importance = portable_rows()
    return hashlib.sha256(quantize_rows(kind, rows, importance if weighted else None, kernels).tobytes()).hexdigest()


def main() -> None:
    """Write the fixture."""
    found = {
        kind.name: [
            digest(kind, weighted, "ggml") if weighted or not requires_importance(kind) else None
            for weighted in (False, True)
        ]
        for kind in TensorType
        if kernel(kind, True, chosen())
    }
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
