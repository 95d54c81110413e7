from __future__ import annotations

from pathlib import Path

import pytest

from localmix.errors import InputError
from localmix.sources.documents import listed, parse_json, read_object, read_optional_object, shown


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "names 'b' twice"),
        (b"", "is not valid JSON"),
    ],
)
def test_broken_documents(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_json(data, "x.json", unique_keys=True)


def test_byte_order_mark_is_tolerated_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(InputError):
        parse_json(path.read_bytes(), "header", encoding="utf-8")


def test_only_objects(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match="holds list, not a JSON object"):
        read_object(path)
    assert read_optional_object(tmp_path / "absent.json") == {}


def test_foreign_strings_are_inert_in_messages() -> None:
    assert shown("a\x1b[2Jb") == r"'a\x1b[2Jb'"
    assert shown("\ud800") == r"'\ud800'"
    assert len(shown("x" * 10_000)) < 100
    assert shown(None) == "None"
    assert shown([1, "\u202e"]) == r"[1, '\u202e']"
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert "too large" in shown(deep)
    assert listed(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
