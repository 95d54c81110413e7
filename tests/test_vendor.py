"""The pinned llama.cpp: one version everywhere, a checked archive, tools that run, clear errors."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "vendor" / "llama.cpp" / "build.py"
PIN = json.loads((SCRIPT.parent / "pin.json").read_text(encoding="utf-8"))
EXE = ".exe" if os.name == "nt" else ""


def run_build(
    *arguments: str | Path, python: str | Path = sys.executable, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [str(python), str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def refused(result: subprocess.CompletedProcess[str], message: str, hint: str) -> bool:
    """A sentence and a next step on stderr, nothing on stdout, no traceback."""
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stdout == ""
    assert re.search(f"^error: .*{message}", result.stderr, re.MULTILINE), result.stderr
    assert re.search(f"^next: .*{hint}", result.stderr, re.MULTILINE), result.stderr
    return result.returncode != 0


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor_build", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tools() -> Path:
    result = run_build("--print-dir")
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def test_one_version_everywhere() -> None:
    dependency = re.search(r'"llama-cpp-python==([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert dependency
    assert dependency[1] == PIN["version"] == version("llama_cpp_python")
    assert PIN["sdist"] == f"llama_cpp_python-{PIN['version']}.tar.gz"


@pytest.mark.upstream
def test_print_dir_names_a_folder_with_all_tools(tools: Path) -> None:
    assert len(PIN["targets"]) == 6
    for tool in PIN["targets"]:
        # Running one shows that it finds its libraries after the build folder got its final name.
        run = subprocess.run([tools / (tool + EXE), "--help"], capture_output=True, text=True)
        assert "usage" in (run.stdout + run.stderr).lower(), (tool, run.stderr)


@pytest.mark.upstream
def test_the_tools_are_of_the_pinned_commit(tools: Path) -> None:
    run = subprocess.run([tools / f"llama-server{EXE}", "--version"], capture_output=True, text=True)
    assert PIN["commit"][:9] in run.stdout + run.stderr
    record = json.loads((tools.parent / "build.json").read_text(encoding="utf-8"))
    assert {name: record[name] for name in PIN} == PIN


@pytest.mark.upstream
def test_the_source_is_beside_the_tools(tools: Path) -> None:
    source = tools.parent / "src"
    assert (source / "convert_hf_to_gguf.py").is_file()
    assert (source / "conversion").is_dir()
    assert (source / "gguf-py" / "gguf" / "__init__.py").is_file()


@pytest.mark.upstream
def test_a_second_call_builds_nothing(tools: Path) -> None:
    before = (tools.parent / "build.json").stat().st_mtime_ns
    start = time.monotonic()
    result = run_build()
    assert result.returncode == 0
    assert time.monotonic() - start < 5
    assert Path(result.stdout.splitlines()[-1]) == tools
    assert (tools.parent / "build.json").stat().st_mtime_ns == before


def test_print_dir_never_builds(tmp_path: Path) -> None:
    assert refused(run_build("--print-dir", LOCALMIX_CACHE=tmp_path), "not built", "make vendor")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b" + bytes(1000)])
@pytest.mark.parametrize("what", [(), ("--engine-wheel",)], ids=["tools", "engine"])
def test_an_archive_with_another_sha256_is_refused(tmp_path: Path, content: bytes, what: tuple[str]) -> None:
    archive = tmp_path / PIN["sdist"]
    archive.write_bytes(content)
    cache = tmp_path / "cache"
    result = run_build(*what, "--sdist", archive, LOCALMIX_CACHE=cache)
    assert refused(result, "sha256 is .* nothing was unpacked or built", "again")
    assert not cache.exists()


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    result = run_build("--sdist", tmp_path / "no.tar.gz", LOCALMIX_CACHE=tmp_path)
    assert refused(result, "no such file", "--sdist")


def test_an_index_with_another_archive_runs_nothing_of_it(tmp_path: Path) -> None:
    """Pip would run the setup.py of an archive for its metadata: the hash has to come first."""
    index, ran = tmp_path / "index", tmp_path / "ran"
    index.mkdir()
    folder = f"llama_cpp_python-{PIN['version']}"
    with tarfile.open(index / PIN["sdist"], "w:gz") as archive:
        for name, text in {
            "setup.py": f"open({str(ran)!r}, 'w')",
            "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {PIN['version']}\n",
        }.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    result = run_build(
        "--engine-wheel",
        LOCALMIX_CACHE=tmp_path / "cache",
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=index,
    )
    assert refused(result, "another", "pip config")
    assert not ran.exists()
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_no_network(tmp_path: Path) -> None:
    result = run_build(
        "--engine-wheel",
        LOCALMIX_CACHE=tmp_path,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:1/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="0",
    )
    assert refused(result, "could not fetch", "network")


@pytest.mark.skipif(os.name == "nt", reason="CMake finds Visual Studio without PATH")
def test_a_missing_program_is_named(tmp_path: Path) -> None:
    # A Python with nothing beside it: build.py also looks for cmake there.
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    path = tmp_path / "path"
    path.mkdir()
    variables = {"LOCALMIX_CACHE": tmp_path / "cache", "PATH": path, "CXX": "", "CUDACXX": ""}
    assert refused(run_build(python=python, **variables), "cmake is not installed", "pip install cmake")
    (path / "cmake").symlink_to(shutil.which("cmake") or sys.executable)
    assert refused(run_build(python=python, **variables), "no C[+][+] compiler", "g[+][+]")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        result = run_build("--backend", "cuda", python=python, **variables)
        assert refused(result, "needs nvcc", "CUDA toolkit")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(run_build(LOCALMIX_CACHE=tmp_path / "file" / "cache"), "file", "LOCALMIX_CACHE")


def test_an_unknown_backend() -> None:
    result = run_build("--print-dir", BACKEND="abacus")
    assert result.returncode == 2
    assert "abacus" in result.stderr
    assert "Traceback" not in result.stderr


def test_unpacking_stays_below_its_folder(tmp_path: Path, build: ModuleType) -> None:
    def archive_of(*members: tarfile.TarInfo) -> Path:
        path = tmp_path / "archive.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for member in members:
                archive.addfile(member, io.BytesIO(bytes(member.size)))
        return path

    link = tarfile.TarInfo("p/vendor/llama.cpp/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    program = tarfile.TarInfo("p/vendor/llama.cpp/scripts/run.sh")
    program.mode = 0o4755
    outside = tarfile.TarInfo("p/setup.py")
    build.unpack(archive_of(link, program, outside), tmp_path / "src")
    assert [path.name for path in (tmp_path / "src").rglob("*")] == ["scripts", "run.sh"]
    assert (tmp_path / "src" / "scripts" / "run.sh").stat().st_mode & 0o4000 == 0

    with pytest.raises(build.Problem, match="unsafe path"):
        build.unpack(archive_of(tarfile.TarInfo("p/vendor/llama.cpp/../../../evil")), tmp_path / "src")


def test_two_builds_of_one_folder_wait_for_each_other(tmp_path: Path, build: ModuleType) -> None:
    code = "import sys, runpy; from pathlib import Path; build = runpy.run_path(sys.argv[1])\n"
    code += "with build['locked'](Path(sys.argv[2])): print('inside')"
    command = [sys.executable, "-c", code, str(SCRIPT), str(tmp_path / "folder")]
    with build.locked(tmp_path / "folder"):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert other.stderr is not None
        assert "another process is building" in other.stderr.readline()
        assert other.poll() is None
    out, _ = other.communicate(timeout=30)
    assert out == "inside\n"


def test_what_a_killed_build_left_does_not_count(tmp_path: Path, build: ModuleType) -> None:
    folder = tmp_path / "folder"
    (folder / "bin").mkdir(parents=True)
    assert build.tools_built(folder) is None
    left = tmp_path / ".folder.part" / "made"
    left.mkdir(parents=True)
    with build.staging(folder) as scratch:
        assert not list(scratch.iterdir())
    assert not scratch.exists()
