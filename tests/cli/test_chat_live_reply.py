"""A reply that is drawn while it comes looks, at its end, as if it had come at once."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmix.cli.live_reply import Canvas, LiveReply
from tests.cli.test_chat_markdown import DOCUMENT, plain
from tests.commands import ROOT
from tests.terminal import Terminal

PLAYER = """
import random, sys, time
from pathlib import Path
from localmix.cli.live_reply import LiveReply
source, seed, pause = Path(sys.argv[1]).read_text(), int(sys.argv[2]), float(sys.argv[3])
choose = random.Random(seed)
print("BEGIN")
with LiveReply(sys.stdout) as live:
    while source:
        size = choose.randrange(1, 12)
        live.feed(source[:size])
        source = source[size:]
        time.sleep(pause)
print(f"END {seed}")
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="tmux")


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    (tmp_path / "player.py").write_text(PLAYER)
    return Terminal(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})


def play(terminal: Terminal, folder: Path, source: str, seed: int, pause: float) -> None:
    (folder / "source.md").write_text(source)
    terminal.type(f"clear; {sys.executable} player.py source.md {seed} {pause}")


def shown(screen: str) -> str:
    return "\n".join(line.rstrip() for line in screen.rpartition("BEGIN\n")[2].partition("\nEND")[0].splitlines())


def test_longer_than_the_screen(terminal: Terminal, tmp_path: Path) -> None:
    source = DOCUMENT * 3
    with terminal:
        terminal.resize(61, 12)
        for seed in (1, 2):
            play(terminal, tmp_path, source, seed, 0.002)
            screen = terminal.wait(f"END {seed}")
            whole = "\n".join(line.rstrip() for line in plain(source, 60).splitlines())
            assert shown(screen) == whole


def test_one_paragraph_and_one_list_item_longer_than_the_screen(terminal: Terminal, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(300))
    code = "\n".join(f"   line({number})" for number in range(40))
    source = f"{words}\n\n1. item\n   ```python\n{code}\n   ```\n2. end\n"
    with terminal:
        terminal.resize(61, 10)
        play(terminal, tmp_path, source, 3, 0.001)
        screen = terminal.wait("END")
        assert shown(screen) == "\n".join(line.rstrip() for line in plain(source, 60).splitlines())


def test_resized_in_the_middle(terminal: Terminal, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(400))
    with terminal:
        play(terminal, tmp_path, words, 4, 0.004)
        for columns, lines in ((50, 20), (90, 30), (40, 10), (100, 12)):
            terminal.wait("word", random.Random(columns).randrange(40))
            terminal.resize(columns, lines)
        screen = terminal.wait("END")
        found = re.findall(r"word\d+", shown(screen).replace("\n", " "))
        whole = [word for word in found if word in words.split()]
        # a window that shrinks may break a word in two, and nothing else
        assert len(set(whole)) > 390
        assert "".join(shown(screen).split()) == "".join(words.split())


def test_colours(terminal: Terminal, tmp_path: Path) -> None:
    with Terminal(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)}, colours=True) as coloured:
        play(coloured, tmp_path, DOCUMENT, 5, 0)
        coloured.wait("END")
        assert "\x1b[94mreturn" in coloured.coloured
    with terminal:
        play(terminal, tmp_path, DOCUMENT, 5, 0)
        terminal.wait("END")
        assert not re.search(r"\x1b\[(?:3[0-7]|9\d)m", terminal.coloured)
        assert "\x1b[1m" in terminal.coloured  # emphasis is no colour


class Screen:
    """A terminal as small as a test needs: rows without end, of which the last `lines` can be reached."""

    def __init__(self, columns: int, lines: int) -> None:
        self.size = os.terminal_size((columns, lines))
        self.rows = [""]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[AJ]|.|\n", text):
            top = max(len(self.rows) - self.size.lines, 0)
            if part == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row == len(self.rows))
            elif part == "\r":
                self.column = 0
            elif part.endswith("A") and len(part) > 1:
                assert self.row - int(part[2:-1]) >= top, "beyond the screen"
                self.row -= int(part[2:-1])
            elif part == "\x1b[J":
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            else:
                if self.column == self.size.columns:
                    self.write("\n")
                self.rows[self.row] = self.rows[self.row][: self.column] + part
                self.column += 1

    def shown(self, lines: list[str]) -> list[str]:
        """These lines as they are when written at once."""
        fresh = Screen(*self.size)
        fresh.write("\n".join(lines))
        return fresh.rows


LINES = st.lists(st.text("abc", max_size=25), min_size=1, max_size=9)


@given(LINES, st.lists(st.tuples(st.integers(0, 4), LINES), max_size=5), st.integers(2, 12), st.integers(4, 12))
@settings(max_examples=300)
def test_only_what_can_be_reached_is_written_again(
    lines: list[str], changes: list[tuple[int, list[str]]], columns: int, height: int
) -> None:
    screen, canvas = Screen(columns, height), Canvas()
    screen.write(canvas.draw(lines, screen.size))
    for back, more in changes:
        before = lines
        lines = [*lines[: max(len(lines) - back, 0)], *more]
        screen.write(canvas.draw(lines, screen.size))
        fits = sum(len(Screen(columns, height).shown([line])) for line in before) < height
        if not fits:  # lines that have left the screen stay as they were
            return
        assert screen.rows == screen.shown(lines)


@given(st.text("ab c中\n", min_size=1, max_size=300), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_what_grows_at_its_end_is_never_erased(text: str, size: int) -> None:
    canvas, output, screen = Canvas(), "", os.terminal_size((40, 10))
    for end in range(size, len(text) + size, size):
        output += canvas.draw(text[:end].split("\n"), screen)
    assert output == text


class Terminal80(io.StringIO):
    def fileno(self) -> int:
        raise OSError


def test_a_failure_of_the_terminal_reaches_the_one_who_feeds() -> None:
    class Broken(Terminal80):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError), LiveReply(Broken()) as live:
        live.feed("Hello\n\nworld")


def test_drawing_leaves_the_processor_to_the_model() -> None:
    """A reply that is much faster than any model on a laptop takes less than a tenth of one core."""
    stream = Terminal80()
    with LiveReply(stream) as live:
        live.feed("warm up\n\n")
        time.sleep(0.3)
        before, started = time.process_time(), time.monotonic()
        for number in range(25):
            live.feed(f"- item {number} with **some** `code` and words\n")
            time.sleep(0.04)
        share = (time.process_time() - before) / (time.monotonic() - started)
    assert share < 0.1
