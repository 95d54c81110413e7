"""`localmix chat` at a real terminal: typing, stopping, leaving, and a terminal that is as it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.commands import CommandLine
from tests.terminal import Terminal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="tmux")

CHAT = f"{sys.executable} -m localmix chat --ctx 512 --threads 1 --temperature 0 --repeat-penalty 1"
PROMPT = "to leave.\n>"


@pytest.fixture
def terminal(localmix: CommandLine) -> Iterator[Terminal]:
    with Terminal(localmix.folder, localmix.environment) as terminal:
        terminal.type("stty -a | cksum > before")
        yield terminal
        terminal.type("stty -a | cksum > after; cmp before after && echo restored-it")
        terminal.wait("restored-it", times=2)


def start(terminal: Terminal, *options: str) -> None:
    """Start a chat; the random model babbles until its limit."""
    terminal.type(f"{CHAT} {' '.join(options)}; echo code=$?")
    terminal.wait(PROMPT)


def test_talking_and_leaving(terminal: Terminal) -> None:
    start(terminal, "--max-tokens", "5")
    terminal.type("/help")
    terminal.wait("/stats")
    terminal.type("Hello")
    terminal.wait("cut off")
    terminal.type("你好，世界")
    screen = terminal.wait("cut off", times=2)
    assert "> 你好，世界" in screen
    terminal.type("/stats")
    screen = terminal.wait("first token")
    assert re.search(r"context +\d+ of 512 tokens", screen)
    terminal.type("/nonsense")
    terminal.wait("There is no command /nonsense")
    terminal.type("/clear")
    terminal.wait("forgotten")
    terminal.type("/quit")
    terminal.wait("code=0")


def test_ctrl_c_stops_the_reply_and_at_the_prompt_leaves(terminal: Terminal) -> None:
    start(terminal, "--ctx", "200000")
    terminal.type("Talk without end")
    time.sleep(1)
    terminal.press("C-c")
    terminal.wait("(stopped)")
    terminal.type("/stats")
    screen = terminal.wait("first token")
    assert "code=0" not in screen
    terminal.press("C-c")
    terminal.wait("code=0")


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    start(terminal)
    terminal.press("C-d")
    terminal.wait("code=0")


def test_several_lines(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--max-tokens", "2")
    terminal.press("o", "n", "e", "M-Enter", "t", "w", "o", "Enter")
    terminal.wait("cut off")
    terminal.paste("first\nsecond")
    time.sleep(0.3)
    assert terminal.screen.count("cut off") == 1  # a pasted newline does not send
    terminal.press("Enter")
    terminal.wait("cut off", times=2)
    terminal.type("/quit")
    terminal.wait("code=0")
    history = (localmix.home / "chat_history").read_text()
    assert "+one\n+two\n" in history
    assert "+first\n+second\n" in history


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("child_main" in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_killed_engine_is_a_sentence_and_the_chat_goes_on(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--max-tokens", "3")
    terminal.type("One")
    terminal.wait("cut off")
    for process in engines():
        if process.environ().get("LOCALMIX_HOME") == str(localmix.home):
            os.kill(process.pid, signal.SIGKILL)
    terminal.type("Two")
    screen = terminal.wait("The conversation is as it was before.")
    assert "killed" in screen and "Traceback" not in screen
    terminal.type("Three")
    terminal.wait("cut off", times=2)
    terminal.type("/quit")
    terminal.wait("code=0")


def test_a_terminated_chat_restores_the_terminal(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "localmix", "chat"] and process.environ().get("LOCALMIX_HOME") == str(localmix.home):
            process.terminate()
    terminal.wait("code=130")


def test_a_progress_bar_is_drawn_and_gone(terminal: Terminal) -> None:
    terminal.type(f"{sys.executable} -m localmix ppl --corpus corpus.txt --ctx 64 --chunks 40 --no-speed")
    terminal.wait("BF16   ")
    terminal.wait("40 chunks of 64")
    assert "0:00:" not in terminal.screen


def test_output_into_a_file_is_plain(terminal: Terminal, localmix: CommandLine) -> None:
    terminal.type(f"{CHAT} -p Hello --max-tokens 4 > reply.txt; echo code=$?")
    terminal.wait("code=0")
    assert "\x1b" not in (localmix.folder / "reply.txt").read_text()


def test_a_narrow_terminal_gets_every_column(terminal: Terminal) -> None:
    terminal.type(f"COLUMNS=34 {sys.executable} -m localmix plan Q4_K Q8_0")
    screen = terminal.wait("parameters.")
    heading = next(line for line in screen.splitlines() if "BPW" in line)
    assert " ".join(heading.split()).endswith("Type Size MiB BPW Memory MiB Fits In 16 GB")
    assert "Q4_K_M" in screen


@pytest.mark.skipif(shutil.which("script") is None, reason="no script(1)")
def test_a_dumb_terminal_gets_plain_text(terminal: Terminal, localmix: CommandLine) -> None:
    program = f"env -u NO_COLOR TERM=%s script -qc '{sys.executable} -m localmix info fox' %s.txt"
    terminal.type(f"{program % ('dumb', 'dumb')}; {program % ('xterm', 'xterm')}; echo code=$?")
    terminal.wait("code=0")
    assert "\x1b" not in (localmix.folder / "dumb.txt").read_text()
    assert "\x1b" in (localmix.folder / "xterm.txt").read_text()


def test_rm_asks(terminal: Terminal, localmix: CommandLine) -> None:
    terminal.type(f"{sys.executable} -m localmix rm fox; echo code=$?")
    terminal.wait("[y/N]")
    terminal.type("n")
    terminal.wait("code=130")
    assert (localmix.home / "fox" / "fox-BF16.gguf").exists()
    terminal.type(f"{sys.executable} -m localmix rm fox; echo code=$?")
    terminal.wait("[y/N]", times=2)
    terminal.type("y")
    terminal.wait("code=0")
    assert not (localmix.home / "fox").exists()


def test_no_worker_outlives_its_chat(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal)
    terminal.type("/quit")
    terminal.wait("code=0")
    assert not [process for process in engines() if process.environ().get("LOCALMIX_HOME") == str(localmix.home)]
