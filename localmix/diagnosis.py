"""What `doctor` reports: versions, devices, memory, folders and tools, and the command that mends what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from localmix import __version__, library
from localmix.capacity.memory import Available, available
from localmix.errors import InputError, LocalmixError
from localmix.serving.server_binary import ServerBinary, built_tools, find_server

if TYPE_CHECKING:
    from localmix.native.devices import Device
    from localmix.native.lanes import Kernels

PACKAGES = (
    "llama-cpp-python",
    "gguf",
    "numpy",
    "safetensors",
    "sentencepiece",
    "huggingface-hub",
    "jinja2",
    "rich",
    "prompt-toolkit",
)


@dataclass(frozen=True)
class Problem:
    """Something that keeps a command from working, and what mends it."""

    what: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """This installation and this machine.

    Attributes:
        packages: installed version of each, None where it is missing.
        devices: what llama.cpp can compute on.
        kernels: what quantizes; None where the engine is missing.
        cores: physical ones, and those this process may use.
        memory: bytes of the machine, and what is available with the limit that binds.
        disk: free bytes where the library lies.
        tools: folder of llama.cpp's own tools, None where they are not built.
        server: the llama-server that `serve` runs, None where there is none.
        problems: empty when everything works.
    """

    version: str
    python: str
    system: str
    packages: dict[str, str | None]
    devices: tuple[Device, ...]
    kernels: Kernels | None
    physical_cores: int
    usable_cores: int
    memory: int
    available: Available
    library: Path
    models: int
    disk: int
    tools: Path | None
    server: ServerBinary | None
    problems: tuple[Problem, ...]


def diagnose() -> Diagnosis:
    """Look at everything; what fails becomes a `Problem`."""
    problems: list[Problem] = []
    packages = {name: _version(name) for name in PACKAGES}
    problems += [
        Problem(f"The package {name} is missing.", f"pip install {name}")
        for name, version in packages.items()
        if version is None
    ]
    devices: tuple[Device, ...] = ()
    kernels: Kernels | None = None
    try:
        from localmix.native.devices import devices as find_devices
        from localmix.native.lanes import kernels as find_kernels

        devices = tuple(find_devices())
        kernels = find_kernels()
    except LocalmixError as error:
        problems.append(Problem(error.message, error.hint))
    if any(shutil.which(name) for name in ("nvidia-smi",)) and not _has(devices, "CUDA"):
        problems.append(Problem("There is an NVIDIA driver, but the engine has no CUDA.", "make setup BACKEND=cuda"))
    if sys.platform == "darwin" and platform.machine() == "arm64" and not _has(devices, "Metal", "MTL"):
        problems.append(Problem("The engine was built without Metal.", "make setup BACKEND=metal"))
    home = library.home()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        problems.append(Problem(f"The library {home} cannot be written.", "export LOCALMIX_HOME=FOLDER"))
    try:
        models = len(library.models())
    except LocalmixError as error:
        models = 0
        problems.append(Problem(error.message, error.hint))
    tools = built_tools()
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        packages=packages,
        devices=devices,
        kernels=kernels,
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        available=available(),
        library=home,
        models=models,
        disk=shutil.disk_usage(existing).free,
        tools=tools[0] if tools else None,
        server=_server(),
        problems=tuple(problems),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(devices: tuple[Device, ...], *names: str) -> bool:
    return any(device.name.startswith(names) for device in devices)


def _server() -> ServerBinary | None:
    try:
        return find_server()
    except InputError:
        return None
