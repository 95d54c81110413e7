"""llama.cpp's own converter, for models that localmix does not know: in an environment of its own, made on demand.

The converter is the one of the pinned llama.cpp, out of the source archive of llama-cpp-python; what it needs (torch,
transformers) is installed beside it in the user's cache, in the versions that it asks for. It is a program that trusts
checkpoints: it may run Python code that they bring. `brings_code` says which do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from localmix.errors import CapacityError, FileError, InputError, LocalmixError, NetworkError
from localmix.native.library import PINNED_VERSION
from localmix.output import check_outputs, lock_for
from localmix.sources.documents import read_optional_object

# The archive with llama.cpp's source; vendor/llama.cpp/pin.json has the same.
SDIST = f"llama_cpp_python-{PINNED_VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# What is said before it is made: what torch for the processor alone, transformers and llama.cpp's source take.
DOWNLOAD, DISK = "about 300 MB", "1.3 GB"

_CONVERTER = "convert_hf_to_gguf.py"
_REQUIREMENTS = Path("requirements") / "requirements-convert_hf_to_gguf.txt"
_WANTED = (_CONVERTER, "conversion", "gguf-py", "requirements")
_PERCENT = re.compile(r"Writing: +(\d+)%")

# An interpreter that has what the converter needs, for those who have one.
PYTHON_VARIABLE = "LOCALMIX_UPSTREAM_PYTHON"

Status = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Environment:
    """A converter and the interpreter that runs it.

    Attributes:
        folder: where both are made.
        python: the interpreter.
        own: it is made here; else it is somebody's who has what the converter needs.
    """

    folder: Path
    python: Path
    own: bool

    @property
    def source(self) -> Path:
        """llama.cpp's converter and what belongs to it."""
        return self.folder / "source"

    @property
    def unpacked(self) -> Path:
        """The mark that the source is complete."""
        return self.folder / "unpacked"

    @property
    def installed(self) -> Path:
        """The mark that the interpreter has what the converter needs."""
        return self.folder / "venv" / "complete"

    @property
    def ready(self) -> bool:
        """Whether nothing is left to be made."""
        return self.unpacked.exists() and (self.installed.exists() or not self.own)


def environment() -> Environment:
    """Where the converter is, or will be."""
    folder = platformdirs.user_cache_path("localmix", appauthor=False) / "upstream" / PINNED_VERSION
    own = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    given = os.environ.get(PYTHON_VARIABLE)
    return Environment(folder, Path(given) if given else own, not given)


def brings_code(model: Path) -> list[str]:
    """Names of what a checkpoint brings to be run: Python files, and entries that send for some.

    Raises:
        InputError: it is no folder; llama.cpp's converter reads nothing else.
    """
    if not model.is_dir():
        raise InputError(f"{model} is not a folder; llama.cpp's converter reads checkpoints only.")
    found = sorted(path.name for path in model.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        if read_optional_object(model / name).get("auto_map"):
            found.append(f"auto_map in {name}")
    return found


def make(target: Environment, status: Status = lambda text: None) -> None:
    """Unpack the converter and install what it needs; does nothing where that was done.

    Args:
        status: told what is under way.

    Raises:
        NetworkError: something could not be downloaded.
        InputError: the archive is not the pinned one.
        FileError, CapacityError: the cache cannot be written.
    """
    if target.ready:
        return
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.unpacked):
            if not target.unpacked.exists():
                _unpack(_archive(status), target.source)
                target.unpacked.touch()
            if target.own and not target.installed.exists():
                status("Making a Python environment for llama.cpp's converter")
                _run(
                    [sys.executable, "-m", "venv", "--clear", str(target.folder / "venv")],
                    "A Python environment",
                    FileError,
                    f"Debian and Ubuntu have it in python3-venv; or set {PYTHON_VARIABLE} to a Python with torch.",
                )
                status(f"Installing torch and transformers for it ({DOWNLOAD})")
                wanted = ["install", "--quiet", "--requirement", str(target.source / _REQUIREMENTS)]
                _run([str(target.python), "-m", "pip", *wanted], "What llama.cpp's converter needs")
                target.installed.touch()
    except OSError as error:
        kind = CapacityError if error.errno == errno.ENOSPC else FileError
        raise kind(f"{target.folder} cannot be made: {error.strerror or error}.") from error


def _archive(status: Status) -> Path:
    """llama-cpp-python's source archive, from the cache or through pip."""
    cached = platformdirs.user_cache_path("localmix", appauthor=False) / "sdist" / SDIST
    if cached.is_file() and _sha256(cached) == SDIST_SHA256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    status("Downloading the source of llama.cpp (77 MB)")
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        # With its hash, pip looks at the archive before it runs what lies in it.
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"llama-cpp-python=={PINNED_VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        words = ["download", "--quiet", "--no-deps", "--require-hashes", "--no-binary", "llama-cpp-python"]
        _run(
            [sys.executable, "-m", "pip", *words, "--dest", scratch, "--requirement", str(wanted)],
            "The source of llama.cpp",
        )
        found = Path(scratch) / SDIST
        if not found.is_file() or _sha256(found) != SDIST_SHA256:
            raise InputError(f"What pip gives for {SDIST} is not the pinned archive; nothing of it was used.")
        os.replace(found, cached)
    return cached


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """The converter's files out of the archive: plain files only, each below `folder`."""
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "llama.cpp") or len(parts) < 4 or parts[3] not in _WANTED or not member.isreg():
                continue
            if ".." in parts or any("\\" in part or ":" in part for part in parts):
                raise InputError(f"{archive.name} holds the path {member.name!r}, which is not unpacked.")
            content = opened.extractfile(member)
            if content is not None:
                target = folder.joinpath(*parts[3:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def _run(
    command: Sequence[str],
    what: str,
    failure: type[LocalmixError] = NetworkError,
    hint: str = "Check the network, then run the command again.",
) -> None:
    """Run a program that downloads or installs; its last line explains a failure.

    Args:
        failure, hint: how it is told, unless the disk is full.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if "No space left" in done.stderr:
            failure, hint = CapacityError, "Free some space, then run the command again."
        raise failure(f"{what} could not be installed: {_last_line(done.stderr or done.stdout)}", hint)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it gave no reason."


def convert_upstream(model: Path, output: Path, kind: str, progress: Progress | None = None) -> None:
    """Convert a checkpoint with llama.cpp's converter. `make` comes before.

    Args:
        model: the checkpoint folder.
        kind: `bf16`, `f16` or `f32`.
        progress: called with (percent, 100, what is done).

    Raises:
        InputError: it cannot convert the model; the sentence holds its last line.
    """
    check_outputs([(output, sum(path.stat().st_size for path in model.glob("*.safetensors")))], model.glob("*"))
    target = environment()
    partial = output.parent / f".{output.name}.{os.getpid()}.partial"
    words = [str(target.python), str(target.source / _CONVERTER), "--outtype", kind, "--outfile", str(partial)]
    # Nothing is fetched while it runs: what a checkpoint sends for would be run.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(target.source / "gguf-py")}
    with _locked(output), _removed(partial):
        report = progress or (lambda done, total, label: None)
        report(0, 100, "llama.cpp's converter")
        try:
            process = subprocess.Popen(
                [*words, str(model.resolve())],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise FileError(
                f"{target.python} cannot be run: {error.strerror or error}.",
                f"Set {PYTHON_VARIABLE} to a Python that has torch and transformers, or leave it unset.",
            ) from error
        with process as child:
            last = ""
            try:
                for line in child.stderr or ():
                    if line.strip():
                        last = line.strip()
                    if found := _PERCENT.search(line):
                        report(int(found[1]), 100, "llama.cpp's converter")
            except BaseException:
                child.kill()
                raise
        if child.returncode or not partial.is_file():
            raise InputError(
                f"llama.cpp's converter cannot convert {model}: {last[:300].rstrip('.') or 'it gave no reason'}."
            )
        os.replace(partial, output)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only one who makes a file."""
    lock = lock_for(path)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[None]:
    """Leave no file at a path, whatever happens."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def plain_type(model: Path) -> str:
    """The type that keeps what config.json says of the weights: `bf16`, `f16` or `f32`."""
    config = read_optional_object(model / "config.json")
    return {"float16": "f16", "float32": "f32"}.get(str(config.get("dtype") or config.get("torch_dtype")), "bf16")
