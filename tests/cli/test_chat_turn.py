"""One turn on the screen: Ctrl-C, and what goes to a stdout that is no terminal."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest

from localmix.cli.chat_turn import show_reply, silent_keyboard, stop_on_interrupt
from localmix.cli.console import Console
from localmix.conversation.chat import Engine, EngineSettings
from localmix.conversation.chat_events import Dropped, Event, Piece, Reply

REPLY = Reply("Hi\x1b[2J **you**", 1, 0, 1, "stop", None, None, None)
EVENTS: tuple[Event, ...] = (Dropped(4), Piece("Hi\x1b"), Piece("[2J **you**"), REPLY)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_second_ctrl_c_is_the_programs() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        with (
            Engine(Path("none.gguf"), EngineSettings()) as engine,
            pytest.raises(KeyboardInterrupt),
            stop_on_interrupt(engine),
        ):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_run_that_ends_meanwhile_is_not_interrupted_again() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Engine(Path("none.gguf"), EngineSettings()) as engine:
            with pytest.raises(SystemExit), stop_on_interrupt(engine):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a SIGTERM does that ends the program
                raise SystemExit
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_pipe_gets_the_text_and_stderr_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_reply(Console(), iter(EVENTS)) is REPLY
    out, err = capsys.readouterr()
    assert out == "Hi␛[2J **you**\n"
    assert err == "The context is full: the oldest 2 questions and their replies are left out from now on.\n"


def test_quiet_draws_no_reply(capsys: pytest.CaptureFixture[str]) -> None:
    show_reply(Console(), iter(EVENTS), quiet=True)
    assert capsys.readouterr().out == ""


def test_a_stdin_that_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with silent_keyboard():
        pass
