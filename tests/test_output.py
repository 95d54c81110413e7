from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from localmix.errors import CapacityError, FileError, UsageError
from localmix.output import OutputFile, check_outputs, lock_for, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_whole_at_commit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")
    with OutputFile(path, 6) as output:
        output.write(3, b"def")
        output.write(0, b"abc")
        assert path.read_bytes() == b"before"
        output.commit()
    assert path.read_bytes() == b"abcdef"
    assert names(tmp_path) == ["model.gguf"]


def test_leaves_nothing_behind_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(RuntimeError), OutputFile(path, 6):
        raise RuntimeError
    assert names(tmp_path) == []


def test_two_runs_for_one_output_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    code = (
        "import sys; from pathlib import Path; from localmix.output import OutputFile; OutputFile(Path(sys.argv[1]), 4)"
    )
    with OutputFile(path, 4) as output:
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "Another run is writing" in other.stderr
        output.write(0, b"mine")
        output.commit()
    assert path.read_bytes() == b"mine"


CONTENDER = """
import os, sys
from pathlib import Path
from localmix.errors import FileError
from localmix.output import lock_for
path, mark, held = Path(sys.argv[1]), sys.argv[2], 0
while held < 150:
    try:
        lock = lock_for(path)
    except FileError:
        continue
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where two hold it at once
    os.unlink(mark)
    lock.release()
    held += 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is heeded on Linux")
def test_locks_exclude_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / "out.gguf"), str(tmp_path / "mark")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [run.communicate()[1] for run in runs] == [""] * 4
    assert list((tmp_path / "cache" / "localmix" / "locks").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no names without files on Windows")
def test_a_lock_is_held_until_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    lock = lock_for(tmp_path / "out")
    (name,) = (tmp_path / "localmix" / "locks").iterdir()
    unlink, seen = os.unlink, []

    def watched(path: str) -> None:
        with open(path, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(path)
        unlink(path)

    with name.open("rb") as opened_before:
        monkeypatch.setattr(os, "unlink", watched)
        lock.release()
        monkeypatch.undo()
        assert [Path(path) for path in seen] == [name] and not name.exists()
        fcntl.flock(opened_before, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock that no name leads to hinders nobody
        lock_for(tmp_path / "out").release()


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from localmix.output import OutputFile
        OutputFile(Path(sys.argv[1]), 4).write(0, b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(names(tmp_path)) == 1
    assert not path.exists()
    write_atomically(path, b"whole")
    assert names(tmp_path) == ["model.gguf"]
    assert path.read_bytes() == b"whole"


def test_a_symlink_in_the_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = tmp_path / "model.gguf"
    path.with_name(f".{path.name}.partial").symlink_to(victim)
    write_atomically(path, b"data")
    assert victim.read_bytes() == b"precious"
    assert path.read_bytes() == b"data"
    assert not path.is_symlink()


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(b"model")
    link, hard = tmp_path / "link.gguf", tmp_path / "hard.gguf"
    link.symlink_to(source)
    os.link(source, hard)
    for output in (source, link, hard, tmp_path / "x" / ".." / "source.gguf"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="would destroy it"):
            check_outputs([(output, 5)], [source])


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    target.write_bytes(b"there")
    link, pipe, loop = tmp_path / "link", tmp_path / "pipe", tmp_path / "loop"
    link.symlink_to(target)
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, reason in ((link, "symbolic link"), (pipe, "no regular file"), (loop, "symbolic link")):
        with pytest.raises(FileError, match=reason):
            check_outputs([(path, 1)], [])
    with pytest.raises(UsageError, match="An output is a file"):
        check_outputs([(tmp_path / "-", 1)], [])
    assert link.is_symlink() and target.read_bytes() == b"there"


def test_a_link_in_the_place_of_the_journal_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".model.gguf.journal.new").symlink_to(victim)
    with OutputFile(tmp_path / "model.gguf", 4, "fingerprint") as output:
        output.write(0, b"data")
        output.keep([0, 1])
        output.commit()
    assert victim.read_bytes() == b"precious"
    assert names(tmp_path) == ["model.gguf", "victim"]


def test_two_outputs_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Two outputs"):
        check_outputs([(tmp_path / "a", 1), (tmp_path / "a", 1)], [])


def test_a_missing_folder_and_a_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        check_outputs([(tmp_path / "none" / "a", 1)], [])
    with pytest.raises(FileError, match="is a folder"):
        check_outputs([(tmp_path, 1)], [])


def test_too_little_space_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match="GiB free"):
        check_outputs([(tmp_path / "a", 1 << 60)], [])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 << 10))
    with pytest.raises(CapacityError, match=r"has 2.0 KiB free, and the output takes 3.0 KiB\."):
        check_outputs([(tmp_path / "a", 1 << 10), (tmp_path / "b", 2 << 10)], [])
    (tmp_path / ".on-its-way").mkdir()
    with pytest.raises(CapacityError, match=f"^{re.escape(str(tmp_path))} has .* with the shards on their way"):
        check_outputs([(tmp_path / "a", 1 << 10)], [], [(tmp_path / ".on-its-way", 2 << 10)])
