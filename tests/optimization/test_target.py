from __future__ import annotations

import pytest

from localmix.errors import UsageError
from localmix.optimization.target import parse_target


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("12GiB", "12.0GiB", 12 * 2**30),
        ("12gib", "12.0GiB", 12 * 2**30),
        ("11.25 GB", "11.25GB", 11_250_000_000),
        ("2799104B", "2799104B", 2_799_104),
        ("12G", "12.0GB", 12 * 10**9),
        ("500.10MiB", "500.1MiB", int(500.1 * 2**20)),
    ],
)
def test_sizes(text: str, name: str, size: int) -> None:
    target = parse_target(text)
    assert (target.name, target.bytes, target.bits) == (name, size, None)
    assert target.limit(123) == size
    assert parse_target(target.name) == target


@pytest.mark.parametrize(("text", "name", "bits"), [("3.5bpw", "3.50bpw", 3.5), ("4BPW", "4.00bpw", 4.0)])
def test_bits_of_a_weight(text: str, name: str, bits: float) -> None:
    target = parse_target(text)
    assert (target.name, target.bytes, target.bits) == (name, None, bits)
    assert target.limit(800) == int(bits * 100)
    assert parse_target(target.name) == target


@pytest.mark.parametrize(
    "text", ["", "12", "GiB", "0GiB", "-3bpw", "3.5 bits", "1e3GB", "nanbpw", "Q4_K", "1" * 99 + "B"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no target"):
        parse_target(text)
