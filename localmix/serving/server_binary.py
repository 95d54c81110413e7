"""Where llama-server is: the one that localmix built, or one of the system."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from localmix.errors import InputError

PROGRAM = "llama-server"
HOW_TO_GET_IT = (
    "`localmix doctor --build-server` builds it (in a checkout also `make vendor`), or install your system's package"
    " of llama.cpp."
)
_ANSWER_SECONDS = 20.0  # a GPU's driver takes its time


@dataclass(frozen=True)
class ServerBinary:
    """A llama-server.

    Attributes:
        built: whether localmix built it, from the source that its own engine comes from.
        web_page: whether the chat page is in it; None where only a running one can tell.
        rpc: whether it can spread a model over machines; None where only the program itself can tell.
    """

    path: Path
    built: bool
    web_page: bool | None = None
    rpc: bool | None = None


def find_server() -> ServerBinary:
    """The llama-server to use: the one that was built, else the one on PATH.

    Raises:
        InputError: there is none.
    """
    folder, record = built_tools() or (None, {})
    if folder is not None:
        return ServerBinary(_program(folder), True, bool(record.get("ui")), "-DGGML_RPC=ON" in record.get("flags", ()))
    found = shutil.which(PROGRAM)
    if found is None:
        raise InputError(f"The program {PROGRAM} of llama.cpp is not here.", HOW_TO_GET_IT)
    return ServerBinary(Path(found), False)


def built_tools() -> tuple[Path, dict[str, Any]] | None:
    """The folder of llama.cpp's tools that were built here, with the build's record; None where there are none."""
    build = build_script()
    if build is None:
        return None
    for backend in sorted(build.BACKENDS, key="cpu".__eq__):  # one with a GPU does all that the others do
        folder = build.tools_folder(backend)
        record = build.tools_built(folder)
        if record is not None:
            return folder / "bin", record
    return None


def build_tools(backend: str | None = None, sdist: Path | None = None, rebuild: bool = False) -> Path:
    """Build llama.cpp's tools if they are not built yet, as `make vendor` does; progress goes to stderr.

    Args:
        backend: cpu, cuda, metal or vulkan; None for the one of this machine.
        sdist: a copy of the source archive, for machines without network.
        rebuild: also what is there.

    Returns:
        Their folder.

    Raises:
        InputError: something that building needs is missing, or it failed; the sentence holds the compiler's reason.
    """
    build = build_script()
    if build is None:
        raise InputError("This installation has not what builds llama-server.", "Install localmix again.")
    vars(build)["COMMAND"] = "localmix doctor --build-server"
    chosen = [argument for argument in (("--backend", backend), ("--sdist", sdist)) if argument[1]]
    arguments = [str(part) for argument in chosen for part in argument] + ["--rebuild"] * rebuild
    try:
        options = build.parse(arguments)
        if sdist is not None:
            build.check_sdist(sdist)
        folder = build.tools(options)
    except build.Problem as problem:
        raise InputError(f"llama-server cannot be built: {problem}.", problem.hint) from problem
    assert isinstance(folder, Path)
    return folder


def build_script() -> ModuleType | None:
    """The script that builds llama.cpp's tools, of this checkout or as the package carries it; None where it is cut."""
    package = Path(__file__).parent.parent
    for folder in (package.parent / "vendor" / "llama.cpp", package / "vendor"):
        script = folder / "build.py"
        if script.is_file():
            name = "localmix_vendor_build"
            specification = importlib.util.spec_from_file_location(name, script)
            assert specification is not None and specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
            return module
    return None


def server_devices(binary: Path) -> list[str]:
    """Names of the devices besides the processor that a llama-server can use; nothing where it does not say."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(
            [str(binary), "--list-devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
        )
        _, _, listed = run.stdout.partition("Available devices:")
        return [line.partition(":")[0].strip() for line in listed.splitlines() if ":" in line]
    return []


def _program(folder: Path) -> Path:
    return folder / (f"{PROGRAM}.exe" if sys.platform == "win32" else PROGRAM)
