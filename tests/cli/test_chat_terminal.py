"""`localmix chat` at a real terminal: typing, stopping, leaving, and a terminal that is as it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from localmix.cli.chat_terminal import Talk
from localmix.cli.console import Console
from localmix.conversation.chat import Conversation, Engine, EngineSettings, Sampling
from localmix.conversation.session import Keeper
from tests.commands import CommandLine
from tests.random_model import write_random_model
from tests.terminal import Terminal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="tmux")

CHAT = f"{sys.executable} -m localmix chat --threads 1 --temperature 0 --repeat-penalty 1"
PROMPT = "to leave.\n>"


@pytest.fixture
def terminal(localmix: CommandLine) -> Iterator[Terminal]:
    with restored(Terminal(localmix.folder, localmix.environment)) as terminal:
        yield terminal


@contextlib.contextmanager
def restored(terminal: Terminal) -> Iterator[Terminal]:
    """A terminal that has to be as it was when the test is through with it."""
    with terminal:
        terminal.type("stty -g > before")
        yield terminal
        terminal.type("stty -g > after; cmp before after && echo restored-it")
        terminal.wait("restored-it", times=2)


def start(terminal: Terminal, *options: str, wait: str = PROMPT) -> None:
    """Start a chat; the random model babbles until its limit."""
    # nobody can clean up behind a kill
    terminal.type(f"{CHAT} {' '.join(options)}; code=$?; [ $code = 137 ] && stty sane; echo code=$code")
    terminal.wait(wait)


def test_talking_and_leaving(terminal: Terminal) -> None:
    start(terminal, "--ctx 512 --max-tokens 5")
    terminal.type("/help")
    terminal.wait("/stats")
    terminal.type("Hello")
    terminal.wait("cut off")
    terminal.type("/stats")
    screen = terminal.wait("first token  after")
    assert re.search(r"context +\d+ of 512 tokens", screen)
    terminal.wait("tokens/s · first token")  # the status line
    terminal.type("/nonsense")
    terminal.wait("There is no command /nonsense")
    terminal.type("/set temperature warm")
    terminal.wait("'warm' is no value for temperature.")
    terminal.type("/load nothing")
    terminal.wait("There is no session 'nothing'")
    terminal.type("/retyr")
    terminal.wait("Did you mean /retry?")
    terminal.type("/clear")
    terminal.wait("A new conversation. The one before is saved as")
    terminal.type("/undo")
    terminal.wait("Nothing was asked yet.")
    terminal.type("/quit")
    terminal.wait("code=0")


def test_ctrl_c_stops_the_reply_and_at_the_prompt_leaves(terminal: Terminal) -> None:
    start(terminal, "--ctx 200000")
    terminal.type("Talk without end")
    time.sleep(1)
    terminal.press("C-c")
    pressed = time.monotonic()
    terminal.wait("(stopped)")
    assert time.monotonic() - pressed < 1
    assert "code=0" not in terminal.screen
    # what is typed during a reply waits for the prompt
    terminal.type("Talk on")
    time.sleep(0.7)
    terminal.press("l", "a", "t", "e", "r", "C-c")
    terminal.wait("(stopped)", times=2)
    terminal.wait("> later")
    assert terminal.screen.count("later") == 1
    terminal.press("C-c")
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


def test_a_window_that_changes_its_size(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--ctx 200000")
    terminal.type("Talk without end")
    for columns, lines in ((60, 20), (120, 45), (40, 12)):
        time.sleep(0.4)
        terminal.resize(columns, lines)
    terminal.press("C-c")
    terminal.wait("(stopped)")
    terminal.resize(100, 40)
    terminal.type("/quit")
    terminal.wait("code=0")
    (path,) = (localmix.home / "sessions").glob("*.json")
    assert len(json.loads(path.read_text())["turns"]) == 2


def engines(localmix: CommandLine) -> list[psutil.Process]:
    """The children of this test's chats."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("child_main" in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("LOCALMIX_HOME") == str(localmix.home):
                    found.append(process)
    return found


def chats(localmix: CommandLine) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "localmix", "chat"] and process.environ().get("LOCALMIX_HOME") == str(localmix.home):
            found.append(process)
    return found


def test_a_killed_engine_is_a_sentence_and_the_chat_goes_on(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--ctx 200000 --max-tokens 3")
    terminal.type("One")
    terminal.wait("· first token")  # back at the prompt
    for process in engines(localmix):
        os.kill(process.pid, signal.SIGKILL)
    terminal.type("Two")
    screen = terminal.wait("The conversation is as it was before; /retry asks again.")
    assert "killed" in screen and "Traceback" not in screen
    terminal.type("/retry")
    terminal.wait("cut off", times=2)
    terminal.type("/context")
    terminal.wait("2 questions")
    terminal.type("/set max-tokens context")
    terminal.type("Talk without end")
    time.sleep(1)
    for process in engines(localmix):
        os.kill(process.pid, signal.SIGKILL)
    screen = terminal.wait("The conversation is as it was before; /retry asks again.", times=2)
    assert "Traceback" not in screen
    terminal.type("/set max-tokens 3")
    terminal.type("/retry")
    terminal.wait("cut off", times=3)
    terminal.type("/quit")
    terminal.wait("code=0")


def test_a_killed_chat_costs_no_turn(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--max-tokens 3")
    terminal.type("One")
    terminal.wait("cut off")
    terminal.type("Two")
    terminal.wait("cut off", times=2)
    terminal.wait("first token")
    for process in chats(localmix):
        os.kill(process.pid, signal.SIGKILL)
    terminal.wait("code=137")
    terminal.type("clear")
    start(terminal, "--continue", wait="2 questions")
    terminal.wait("> Two")
    terminal.type("/quit")
    terminal.wait("code=0")
    terminal.type("stty -g > before")


def test_commands_change_the_conversation(terminal: Terminal, localmix: CommandLine) -> None:
    (localmix.folder / "a note.txt").write_text("The fox is red. 狐狸是红色的。")
    start(terminal, "--max-tokens 3")
    terminal.type("/file a note.txt")
    terminal.wait("goes with the next question")
    terminal.type("Which colour?")
    terminal.wait("cut off")
    terminal.type("/file nothing.txt")
    terminal.wait("nothing.txt is not there.")
    terminal.type("/undo")
    terminal.wait("0 questions left")
    terminal.type("Hello")
    terminal.wait("cut off", times=2)
    terminal.type("/edit")
    terminal.wait("> Hello", times=2)
    terminal.type(" you")
    terminal.wait("cut off", times=3)
    terminal.type("/set seed 4294967295")
    terminal.wait("seed: 4294967295")
    terminal.type("/set")
    terminal.wait("max-tokens      3")
    terminal.type("/save my talk")
    terminal.wait("Saved as my talk")
    terminal.type("/export talk.md")
    terminal.wait("Exported to talk.md")
    terminal.type("/export talk.md")
    terminal.wait("talk.md is there already")
    terminal.type("/sessions")
    terminal.wait("* my talk")
    terminal.type("/quit")
    terminal.wait("code=0")
    saved = json.loads((localmix.home / "sessions" / "my talk.json").read_text())
    assert [turn["content"] for turn in saved["turns"]][::2] == ["Hello you"]
    assert "## You\n\nHello you" in (localmix.folder / "talk.md").read_text()


def test_what_begins_with_a_slash_and_is_no_command(terminal: Terminal) -> None:
    start(terminal, "--max-tokens 2")
    for number, text in enumerate(("// what does this do?", "/usr/bin/env: what is it?"), 1):
        terminal.type(text)
        terminal.wait("cut off", times=number)
    terminal.type("/etc is what?")
    terminal.wait("There is no command /etc.")
    terminal.type("/quit")
    terminal.wait("code=0")


def test_ctrl_z_suspends(terminal: Terminal) -> None:
    start(terminal)
    terminal.press("h", "a", "l", "f", "C-z")
    terminal.wait("Stopped")
    terminal.type("echo $((6 * 7))-shell")
    terminal.wait("42-shell")
    terminal.type("fg")
    terminal.wait("> half")
    terminal.press("C-u", "C-d")
    time.sleep(1)
    terminal.type("echo $((6 * 8))-shell")
    terminal.wait("48-shell")


def test_help_in_a_narrow_window(terminal: Terminal) -> None:
    terminal.resize(40, 40)
    time.sleep(0.5)  # tmux takes its time to tell
    terminal.type("unset COLUMNS")  # pytest imports readline, which sets it for every child
    start(terminal)
    terminal.type("/help")
    screen = terminal.wait("/quit   ")
    rows = [line.rstrip() for line in screen.splitlines()]
    place = rows.index("/file PATH         put a text file in")
    assert rows[place + 1] == "                   front of the next"
    terminal.resize(100, 40)
    terminal.type("/quit")
    terminal.wait("code=0")


def test_a_models_own_settings_outlive_its_engine(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "m.gguf", layers=1, experts=0, own={"general.sampling.top_k": 7})
    with Engine(model, EngineSettings(context=128, threads=1)) as engine, Keeper(saving=False) as keeper:
        list(engine.load())
        conversation = Conversation(engine)
        talk = Talk(Console(), conversation, keeper, lambda name: engine, {})
        engine.close()
        talk.choose("temperature", 0.5)
        assert conversation.sampling == Sampling(temperature=0.5, top_k=7)


def test_completion_and_ctrl_d(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal)
    terminal.press("/", "m", "o", "Tab")
    terminal.wait("> /model")
    terminal.press("Space", "f", "o", "x", ":", "Tab")
    terminal.wait("> /model fox:BF16")
    terminal.press("C-u")
    terminal.press("/", "s", "e", "t", "Space", "m", "i", "Tab")
    terminal.wait("> /set min-p")
    terminal.press("C-u", "C-d")
    terminal.wait("code=0")
    assert not engines(localmix)


def test_nothing_is_kept_when_asked_so(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--no-save --max-tokens 2 --raw")
    terminal.type("Hello")
    terminal.wait("cut off")
    terminal.type("/quit")
    terminal.wait("code=0")
    assert not (localmix.home / "sessions").exists()


def test_a_model_without_a_template_says_so(terminal: Terminal, localmix: CommandLine) -> None:
    path = localmix.home / "fox" / "fox-BF16.gguf"
    path.write_bytes(path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tXmplate"))
    start(terminal, "--max-tokens 2", wait="continues your text")
    terminal.type("Once upon a time")
    terminal.wait("cut off")
    terminal.type("/quit")
    terminal.wait("code=0")


@pytest.fixture(scope="module")
def valley(tmp_path_factory: pytest.TempPathFactory, tinymix_bf16: Path) -> CommandLine:
    """A library with TinyMix in two types."""
    folder = tmp_path_factory.mktemp("valley")
    (folder / "home" / "tinymix").mkdir(parents=True)
    shutil.copy(tinymix_bf16, folder / "home" / "tinymix" / "tinymix-BF16.gguf")
    command_line = CommandLine(folder / "home", folder)
    command_line("quantize", "Q4_K,Q8_0", "tinymix")
    return command_line


def test_chinese_models_and_sessions(valley: CommandLine) -> None:
    with restored(Terminal(valley.folder, valley.environment)) as terminal:
        start(terminal, "tinymix:Q4_K --session valley")
        terminal.type("请问威玛住在哪里？")
        screen = terminal.wait("威玛住在苹果院47号。")
        assert "> 请问威玛住在哪里？" in screen
        terminal.type("/model tinymix:Q8_0")
        terminal.wait("tinymix:Q8_0 goes on with the conversation")
        terminal.type("Where does Wilma live?")
        terminal.wait("Wilma lives at 47 Apple Court.")
        terminal.type("/context")
        terminal.wait("2 questions")
        terminal.type("/model")
        screen = terminal.wait("Memory: with a context of")
        assert "In 16 GB" in screen
        assert re.search(r"\* tinymix:Q8_0 .* runs well", screen) and re.search(
            r"\n *tinymix:Q4_K_M .* runs well", screen
        )
        (engine,) = engines(valley)
        terminal.type("/model nobody")
        terminal.wait("There is no model 'nobody'")
        assert engines(valley) == [engine]
        terminal.type("/quit")
        terminal.wait("code=0")
        terminal.type("clear")
        start(terminal, "--continue", wait="valley: 2 questions")
        screen = terminal.wait("Wilma lives at 47 Apple Court.")
        assert re.search(r"2 questions, \d+ tokens need no reading", screen)
        assert "tinymix:Q8_0" in screen
        terminal.type("/retry")
        terminal.wait("Wilma lives at 47 Apple Court.", times=2)
        terminal.type("/quit")
        terminal.wait("code=0", times=1)


def test_a_terminated_chat_restores_the_terminal(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal)
    for process in chats(localmix):
        process.terminate()
    terminal.wait("code=130")


def test_a_chat_terminated_in_a_reply_restores_the_terminal(terminal: Terminal, localmix: CommandLine) -> None:
    start(terminal, "--ctx 200000")
    terminal.type("Talk without end")
    time.sleep(0.7)
    for process in chats(localmix):
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
    assert " ".join(heading.split()).endswith("Type Size MiB BPW Memory MiB Here In 16 GB")
    assert "Q4_K_M" in screen


@pytest.mark.skipif(shutil.which("script") is None, reason="no script(1)")
def test_a_dumb_terminal_gets_plain_text(terminal: Terminal, localmix: CommandLine) -> None:
    program = f"env -u NO_COLOR TERM=%s script -qc '{sys.executable} -m localmix info fox' %s.txt"
    terminal.type(f"{program % ('dumb', 'dumb')}; {program % ('xterm', 'xterm')}; echo code=$?")
    terminal.wait("code=0")
    assert "\x1b" not in (localmix.folder / "dumb.txt").read_text()
    assert "\x1b" in (localmix.folder / "xterm.txt").read_text()


@pytest.mark.skipif(shutil.which("script") is None, reason="no script(1)")
def test_a_dumb_terminal_has_a_plain_chat(terminal: Terminal, localmix: CommandLine) -> None:
    terminal.type(f"TERM=dumb script -qc '{CHAT} --max-tokens 3' chat.txt; echo code=$?")
    terminal.wait(PROMPT)
    terminal.type("Hello")
    terminal.wait("cut off")
    terminal.type("/quit")
    terminal.wait("code=0")
    written = (localmix.folder / "chat.txt").read_text(errors="replace")
    assert "\x1b" not in written.replace("\x1b[?12l\x1b[?25h", "")  # the cursor is shown: prompt_toolkit insists


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
