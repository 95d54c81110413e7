"""`localmix.sizes`: bytes as people read them."""

from __future__ import annotations

import pytest

from localmix.sizes import GIB, size, size_unit


@pytest.mark.parametrize(
    ("count", "words"), [(26 * GIB, "26.00 GiB"), (GIB // 4, "0.25 GiB"), (2**23, "8.00 MiB"), (2048, "2.0 KiB")]
)
def test_sizes_name_their_unit(count: int, words: str) -> None:
    assert size(count) == words


def test_a_column_has_one_unit() -> None:
    assert size_unit([GIB, 100]) == (GIB, "GiB")
    assert size_unit([2**20, 100]) == (2**20, "MiB")
    assert size_unit([]) == (GIB, "GiB")
