"""Load llama.cpp through the pinned llama-cpp-python, and listen to its log.

The only module that imports `llama_cpp`. Struct layouts and log lines are part of the contract, so
another version of the package is refused rather than tried.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from localmix.errors import InputError

PINNED_VERSION = "0.3.36"
LLAMA_CPP_COMMIT = "0c1e57098"

# ggml.h's levels; the table inside llama-cpp-python is older and takes errors for warnings.
LOG_INFO, LOG_WARN, LOG_ERROR, LOG_CONTINUED = 2, 3, 4, 5


class LogBuffer:
    """The last lines of llama.cpp's log, complete lines only, and the last error among them."""

    def __init__(self, keep: int = 400) -> None:
        self.lines: deque[str] = deque(maxlen=keep)
        self.last_error = ""
        self._partial = ""
        self._level = LOG_INFO
        self._listeners: list[list[str]] = []
        self._lock = threading.Lock()

    def add(self, level: int, text: str) -> None:
        """Take a piece of log as llama.cpp hands it out: a line may come in several pieces."""
        with self._lock:
            if level != LOG_CONTINUED:
                self._level = level
            *complete, self._partial = (self._partial + text).split("\n")
            for line in complete:
                self.lines.append(line)
                for listener in self._listeners:
                    listener.append(line)
                if self._level == LOG_ERROR and line.strip():
                    self.last_error = line.strip()

    @contextmanager
    def capture(self) -> Iterator[list[str]]:
        """Every complete line logged inside the block, in order."""
        _listen()
        lines: list[str] = []
        with self._lock:
            self._listeners.append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                # by identity: two captures may hold equal lines
                self._listeners = [listener for listener in self._listeners if listener is not lines]

    def reset(self) -> None:
        """Forget the last error before an operation whose own error is wanted."""
        self.last_error = ""


log = LogBuffer()
_kept: list[Any] = []  # callbacks whose pointers llama.cpp holds
_take_log: list[Callable[[], object]] = []  # empty until llama.cpp is loaded


@functools.cache
def api() -> ModuleType:
    """The low-level bindings (`llama_cpp.llama_cpp`), checked against the pin, with our log callback set.

    Raises:
        InputError: llama-cpp-python is missing, broken or of another version.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else an abort starts a debugger, where one is installed
    try:
        version, bindings = _bindings()
    except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
        raise InputError(
            f"llama-cpp-python cannot be loaded: {error}.", "Install it again with `make setup`."
        ) from error
    if version != PINNED_VERSION:
        raise InputError(
            f"llama-cpp-python {version} is installed, but localmix needs {PINNED_VERSION} exactly.",
            f"Run `pip install llama-cpp-python=={PINNED_VERSION}`.",
        )

    @bindings.llama_log_callback  # type: ignore[untyped-decorator]
    def receive(level: int, text: bytes | None, _: Any) -> None:
        log.add(level, (text or b"").decode("utf-8", "replace"))

    _kept.append(receive)
    _take_log.append(lambda: bindings.llama_log_set(receive, None))
    _listen()
    bindings.llama_backend_init()
    return bindings


def _listen() -> None:
    """Have llama.cpp's log come here, again too: importing the whole of llama-cpp-python takes it away."""
    for take in _take_log:
        take()


def _bindings() -> tuple[str, ModuleType]:
    """The package's version, and its module of C functions alone.

    What else the package imports (jinja2, diskcache, multiprocessing) takes three times as long as the functions do,
    and every child that runs a model would wait for it.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("it is not installed")
    version = re.search(r'^__version__ = "(.+?)"', Path(spec.origin).read_text("utf-8"), re.MULTILINE)
    whole = sys.modules.get("llama_cpp")
    sys.modules["llama_cpp"] = whole or importlib.util.module_from_spec(spec)  # not run
    try:
        bindings = importlib.import_module("llama_cpp.llama_cpp")
    finally:
        if whole is None:  # whoever imports the package later gets all of it
            sys.modules.pop("llama_cpp", None)
    return (version[1] if version else "of an unknown version"), bindings


@functools.cache
def ggml() -> ctypes.CDLL:
    """libggml-base, which holds the quantization kernels and the tensor struct.

    Raises:
        InputError: as `api`.
    """
    bindings = api()
    folder = Path(str(bindings.__file__)).parent / "lib"
    names = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}
    path = folder / names.get(sys.platform, "libggml-base.so")
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise InputError(
            f"{path} cannot be loaded: {error}.", "Install llama-cpp-python again with `make setup`."
        ) from error
