"""`localmix verify` as a user runs it."""

from __future__ import annotations

from pathlib import Path

from tests.commands import CommandLine
from tests.random_model import write_random_model


def test_problems_are_lines_and_exit_code_3(empty: CommandLine, tmp_path: Path) -> None:
    good = write_random_model(tmp_path / "good.gguf", layers=1)
    run = empty("verify", good, "--deep")
    assert "problems   none" in run.out
    assert "checksums  none compared" in run.out
    assert run.err.startswith("Note: Nothing says which checksum the file should have.")
    document = empty("verify", good, "--json").json
    assert document["ok"] is True and document["problems"] == [] and document["weights"] == 0
    write_random_model(tmp_path / "bad.gguf", layers=1, poison="output.weight")
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-9])
    run = empty("verify", tmp_path, "--deep", expect=3)
    assert f"{tmp_path}/bad.gguf: output.weight holds nan at [0, 0].\n" in run.out
    assert f"{tmp_path}/cut.gguf: is not a usable GGUF file" in run.out
    document = empty("verify", tmp_path, "--deep", "--json", expect=3).json
    assert document["ok"] is False
    assert [Path(problem["path"]).name for problem in document["problems"]] == ["cut.gguf", "bad.gguf"]


def test_what_cannot_be_checked(empty: CommandLine, tmp_path: Path) -> None:
    assert "does not exist" in empty("verify", tmp_path / "absent.gguf", expect=5).err
    assert "holds no model" in empty("verify", tmp_path, expect=3).err
    write_random_model(tmp_path / "m.gguf", layers=1)
    assert "--repo ORG/NAME" in empty("verify", tmp_path / "m.gguf", "--online", expect=2).err
