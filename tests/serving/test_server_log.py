"""The log of `localmix serve`: private, bounded, and with no line that a client made up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from localmix.serving import server_log
from localmix.serving.gateway import Access
from localmix.serving.server_log import ServerLog

ACCESS = Access("127.0.0.1", "POST", "/v1/x\n2026 forged", 200, 12.3, 40, 50, "m:Q4_K_M", "done")


def test_lines_for_people(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "deep" / "serve.log")
    log.line("m:Q4_K_M", "model loaded")
    log.request(ACCESS)
    log.close()
    first, second = log.path.read_text().splitlines()
    assert first.endswith(" m:Q4_K_M: model loaded")
    assert second.endswith("127.0.0.1 POST /v1/x\\n2026 forged 200 12 ms 50 bytes m:Q4_K_M (done)")


def test_lines_for_programs(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "serve.log", as_json=True)
    log.line("m", 'says "é"')
    log.request(ACCESS)
    log.close()
    said, request = map(json.loads, log.path.read_text().splitlines())
    assert said["source"] == "m" and said["text"] == 'says "é"' and said["time"] <= request["time"]
    assert request["path"] == ACCESS.path and request["status"] == 200 and request["end"] == "done"


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_only_its_user_reads_it(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "serve.log")
    log.close()
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_it_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_log, "FILE_BYTES", 1000)
    log = ServerLog(tmp_path / "serve.log")
    for number in range(200):
        log.line("m", f"line {number}")
    log.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 1 + server_log.OLD_FILES and all(file.stat().st_size <= 1000 for file in files)
    assert "line 199" in log.path.read_text()
    assert all(file.stat().st_mode & 0o077 == 0 for file in files) or os.name == "nt"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_ends_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    log = ServerLog(Path("/dev/full"))
    log.line("m", "x")
    assert capsys.readouterr().err == ""
