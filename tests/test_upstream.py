"""llama.cpp's converter in an environment of its own: what is unpacked, run, refused, and left behind."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from localmix import upstream
from localmix.convert import describe
from localmix.errors import FileError, InputError, UsageError
from tests.commands import CommandLine
from tests.model_families import write_model

ROOT = Path(__file__).parent.parent

# Stands for llama.cpp's converter: copies a file that lies in the checkpoint, as if it had made it.
CONVERTER = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--outtype"), parser.add_argument("--outfile"), parser.add_argument("model")
options = parser.parse_args()
made = pathlib.Path(options.model) / f"made-{options.outtype}.gguf"
sys.stderr.write("Writing:  50%|#####     | 1/2\\r")
pathlib.Path(options.outfile).write_bytes(made.read_bytes()[:9])
if not made.stat().st_size > 9:
    sys.exit("ValueError: Duplicated tensor 'x'")
pathlib.Path(options.outfile).write_bytes(made.read_bytes())
"""


def pack(path: Path, *extra: str) -> None:
    """An archive laid out as llama-cpp-python's."""
    files = {
        "vendor/llama.cpp/convert_hf_to_gguf.py": CONVERTER,
        "vendor/llama.cpp/requirements/requirements-convert_hf_to_gguf.txt": "",
        "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
        "vendor/llama.cpp/src/llama.cpp": "not wanted",
        "setup.py": "raise SystemExit('never run')",
        **dict.fromkeys(extra, "bad"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-0/{name}")
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive in a cache of its own, pinned; this Python runs what is in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(upstream.PYTHON_VARIABLE, sys.executable)
    path = tmp_path / "cache" / "localmix" / "sdist" / upstream.SDIST
    pack(path)
    monkeypatch.setattr(upstream, "SDIST_SHA256", upstream._sha256(path))
    return path


@pytest.fixture
def model(tmp_path: Path, random_model: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt9", "torch_dtype": "float32"}))
    (folder / "made-f32.gguf").write_bytes(random_model.read_bytes())
    (folder / "made-f16.gguf").write_bytes(b"too short")
    return folder


def test_pin_is_that_of_the_vendor_folder() -> None:
    pin = json.loads((ROOT / "vendor" / "llama.cpp" / "pin.json").read_text())
    assert (pin["sdist"], pin["sha256"]) == (upstream.SDIST, upstream.SDIST_SHA256)


def test_converts(archive: Path, model: Path, tmp_path: Path) -> None:
    target = upstream.environment()
    assert not target.ready
    upstream.make(target)
    assert target.ready
    assert sorted(path.name for path in target.source.iterdir()) == ["convert_hf_to_gguf.py", "gguf-py", "requirements"]
    seen: list[int] = []
    upstream.convert_upstream(model, tmp_path / "made.gguf", "f32", lambda done, total, label: seen.append(done))
    assert seen == [0, 50]
    assert (tmp_path / "made.gguf").read_bytes() == (model / "made-f32.gguf").read_bytes()
    assert describe(tmp_path / "made.gguf").architecture == "llama"


def test_failure_leaves_what_was_there(archive: Path, model: Path, tmp_path: Path) -> None:
    upstream.make(upstream.environment())
    output = tmp_path / "made.gguf"
    output.write_bytes(b"earlier")
    with pytest.raises(InputError, match=r"cannot convert .*model: ValueError: Duplicated tensor 'x'\.$"):
        upstream.convert_upstream(model, output, "f16")
    with pytest.raises(InputError, match="No such file"):
        upstream.convert_upstream(model, output, "bf16")
    assert output.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*partial"))
    with pytest.raises(UsageError, match="would destroy it"):
        upstream.convert_upstream(model, model / "config.json", "f32")


def test_archive_that_is_not_the_pinned_one(archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pack(archive, "vendor/llama.cpp/conversion/../../../../../escaped.py")
    monkeypatch.setattr(upstream, "SDIST_SHA256", upstream._sha256(archive))
    with pytest.raises(InputError, match="is not unpacked"):
        upstream.make(upstream.environment())
    assert not upstream.environment().ready


def test_python_that_is_none(archive: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.make(upstream.environment())
    monkeypatch.setenv(upstream.PYTHON_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(FileError, match="absent cannot be run: No such file") as caught:
        upstream.convert_upstream(model, tmp_path / "made.gguf", "f32")
    assert upstream.PYTHON_VARIABLE in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_python_that_makes_no_environment(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's without python3-venv: that is no matter of the network."""
    monkeypatch.delenv(upstream.PYTHON_VARIABLE)
    (tmp_path / "python").write_text("#!/bin/sh\necho ensurepip is not available.\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileError, match="could not be installed: ensurepip is not available") as caught:
        upstream.make(upstream.environment())
    assert "python3-venv" in caught.value.hint
    assert not upstream.environment().ready


def test_interrupted(archive: Path, model: Path, tmp_path: Path) -> None:
    """What stops the run stops the converter too, and leaves nothing."""
    upstream.make(upstream.environment())

    def stop(done: int, total: int, label: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upstream.convert_upstream(model, tmp_path / "made.gguf", "f32", stop)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*partial"))
    upstream.convert_upstream(model, tmp_path / "made.gguf", "f32")  # the lock is free again


def test_code_that_a_checkpoint_brings(model: Path) -> None:
    assert upstream.brings_code(model) == []
    with pytest.raises(InputError, match="is not a folder"):
        upstream.brings_code(model / "config.json")
    (model / "modeling_x.py").write_text("")
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "x.X"}}))
    assert upstream.brings_code(model) == ["modeling_x.py", "auto_map in tokenizer_config.json"]


@pytest.mark.parametrize(
    ("said", "kind"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16"), (None, "bf16")]
)
def test_type_of_the_weights(tmp_path: Path, said: str | None, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": said}))
    assert upstream.plain_type(tmp_path) == kind


def test_nothing_happens_without_a_yes(model: Path, tmp_path: Path) -> None:
    """Neither an installation nor foreign code, when nobody is there to be asked."""
    run = CommandLine(tmp_path / "home", tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    said = run.fails("convert", model, "--upstream", "-o", tmp_path / "x.gguf", expect=2)
    assert "to download" in said and "--yes" in said
    (model / "modeling_x.py").write_text("")
    said = run.fails("convert", model, "--upstream", "-o", tmp_path / "x.gguf", expect=2)
    assert "brings code (modeling_x.py)" in said
    assert not (tmp_path / "cache" / "localmix" / "upstream").exists()


@pytest.mark.slow
def test_environment_of_its_own(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python environment is really made; the archive's list of what to install is empty."""
    monkeypatch.delenv(upstream.PYTHON_VARIABLE)
    target = upstream.environment()
    said: list[str] = []
    upstream.make(target, said.append)
    assert target.ready and target.python.exists() and len(said) == 2
    upstream.make(target, said.append)
    assert len(said) == 2


@pytest.mark.skipif(
    upstream.PYTHON_VARIABLE not in os.environ, reason=f"{upstream.PYTHON_VARIABLE} names no Python with torch"
)
def test_the_real_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mixtral")
    upstream.make(upstream.environment())
    upstream.convert_upstream(folder, tmp_path / "made.gguf", "f32")
    assert describe(tmp_path / "made.gguf").tensors == 3 * 10 + 3
