"""A reply drawn as it comes: Markdown on a terminal, without flicker.

Blocks that are finished are written once and never touched again. Of the open one only lines that changed are
written again, and nothing that has left the screen: a reply may be longer than the screen, and the window may
change its size at any moment, without a line being lost or shown twice.

Drawing is a thread's work, at most 20 times a second and at most a twentieth of one core: the other cores, and
most of this one, belong to the model.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len
from rich.text import Text

from localmix.inert import inert

if TYPE_CHECKING:
    from rich.console import Console

    from localmix.cli.markdown import Block

INTERVAL = 0.05
_SHARE = 20  # a drawing is followed by a pause so many times as long
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_FALLBACK = os.terminal_size((80, 24))


class LiveReply:
    """Draws one reply; use as a context manager, give it the pieces with `feed`.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._stream = stream
        self._painter: Console = Console(file=io.StringIO(), force_terminal=True, highlight=False, legacy_windows=False)
        self._source = ""  # from the open block on
        self._before: Block | None = None  # the last finished block
        self._canvas = Canvas()
        self._width = 0  # of the open block: it keeps the width that it began with
        self._lock = threading.Lock()
        self._fed = threading.Event()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="reply", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> LiveReply:
        self._thread.start()
        return self

    def feed(self, text: str) -> None:
        """The next characters of the reply."""
        with self._lock:
            self._source += inert(text)
        self._fed.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._fed.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure
        if self._failure is None:
            self._draw(final=True)

    def _keep_drawing(self) -> None:
        try:
            while not self._finished.is_set():
                self._fed.wait()
                self._fed.clear()
                started = time.thread_time()
                self._draw(final=False)
                self._finished.wait(max(INTERVAL, _SHARE * (time.thread_time() - started)))
        except BaseException as error:  # the terminal is gone: the thread that asked is to hear of it
            self._failure = error

    def _draw(self, final: bool) -> None:
        from localmix.cli.markdown import blocks, decided, foreseen

        with self._lock:
            source = self._source
        screen = _screen(self._stream)
        written: list[str] = []
        parts = blocks(source if final else decided(source), self._before)
        finished = parts if final else parts[:-1]
        for block in finished:
            written += self._place(block, screen), self._canvas.close()
            self._before, self._width = block, 0
        if not final and parts:
            seen = dataclasses.replace(parts[-1], source=foreseen(parts[-1].source))
            if seen.source.strip():
                written.append(self._place(seen, screen))
        with self._lock:
            self._source = self._source[sum(len(block.source) for block in finished) :]
        if any(written):
            self._stream.write("".join(written))
            self._stream.flush()

    def _place(self, block: Block, screen: os.terminal_size) -> str:
        from localmix.cli.markdown import lines

        self._width = self._width or max(screen.columns - 1, 1)
        texts = lines(block, self._width)
        if self._before is not None and not block.follows:
            texts.insert(0, Text())
        # painting is most of the work: not for lines that stay as they are
        drawn = ["" if place < self._canvas.fixed else self._paint(line) for place, line in enumerate(texts)]
        return self._canvas.draw(drawn, screen)

    def _paint(self, line: Text) -> str:
        with self._painter.capture() as captured:
            self._painter.print(line, soft_wrap=True, end="")
        return captured.get()


class Canvas:
    """The lines of the open block on the terminal; the cursor stands at the end of the last one.

    Attributes:
        fixed: so many lines, from the first one on, can no longer be reached; what `draw` gets for them is not read.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._screen = _FALLBACK
        self.fixed = 0
        self._stale = False  # nobody knows where the last line begins: it can only be added to

    def draw(self, lines: list[str], screen: os.terminal_size) -> str:
        """What to write to have these lines in place of those before."""
        old, last = self._lines, len(self._lines) - 1
        if old and (screen.columns != self._screen.columns or screen.lines < self._screen.lines):
            # some terminals break the lines anew, some cut them
            self.fixed, self._stale = last, True
        self._screen = screen
        if len(lines) <= self.fixed:
            return ""
        first = self.fixed
        while first < min(len(old), len(lines)) and old[first] == lines[first]:
            first += 1
        if first == len(old) == len(lines):
            return ""
        if first < len(old) and self._stale:
            return self._go_on(lines)
        if first == len(old):
            written = "\n" if old else ""
        elif first == last and first < len(lines) and lines[first].startswith(old[first]):
            written = lines[first][len(old[first]) :] + ("\n" if len(lines) > len(old) else "")
            first += 1
        else:
            first = min(first, len(lines) - 1)  # the cursor is to end behind the last line
            up = sum(map(self._rows, old[first:])) - 1
            written = (f"\x1b[{up}A" if up else "") + "\r\x1b[J"
        if self._stale:
            self.fixed, self._stale = len(old), False
        written += "\n".join(lines[first:])
        self._lines = old[: self.fixed] + lines[self.fixed :]
        self._fix()
        return written

    def close(self) -> str:
        """What to write so that the block stays as it is."""
        written = "\n" if self._lines else ""
        self._lines, self.fixed, self._stale = [], 0, False
        return written

    def _go_on(self, lines: list[str]) -> str:
        """Add to a last line that cannot be written again: the letters that it lacks, wherever they are now."""
        here = len(self._lines) - 1
        shown = "".join(_plain(self._lines[here]).split())
        place, left = here, shown
        while place < len(lines):
            letters = "".join(_plain(lines[place]).split())
            if not left.startswith(letters):
                break
            left = left[len(letters) :]
            place += 1
        rest = _plain(lines[place]) if place < len(lines) else ""
        for letter in left:
            rest = rest.lstrip()
            if not rest.startswith(letter):  # it reads differently now
                place, rest = here, "\n" + lines[here]
                break
            rest = rest[1:]
        written = rest + "".join(f"\n{line}" for line in lines[place + 1 :])
        self._lines = lines
        self._stale = place >= len(lines) - 1
        self.fixed = min(place, len(lines) - 1) if self._stale else place + 1
        self._fix()
        return written

    def _fix(self) -> None:
        """Lines above the screen cannot be written again."""
        rows = 0
        for place in range(len(self._lines) - 1, self.fixed - 1, -1):
            rows += self._rows(self._lines[place])
            if rows >= self._screen.lines:
                self._stale = self._stale or place == len(self._lines) - 1
                self.fixed = min(place + 1, len(self._lines) - 1)
                return

    def _rows(self, line: str) -> int:
        """Rows of the screen that a line takes."""
        plain = _plain(line)
        rows, column = 1, 0
        for letter in plain if len(plain) * 2 > self._screen.columns else "":
            cells = cell_len(letter)
            if column + cells > self._screen.columns:  # a wide one does not fit into the last column
                rows, column = rows + 1, 0
            column += cells
        return rows


def _plain(line: str) -> str:
    """Without colours; everything else that drives a terminal was made inert before."""
    return _COLOURS.sub("", line)


def _screen(stream: TextIO) -> os.terminal_size:
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return _FALLBACK
    return os.terminal_size((size.columns or _FALLBACK.columns, size.lines or _FALLBACK.lines))
