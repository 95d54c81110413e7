"""Documents of `localmix ppl --json` read back, and what is said about others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localmix.errors import FileError, InputError
from localmix.measurement.divergence import Divergence
from localmix.presentation.published import find
from localmix.presentation.result_document import LARGEST, read_result


def document() -> dict[str, Any]:
    """A table as `ppl --json` writes it, shortened to two models."""
    row = {
        "model": "tinymix",
        "type": "Q8_0",
        "path": "/models/tinymix-Q8_0.gguf",
        "bytes": 6834496,
        "bpw": 8.5,
        "ppl": 1.7747,
        "error": 0.0367,
        "tokens": 2550,
        "chunks": 10,
        "divergence": {
            "mean": 0.00028,
            "error": 0.00003,
            "median": 0.00002,
            "percentile_99": 0.0026,
            "maximum": 0.059,
            "same_top": 1,
            "same_top_error": 0.0,
        },
        "origin": "measured",
        "is_reference": False,
        "corpus": "heldout.txt",
        "device_ms_per_token": {},
        "a field of a later version": [1],
    }
    failed = {**row, "type": "Q2_K", "ppl": None, "divergence": None, "failure": "a NaN"}
    return {
        "ctx": 512,
        "corpora": [{"name": "heldout.txt", "bytes": 183862, "sha256": "ca" * 32, "tokens": 2550, "chunks": 10}],
        "contexts": [512],
        "engine": "llama.cpp 0c1e57098",
        "threads": 1,
        "kv_type": "f16",
        "rope": None,
        "reference": "tinymix-BF16.gguf",
        "rows": [row, failed],
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    report = read_result(write(tmp_path, document()))
    assert report.title == "tinymix: what each type costs"
    first, second = report.rows
    assert first.path == Path("/models/tinymix-Q8_0.gguf")
    assert first.divergence == Divergence(0.00028, 0.00003, 0.00002, 0.0026, 0.059, 1.0, 0.0)
    assert second.failed and second.failure == "a NaN"
    assert report.provenance["Corpus"] == "heldout.txt"
    assert report.provenance["SHA-256"] == "ca" * 32
    assert report.provenance["Engine"] == "llama.cpp 0c1e57098"


def test_points_come_back_as_they_were(tmp_path: Path) -> None:
    content = document()
    del content["rows"]
    point = {"model": "tinymix", "type": "Q8_0", "context": 128, "paired": True, "ppl": 1.8, "error": 0.02}
    content["points"] = [point, {**point, "context": 256, "ppl": None, "error": None}]
    report = read_result(write(tmp_path, content))
    assert report.title == "tinymix: perplexity over context"
    assert [point.context for point in report.points] == [128, 256]
    assert math.isnan(report.points[1].ppl)
    assert report.points[0].paired is True


def test_published_rows_bring_their_notes(tmp_path: Path) -> None:
    content = document()
    assert read_result(write(tmp_path, content)).notes == []
    content["rows"].append({**content["rows"][0], "model": "Chinese-Mixtral", "origin": "published", "path": None})
    report = read_result(write(tmp_path, content))
    assert report.title == "tinymix: what each type costs"
    assert list(report.notes) == list(find("chinese-mixtral").about)
    assert "github.com" in report.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("rows"), "neither rows nor points"),
        (lambda d: d.update(rows={}), "rows is not what it should be"),
        (lambda d: d.update(rows=[1]), r"rows\[0\] is not"),
        (lambda d: d["rows"][1].pop("bytes"), r"rows\[1\] has no bytes"),
        (lambda d: d["rows"][0].update(bytes="x"), r"rows\[0\]\.bytes is not"),
        (lambda d: d["rows"][0].update(bytes=True), r"rows\[0\]\.bytes is not"),
        (lambda d: d["rows"][0]["divergence"].pop("mean"), r"rows\[0\]\.divergence has no mean"),
        (lambda d: d.pop("corpora"), "no corpora"),
        (lambda d: d["corpora"][0].update(sha256=5), r"corpora\[0\]\.sha256 is not"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    content = document()
    change(content)
    with pytest.raises(InputError, match=words):
        read_result(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b"[]", b"null"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no result of `localmix ppl`"):
        read_result(path)


def test_a_file_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(InputError, match="too large"):
        read_result(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Cannot read"):
        read_result(tmp_path / "none.json")
