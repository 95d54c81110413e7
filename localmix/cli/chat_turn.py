"""One turn of the chat on the screen: what is shown while the model reads and answers, and what Ctrl-C does then."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from localmix.cli.console import Console
from localmix.conversation.chat_events import Dropped, Event, Loading, Piece, Reading, Reply

if TYPE_CHECKING:
    from localmix.conversation.chat import Engine

_STATUS_TOKENS = 256  # a shorter prompt is read before anybody could read about it


def draws_markdown(raw: bool) -> bool:
    """Whether replies are drawn: on a terminal that can, unless the user wants them as they are."""
    return not raw and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def prepare_drawing(raw: bool) -> None:
    """Import what draws replies while the model loads in its own process: the first word then comes sooner."""

    def prepare() -> None:
        from localmix.cli import live_reply, markdown

        live_reply.LiveReply(sys.stdout)
        markdown.lines(markdown.Block("a", "paragraph"), 80)

    if draws_markdown(raw):
        threading.Thread(target=prepare, daemon=True).start()


def show_reply(console: Console, events: Iterator[Event], *, raw: bool = False, quiet: bool = False) -> Reply:
    """Draw the events of one question as they come; the reply at their end.

    Args:
        raw: the model's text as it is, also on a terminal.
        quiet: draw no reply.
    """
    reply: Reply | None = None
    waiting = False
    with contextlib.ExitStack() as stack:
        stack.callback(console.status)
        write: Callable[[str], None] | None = None
        for event in events:
            if isinstance(event, Loading) or (isinstance(event, Reading) and event.total >= _STATUS_TOKENS):
                what = event.share if isinstance(event, Loading) else event.done / event.total
                console.status(f"{'Loading' if isinstance(event, Loading) else 'Reading'}: {what:.0%}")
                waiting = True
            elif isinstance(event, Dropped):
                count = event.turns // 2
                questions = "question and its reply" if count == 1 else f"{count} questions and their replies"
                console.note(f"The context is full: the oldest {questions} are left out from now on.")
            elif isinstance(event, Piece) and not quiet:
                if waiting:
                    console.status()
                    waiting = False
                write = write or stack.enter_context(_writer(console, raw))
                write(event.text)
            elif isinstance(event, Reply):
                reply = event
    assert reply is not None
    return reply


def comment(console: Console, reply: Reply) -> None:
    """Say what the reply itself does not."""
    if reply.finish_reason == "stopped":
        console.note("(stopped)")
    elif reply.finish_reason == "length":
        console.note("(cut off: the reply reached its limit or the end of the context)")
    elif not reply.text:
        console.note("(no reply)")


@contextlib.contextmanager
def _writer(console: Console, raw: bool) -> Iterator[Callable[[str], None]]:
    """What takes the pieces of a reply, and ends its last line."""
    if draws_markdown(raw):
        from localmix.cli.live_reply import LiveReply

        with LiveReply(sys.stdout) as live:
            yield live.feed
        return
    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        console.stream(text)
        last = text

    try:
        yield write
    finally:
        if not last.endswith("\n"):
            console.stream("\n")


@contextlib.contextmanager
def stop_on_interrupt(engine: Engine) -> Iterator[None]:
    """The first Ctrl-C ends the reply, a second one the program."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        # not here: the main thread may be in the middle of writing to the same pipe
        threading.Thread(target=engine.stop, daemon=True).start()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        # a signal that ends the program has put another one there
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keyboard() -> Iterator[None]:
    """What is typed during a reply does not appear in the middle of it, but in the next question."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError, termios.error):  # Windows; a stdin that is no terminal
        yield
        return
    silent = list(before)
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH  # what was typed stays, also after a Ctrl-C
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):  # the terminal was closed
            termios.tcsetattr(terminal, termios.TCSANOW, before)
