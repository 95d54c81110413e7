#!/usr/bin/env python3
"""Build what the llama-cpp-python package does not ship: llama.cpp's own tools, at the pinned commit.

    python vendor/llama.cpp/build.py                  build if needed, print the folder of the tools
    python vendor/llama.cpp/build.py --print-dir      only print it; fails when nothing is built yet
    python vendor/llama.cpp/build.py --engine-wheel   the same for llama-cpp-python's wheel

Everything comes from one file, llama-cpp-python's source archive named in pin.json, and nothing in it runs
or is unpacked before its sha256 is right. Results go to a per-user cache (see cache_folder), keyed by commit
and flags, so a second checkout builds nothing. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
PIN = json.loads((HERE / "pin.json").read_text(encoding="utf-8"))
EXE = ".exe" if os.name == "nt" else ""
MACOS = sys.platform == "darwin"

# One row per backend: CMake flags, and the program without which they cannot work.
BACKENDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "cpu": (("-DGGML_METAL=OFF",) if MACOS else (), None),
    "cuda": (("-DGGML_CUDA=ON",), "nvcc"),
    "metal": (("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"), None),
    "vulkan": (("-DGGML_VULKAN=ON",), "glslc"),
}
TOOL_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # Tools and libraries lie in one folder and find each other there: the folder is renamed after the build.
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_RPC=ON",
    f"-DLLAMA_BUILD_COMMIT={PIN['commit'][:9]}",
)
# Nothing here uses multimodal support; RPC is what spreads a model over several machines.
ENGINE_FLAGS = ("-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF", "-DGGML_RPC=ON")
ENGINE_INCLUDE = HERE / "engine.cmake"


# How this script is called, for what it says; `localmix doctor` calls it otherwise.
COMMAND = f"python {sys.argv[0]}"


class Problem(Exception):
    """What went wrong, and the next step: printed as two lines, without a traceback."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """The per-user cache: LOCALMIX_CACHE, or `localmix` in the place the platform has for caches."""
    if named := os.environ.get("LOCALMIX_CACHE"):
        return Path(named).expanduser().absolute()
    if os.name == "nt":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "localmix" / "Cache"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "localmix"
    return Path.home() / ("Library/Caches" if MACOS else ".cache") / "localmix"


def processor() -> str:
    """What `-march=native` sees: a build for one processor can be illegal instructions on another."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return " ".join(sorted(value.split()))
    if MACOS:
        with contextlib.suppress(OSError):
            brand = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(brand, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def user_flags() -> list[str]:
    return shlex.split(os.environ.get("CMAKE_ARGS", ""))


def key(flags: list[str]) -> str:
    compiler = {name: os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDACXX")}
    machine = [platform.system(), platform.machine(), processor()]
    return hashlib.sha256(json.dumps([flags, compiler, machine], sort_keys=True).encode()).hexdigest()[:12]


def tools_folder(backend: str) -> Path:
    flags = [*TOOL_FLAGS, *BACKENDS[backend][0], *user_flags()]
    return cache_folder() / "llama.cpp" / f"{PIN['commit'][:9]}-{key(flags)}"


def engine_folder(backend: str) -> Path:
    flags = [*ENGINE_FLAGS, ENGINE_INCLUDE.read_text(encoding="utf-8")]
    flags += [*BACKENDS[backend][0], *user_flags()]
    return cache_folder() / "wheels" / f"{PIN['version']}-{backend}-{key(flags)}"


def tools_built(folder: Path) -> dict[str, object] | None:
    """The record of a finished build, or None. It is written before the folder gets its name."""
    with contextlib.suppress(OSError, ValueError):
        record: dict[str, object] = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        if all((folder / "bin" / (tool + EXE)).is_file() for tool in PIN["targets"]):
            return record
    return None


def engine_built(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process builds `folder`. The lock is the system's, so a killed process loses it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "a+b") as file:
        waiting = False
        while True:
            try:
                if os.name == "nt":
                    import msvcrt

                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not waiting:
                    say(f"another process is building {folder.name}; waiting for it")
                waiting = True
                time.sleep(0.5)
        # Closing the file ends the lock on either system.
        yield


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sdist(path: Path) -> None:
    if not path.is_file():
        raise Problem(f"{path}: there is no such file", f"Name {PIN['sdist']}, or leave --sdist out.")
    if (found := sha256(path)) != PIN["sha256"]:
        raise Problem(
            f"{path}: sha256 is {found}, but pin.json says {PIN['sha256']}; nothing was unpacked or built",
            f"Get the source archive of {PIN['package']} {PIN['version']} again, or leave --sdist out.",
        )


def fetch_sdist() -> Path:
    """The pinned source archive, from the cache or through pip from the index that pip is set up for."""
    path: Path = cache_folder() / "sdist" / PIN["sdist"]
    if path.is_file() and sha256(path) == PIN["sha256"]:
        return path
    if importlib.util.find_spec("pip") is None:
        raise Problem(
            f"this Python has no pip, which fetches {PIN['sdist']}",
            f"{sys.executable} -m ensurepip   or pass a copy of it: {COMMAND} --sdist {PIN['sdist']}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {PIN['package']} {PIN['version']} (source, 77 MB)")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        # With a hash in the requirement pip checks the archive before it runs the metadata hook inside.
        wanted = Path(scratch) / "wanted.txt"
        requirement = f"{PIN['package']}=={PIN['version']} --hash=sha256:{PIN['sha256']}\n"
        wanted.write_text(requirement, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--no-binary", PIN["package"], "--dest", scratch, "--requirement", str(wanted)]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        got = Path(scratch) / PIN["sdist"]
        if run.returncode != 0 or not got.is_file():
            tail = "\n".join(f"  {line}" for line in (run.stdout + run.stderr).strip().splitlines()[-6:])
            if "DO NOT MATCH THE HASHES" in run.stdout + run.stderr:
                raise Problem(
                    f"the package index has another {PIN['sdist']} than pin.json; nothing was built",
                    "Check the index that pip uses (pip config list), then run again.",
                )
            raise Problem(
                f"pip could not fetch {PIN['sdist']}:\n{tail}",
                f"Check the network and run again, or pass a copy: {COMMAND} --sdist {PIN['sdist']}",
            )
        check_sdist(got)
        os.replace(got, path)
    return path


def unpack(sdist: Path, into: Path) -> None:
    """llama.cpp's tree out of the archive: plain files only, each below `into`.

    Not TarFile.extractall: its safe filter came in Python 3.11.4, and Debian 12 has 3.11.2.
    """
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "llama.cpp") or not member.isreg():
                continue
            if ".." in parts or any("\\" in part or ":" in part for part in parts):
                raise Problem(f"{sdist.name}: unsafe path {member.name!r}", "Do not use this archive.")
            if parts[3] in (".git", ".github", ".devops"):
                continue
            target = into.joinpath(*parts[3:])
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
            if member.mode & 0o100:
                target.chmod(0o755)


def find(program: str) -> str | None:
    """On PATH, or beside this Python: pip puts its cmake and ninja there."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def need_compiler(backend: str) -> None:
    if backend == "metal" and not MACOS:
        raise Problem("Metal exists on macOS only", "Choose cpu, cuda or vulkan.")
    program = BACKENDS[backend][1]
    if program == "nvcc" and not find(program) and Path("/usr/local/cuda/bin/nvcc").is_file():
        # Where the toolkit's installer puts it, and where CMake does not look.
        os.environ.setdefault("CUDACXX", "/usr/local/cuda/bin/nvcc")
    if program == "nvcc":
        program = os.environ.get("CUDACXX") or program
    if program and not find(program):
        kit = {"nvcc": "the CUDA toolkit", "glslc": "the Vulkan SDK (glslc and the headers)"}
        raise Problem(
            f"the {backend} backend needs {program}, which is not on PATH",
            f"Install {kit.get(program, program)}, or choose the backend cpu.",
        )
    # On Windows, CMake itself looks for Visual Studio's compiler, which is not on PATH.
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if os.name != "nt" and not any(find(name) for name in compilers):
        raise Problem(
            f"there is no C++ compiler on PATH ({', '.join(compilers)})",
            "Debian: apt install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install",
        )


def jobs_for_this_machine() -> int:
    """As many as there are processors for this process and GiB of memory: one compiler takes about one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(AttributeError, ValueError, OSError):
        count = min(count, max(1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30))
    return count


def run(command: list[str], log: Path, what: str, environment: dict[str, str] | None = None) -> None:
    """Run a step with its output in `log`, and say now and then on stderr how far it is."""
    start = said = time.monotonic()
    every = 1.0 if sys.stderr.isatty() else 30.0
    last = ""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(environment or {})},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if step := re.match(r"\s*\[\s*(\d+/\d+|\d+%)\]", line):
                    last = step[1]
                if last and time.monotonic() - said >= every:
                    said = time.monotonic()
                    text = f"{what}: {last}, {said - start:.0f} s"
                    print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
            if last and sys.stderr.isatty():
                print(" " * 79, end="\r", file=sys.stderr, flush=True)
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # From the first error on: what follows it says why, what comes last only says that there was one.
        first = next((n for n, line in enumerate(lines) if re.search(r"CMake Error|error:|ERROR:", line)), -6)
        told = [f"  {line[:200]}" for line in lines[first:] if line.strip()][:6]
        kept = cache_folder() / "failed-build.log"
        shutil.copyfile(log, kept)
        raise Problem("\n".join([f"{what} failed:", *told]), f"The whole log is in {kept}")


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to work in, without what a killed build left there. Needs the lock."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(made: Path, folder: Path) -> None:
    """Give a finished folder its name in one step, in place of an older one if there is one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def build_tools(folder: Path, backend: str, sdist: Path | None, jobs: int) -> None:
    cmake, ninja, npm = find("cmake"), find("ninja"), find("npm")
    if cmake is None:
        raise Problem(
            "cmake is not installed",
            f"{sys.executable} -m pip install cmake ninja   or: apt, dnf or brew install cmake",
        )
    need_compiler(backend)
    with staging(folder) as scratch:
        start = time.monotonic()
        sdist = sdist or fetch_sdist()
        made = scratch / "made"
        build, log = scratch / "build", scratch / "build.log"
        unpack(sdist, made / "src")
        say(f"building llama.cpp {PIN['commit'][:9]}: 4 to 8 minutes on 2 cores, once per user and backend")
        environment = {
            # A repository around the cache must not lend its commit to the build.
            "GIT_CEILING_DIRECTORIES": str(cache_folder()),
            "npm_config_audit": "false",
            "npm_config_fund": "false",
            "npm_config_fetch_retries": "1",
            # CMake would also read it, and user_flags() already has.
            "CMAKE_ARGS": "",
        }
        flags = [*TOOL_FLAGS, *BACKENDS[backend][0], *user_flags()]

        def compile_with(ui: bool) -> None:
            configure = [cmake, "-S", str(made / "src"), "-B", str(build), *flags]
            if ninja:
                configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            configure.append(f"-DLLAMA_BUILD_UI={'ON' if ui else 'OFF'}")
            run(configure, log, "configuring llama.cpp", environment)
            command = [cmake, "--build", str(build), "--config", "Release", "--parallel", str(jobs)]
            run([*command, "--target", *PIN["targets"]], log, "building llama.cpp", environment)

        try:
            compile_with(npm is not None)
        except Problem as problem:
            if npm is None or "configuring" in str(problem):
                raise
            say("the build failed; trying without the web page of llama-server")
            compile_with(False)

        # Multi-configuration generators (Visual Studio) add a folder for the configuration.
        bin_folder = build / "bin" / "Release" if (build / "bin" / "Release").is_dir() else build / "bin"
        shutil.copytree(bin_folder, made / "bin", symlinks=True)
        # Upstream goes on without a UI when npm fails: its generated header is what tells.
        header = build / "tools" / "ui" / "ui.h"
        ui = header.is_file() and "#define LLAMA_UI_HAS_ASSETS 1" in header.read_text(encoding="utf-8")
        seconds = round(time.monotonic() - start)
        record = {**PIN, "backend": backend, "flags": flags}
        record |= {"ui": ui, "npm": npm is not None, "seconds": seconds}
        (made / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(log, made / "build.log")
        publish(made, folder)
    say(f"built in {seconds} s: {folder}")


def build_engine(folder: Path, backend: str, sdist: Path | None, jobs: int) -> None:
    need_compiler(backend)
    with staging(folder) as scratch:
        start = time.monotonic()
        sdist = sdist or fetch_sdist()
        what = f"building {PIN['package']} {PIN['version']} ({backend})"
        say(f"{what}: 2 to 4 minutes on 2 cores, once per user and backend")
        flags = [*ENGINE_FLAGS, f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ENGINE_INCLUDE.as_posix()}"]
        flags += [*BACKENDS[backend][0], *user_flags()]
        environment = {"CMAKE_ARGS": shlex.join(flags), "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
        made, log = scratch / "made", scratch / "build.log"
        # --verbose: without it pip holds the compiler's output back, and there is no progress to show.
        command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
        run([*command, "--wheel-dir", str(made), str(sdist)], log, f"building {PIN['package']}", environment)
        publish(made, folder)
    say(f"built in {time.monotonic() - start:.0f} s: {folder}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    backend = os.environ.get("BACKEND") or ("metal" if MACOS else "cpu")
    add("--backend", choices=sorted(BACKENDS), default=backend, help="default: BACKEND, then %(default)s")
    add("--print-dir", action="store_true", help="print the folder of the tools; build nothing")
    add("--engine-wheel", action="store_true", help="build llama-cpp-python's wheel, print its path")
    add("--sdist", type=Path, help=f"a copy of {PIN['sdist']}, for machines without network")
    add("--jobs", type=int, default=jobs_for_this_machine(), help="compilers at once (%(default)s)")
    add("--rebuild", action="store_true", help="build again what the cache already has")
    options = parser.parse_args(arguments)
    if options.backend not in BACKENDS:  # argparse does not check defaults
        parser.error(f"BACKEND={backend}: choose from {', '.join(sorted(BACKENDS))}")
    return options


def tools(options: argparse.Namespace) -> Path:
    folder = tools_folder(options.backend)
    record = tools_built(folder)
    if record is None and options.print_dir:
        raise Problem(f"llama.cpp's tools are not built ({folder})", "Run: make vendor")
    if not options.print_dir and (record is None or options.rebuild):
        with locked(folder):
            # Another process may have built it while this one waited.
            if tools_built(folder) is None or options.rebuild:
                build_tools(folder, options.backend, options.sdist, options.jobs)
        record = tools_built(folder)
        assert record is not None
    if not options.print_dir and record is not None and not record["ui"]:
        why = "its build failed" if record["npm"] else "there was no npm"
        say(f"llama-server has no web page: {why}. To try again: {COMMAND} --rebuild")
    return folder / "bin"


def engine(options: argparse.Namespace) -> Path:
    folder = engine_folder(options.backend)
    if engine_built(folder) is None or options.rebuild:
        with locked(folder):
            if engine_built(folder) is None or options.rebuild:
                build_engine(folder, options.backend, options.sdist, options.jobs)
    wheel = engine_built(folder)
    assert wheel is not None
    return wheel


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.sdist:
            check_sdist(options.sdist)
        print(engine(options) if options.engine_wheel else tools(options))
    except Problem as problem:
        say(f"error: {problem}\nnext:  {problem.hint}")
        return 1
    except OSError as error:
        say(f"error: {error.filename or cache_folder()}: {error.strerror or error}")
        say(f"next:  The cache needs 1 GB in {cache_folder()}; LOCALMIX_CACHE=FOLDER names another place.")
        return 5
    except KeyboardInterrupt:
        say("interrupted; nothing was left half built")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
