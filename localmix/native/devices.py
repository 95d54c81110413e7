"""What llama.cpp can compute on: its devices with their memory, and how many threads to give the processor."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from localmix.errors import InputError, UsageError
from localmix.native.library import api, ggml

# words for devices that ggml names otherwise
_NAMES = {"metal": ("Metal", "MTL")}

_connected: list[str] = []  # servers of other machines, in the order of their devices

# enum ggml_backend_dev_type in ggml-backend.h
KINDS = ("cpu", "gpu", "integrated gpu", "accelerator", "meta")
REMOTE = "remote"  # of another machine; ggml calls it a GPU, whatever it is


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp found.

    Attributes:
        name: ggml's short name: `CPU`, `CUDA0`, `Metal`, `RPC0`.
        description: the product's name; of another machine its address.
        kind: one of `KINDS`, or `REMOTE`.
        free, total: bytes of memory; 0 and 0 mean that the driver does not say.
        server: where llama.cpp connects to use it; empty for this machine's own.
    """

    name: str
    description: str
    kind: str
    free: int
    total: int
    server: str = ""

    @property
    def title(self) -> str:
        """What a user knows it by."""
        return self.description if self.kind == REMOTE else self.name

    @property
    def shares_memory(self) -> bool:
        """Whether it computes in the processor's memory, so that what it holds counts there too."""
        return self.kind == "integrated gpu" or self.name.startswith(_NAMES["metal"])


@dataclass(frozen=True)
class Placement:
    """What of a model lies on a GPU, or on another machine.

    Attributes:
        gpu_layers: layers that do; None for as many as llama.cpp places there, 0 for no use of a GPU at all.
        cpu_expert_layers: of the first so many layers the experts stay in the processor's memory.
        devices: names of the devices to use, as `devices` gives them; empty for all.
        servers: where llama.cpp connects to have the devices of other machines; see `connect`.
        layer_counts: how many of the layers lie on each of `devices`; empty to go by their free memory.
    """

    gpu_layers: int | None = None
    cpu_expert_layers: int = 0
    devices: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    layer_counts: tuple[int, ...] = ()


ANYWHERE = Placement()
PROCESSOR = Placement(gpu_layers=0)


def devices() -> list[Device]:
    """Every device of the installed llama.cpp build, in its own order.

    Raises:
        InputError: llama.cpp cannot be loaded.
    """
    return [_describe(handle) for handle in _handles()]


def choose_gpus(found: Sequence[Device], wanted: str) -> list[Device]:
    """The GPUs among llama.cpp's devices that are meant.

    Args:
        wanted: `auto` for those that llama.cpp would take itself, `cpu` for none, a kind such as `cuda`, `metal` or
            `vulkan`, or names of devices with commas between.

    Raises:
        UsageError: there is none of that kind or name.
    """
    if wanted == "cpu":
        return []
    gpus = [device for device in found if device.kind in ("gpu", "integrated gpu")]
    if wanted == "auto":
        return [device for device in gpus if device.kind == "gpu"] or gpus
    chosen: list[Device] = []
    for word in wanted.split(","):
        prefixes = "|".join(_NAMES.get(word.lower(), (re.escape(word),)))
        pattern = re.compile(rf"(?:{prefixes})\d*", re.IGNORECASE)
        named = [gpu for gpu in gpus if gpu.name == word] or [gpu for gpu in gpus if pattern.fullmatch(gpu.name)]
        if not named:
            known = ", ".join(gpu.name for gpu in gpus)
            raise UsageError(
                f"llama.cpp finds no device {word} here.",
                f"It has {known}." if known else "It was built without a GPU: `make setup BACKEND=cuda` builds it in.",
            )
        chosen += [gpu for gpu in named if gpu not in chosen]
    return chosen


def has_gpu_backend() -> bool:
    """Whether llama.cpp was built for a GPU at all, from the names of its libraries: nothing is loaded."""
    return bool(_backends() - {"ggml-base", "ggml-cpu", "ggml-blas", "ggml-rpc"})


def has_rpc_backend() -> bool:
    """Whether llama.cpp was built so that it can use other machines."""
    return "ggml-rpc" in _backends()


def _backends() -> set[str]:
    package = importlib.util.find_spec("llama_cpp")
    folders = package.submodule_search_locations if package else None
    names = {library.name.partition(".")[0] for folder in folders or () for library in (Path(folder) / "lib").iterdir()}
    return {name.removeprefix("lib") for name in names if name.removeprefix("lib").startswith("ggml-")}


@cache
def _registry() -> ctypes.CDLL:
    api()  # registers the back ends
    names = {"win32": "ggml.dll", "darwin": "libggml.dylib"}
    folder = Path(str(api().__file__)).parent / "lib"
    registry = ctypes.CDLL(os.fspath(folder / names.get(sys.platform, "libggml.so")))
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    registry.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    registry.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_register.argtypes = [ctypes.c_void_p]
    registry.ggml_backend_register.restype = None
    return registry


def _handles() -> list[int]:
    registry = _registry()
    return [registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count())]


def connect(servers: Sequence[str]) -> None:
    """Have llama.cpp find the devices of other machines: `RPC0` and so on, in the order of the first connections.

    It aborts the process if there is no server of its own version; see `localmix.distribution` for what looks first.

    Args:
        servers: `HOST:PORT` each; those that are connected stay so.

    Raises:
        InputError: llama.cpp was built without its RPC back end.
    """
    if not servers:
        return
    backend = _registry().ggml_backend_reg_by_name(b"RPC")
    if not backend:
        raise InputError("llama.cpp was built without its RPC back end.", "Run `make setup`.")
    base = ggml()
    base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    address = base.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    base.ggml_backend_dev_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    base.ggml_backend_dev_init.restype = ctypes.c_void_p
    for server in servers:
        if server not in _connected:
            known = len(_handles())
            _registry().ggml_backend_register(add_server(server.encode()))
            # never freed: else llama.cpp ends its connection after each question, and somebody else may get the server
            base.ggml_backend_dev_init(_handles()[known], None)
            _connected.append(server)


def device_handle(name: str) -> int:
    """The `ggml_backend_dev_t` of a device.

    Raises:
        UsageError: there is none of that name.
    """
    found = {_name(handle): handle for handle in _handles()}
    if name not in found:
        raise UsageError(f"llama.cpp has no device {name!r} here.", f"It has {', '.join(found)}.")
    return found[name]


def processor_handle() -> int:
    """The `ggml_backend_dev_t` of the processor."""
    return next(handle for handle in _handles() if _kind(handle) == "cpu")


def buffer_owners() -> dict[str, str]:
    """For the name of each GPU's memory the GPU's own, which is another one on other machines."""
    base = ggml()
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_buft_name.restype = ctypes.c_char_p
    owners = {}
    for handle in _handles():
        if _kind(handle) not in ("gpu", "integrated gpu"):
            continue
        memory = ctypes.c_void_p(base.ggml_backend_dev_buffer_type(ctypes.c_void_p(handle)))
        owners[base.ggml_backend_buft_name(memory).decode()] = _name(handle)
    return owners


def cpu_buffer_type() -> int:
    """The `ggml_backend_buffer_type_t` of the processor's own memory."""
    base = ggml()
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    found: int = base.ggml_backend_dev_buffer_type(ctypes.c_void_p(processor_handle()))
    return found


def _describe(handle: int) -> Device:
    base = ggml()
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_backend_dev_memory.restype = None
    device = ctypes.c_void_p(handle)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name=_name(handle),
        description=base.ggml_backend_dev_description(device).decode(errors="replace"),
        kind=_kind(handle),
        free=free.value,
        total=total.value,
    )


def _name(handle: int) -> str:
    base = ggml()
    base.ggml_backend_dev_name.restype = ctypes.c_char_p
    found: bytes = base.ggml_backend_dev_name(ctypes.c_void_p(handle))
    return found.decode()


def _kind(handle: int) -> str:
    return KINDS[ggml().ggml_backend_dev_type(ctypes.c_void_p(handle))]


def default_threads() -> int:
    """Threads for llama.cpp: the fast physical cores that this process may use.

    ggml's threads spin while they wait for each other, so a second thread on a core, a slow core, or more
    threads than a container's quota make every step slower.
    """
    usable = _usable_processors()
    return max(1, min(_physical_cores(), usable, _cgroup_quota(Path("/proc/self/cgroup")) or usable))


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical_cores() -> int:
    if sys.platform == "darwin":
        library = ctypes.CDLL(None)
        for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):  # performance cores first
            value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
            if library.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0) == 0:
                return value.value
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _cgroup_quota(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole processors that the tightest `cpu.max` of this process's cgroup v2 ancestors allows, or None."""
    try:
        match = re.search(r"^0::(.*)$", membership.read_text(), re.MULTILINE)
    except OSError:
        return None
    if match is None:
        return None
    quotas = []
    folder = root / match[1].strip().lstrip("/")
    for ancestor in (folder, *folder.parents):
        try:
            quota, period = (ancestor / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            pass
        if ancestor == root:
            break
    return min(quotas, default=None)
