"""A real terminal for tests: tmux, with a server of its own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pytest

WAIT_SECONDS = 20.0


class Terminal:
    """A shell in tmux; use as a context manager.

    Args:
        folder: where the shell starts.
        variables: its environment.
        colours: leave `NO_COLOR` out of it.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str], colours: bool = False) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("tmux is not installed (Debian: apt install tmux)")
        self._socket = f"localmix-{uuid.uuid4().hex[:12]}"
        self._folder = folder
        self._variables = {**variables, "LC_ALL": "C.UTF-8", "NO_COLOR": "" if colours else "1"}

    def __enter__(self) -> Terminal:
        settings = [argument for item in self._variables.items() for argument in ("-e", "=".join(item))]
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", *settings, "sh")
        # an interactive shell takes its prompt from nowhere else
        self.type(f"cd {shlex.quote(str(self._folder))}; PS1='ready$ '; clear")
        self.wait("ready$")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tmux("kill-server")

    def type(self, text: str) -> None:
        """Type a line and press Enter."""
        self._tmux("send-keys", "-l", text)
        self._tmux("send-keys", "Enter")

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names: `C-c`, `M-Enter`."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        """Give the window another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def paste(self, text: str) -> None:
        """Paste a text as a terminal does, bracketed."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")

    @property
    def coloured(self) -> str:
        """What is on the screen now, with the escape sequences that draw it so."""
        return self._tmux("capture-pane", "-p", "-e")

    @property
    def screen(self) -> str:
        """All that was shown, with what scrolled away; wrapped lines joined."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-1000").rstrip()

    def wait(self, words: str, times: int = 1) -> str:
        """Wait until the words have been on the screen so many times; what is there then."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            screen = self.screen
            if screen.count(words) >= times:
                return screen
            time.sleep(0.05)
        raise AssertionError(f"{words!r} did not appear {times} times:\n{self.screen}")

    def _tmux(self, *arguments: str) -> str:
        run = subprocess.run(
            ["tmux", "-u", "-L", self._socket, *arguments], capture_output=True, text=True, encoding="utf-8", check=True
        )
        return run.stdout
