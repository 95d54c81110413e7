"""The input line of the chat: several lines, history, completion of commands, and the status line below it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app_or_none
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth, is_dumb_terminal

from localmix.inert import inert

# What a command's argument may be: choices, each with what it is.
Choices = Callable[[str], Iterable[tuple[str, str]]]

_STYLE = Style.from_dict(
    {
        "bottom-toolbar": "noreverse dim",
        "prompt": "bold",
        # the terminal's own colours: readable on a dark and on a light ground
        "completion-menu": "bg:default fg:default",
        "completion-menu.completion.current": "reverse",
        "completion-menu.meta.completion": "bg:default fg:default dim",
        "completion-menu.meta.completion.current": "bg:default fg:default",
    }
)
_MENU_LINES = 5


class Prompt:
    """Reads what the user types.

    Args:
        commands: of each, what it does, and the choices for its argument.
        history: the file that keeps what was typed; without write access there is none.
        status: the parts of the status line, the most important first.
    """

    def __init__(
        self,
        commands: Mapping[str, tuple[str, Choices | None]],
        history: Path,
        status: Callable[[], list[str]],
    ) -> None:
        self._status = status
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            multiline=True,  # so that a pasted text stays whole
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=_history(history),
            completer=_Commands(commands),
            complete_while_typing=Condition(_is_command),
            reserve_space_for_menu=_MENU_LINES,
            enable_suspend=True,  # else Ctrl-Z becomes a part of the question
            bottom_toolbar=self._toolbar,
            style=_STYLE,
            # stdout may be a file; without an output of its own prompt_toolkit spares a dumb terminal its escapes
            output=None if is_dumb_terminal() else create_output(always_prefer_tty=True),
        )

    def ask(self, prefill: str = "") -> str:
        """What the user sends, without white space around it.

        Raises:
            EOFError, KeyboardInterrupt: the user leaves.
        """
        typed = self._session.prompt(default=prefill).strip()
        return typed.encode("utf-8", "replace").decode("utf-8")  # bytes that are no UTF-8 can be typed, too

    def _toolbar(self) -> str:
        """As many parts as the width has room for."""
        app = get_app_or_none()
        room = app.output.get_size().columns if app else 80
        parts = [inert(part) for part in self._status()]
        while len(parts) > 1 and get_cwidth(" · ".join(parts)) > room:
            parts.pop()
        return " · ".join(parts)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("tab")
    def _complete(event: KeyPressEvent) -> None:
        # at once: prompt_toolkit forgets a Tab that comes before the menu is there
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_next()
            return
        found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif found:
            buffer.insert_text(get_common_complete_suffix(buffer.document, found))
            buffer.start_completion()

    return keys


class _KeptHistory(FileHistory):
    """A file of what was typed; what a full disk has no room for is known until the end of the run."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history(file: Path) -> History:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.open("rb").close()
        return _KeptHistory(str(file))
    except OSError:  # a read-only home, a file that is none: then without
        return InMemoryHistory()


def _is_command() -> bool:
    app = get_app_or_none()
    return app is not None and app.current_buffer.text.startswith("/") and "\n" not in app.current_buffer.text


class _Commands(Completer):
    """Completes a command, then its argument."""

    def __init__(self, commands: Mapping[str, tuple[str, Choices | None]]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in typed:
            return
        name, space, argument = typed.partition(" ")
        choices: Iterable[tuple[str, str]]
        if not space:
            typed, choices = name, ((command, about) for command, (about, _) in self._commands.items())
        else:
            find = self._commands.get(name, ("", None))[1]
            typed, choices = argument, find(argument) if find else ()
        for choice, about in choices:
            if choice.lower().startswith(typed.lower()):
                yield Completion(choice, start_position=-len(typed), display=inert(choice), display_meta=inert(about))


def paths(typed: str) -> Iterator[tuple[str, str]]:
    """Files and folders whose path begins so."""
    folder, _, start = typed.rpartition("/")
    prefix = f"{folder}/" if "/" in typed else ""
    try:
        entries = sorted(os.scandir(os.path.expanduser(prefix) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(start) and (start.startswith(".") or not entry.name.startswith(".")):
            is_folder = entry.is_dir()
            yield f"{prefix}{entry.name}{'/' if is_folder else ''}", "folder" if is_folder else ""
