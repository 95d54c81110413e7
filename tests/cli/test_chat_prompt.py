"""The chat's input line: what it keeps of what was typed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmix.cli.chat_prompt import _history


@pytest.mark.skipif(os.name == "nt", reason="limits on file sizes")
def test_a_full_disk_costs_the_history_of_later_runs_and_nothing_else(tmp_path: Path) -> None:
    import resource

    file = tmp_path / "chat_history"
    _history(file).append_string("first")
    written = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(written), hard))
    try:
        history = _history(file)
        history.append_string("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "second" in history.get_strings()
    assert file.read_bytes() == written


@pytest.mark.parametrize("place", ["file/chat_history", "folder"])
def test_a_history_that_cannot_be_kept(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    history = _history(tmp_path / place)
    history.append_string("typed")
    assert history.get_strings() == ["typed"]
