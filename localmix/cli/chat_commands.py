"""What can be typed in the chat behind a slash: a row each, and the function that does it."""

from __future__ import annotations

import dataclasses
import os
import random
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix import library
from localmix.cli.chat_prompt import Choices, paths
from localmix.cli.chat_settings import LIMIT, SETTINGS, Setting
from localmix.conversation import session
from localmix.errors import FileError, InputError, UsageError

if TYPE_CHECKING:
    from localmix.cli.chat_terminal import Talk

_FILE_BYTES = 4 * 2**20  # no context holds more


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        argument: what may follow it, for the help.
        run: called with the chat and what follows the name; raises LocalmixError with a sentence for the user.
        choices: what its argument may be, for completion.
    """

    name: str
    argument: str
    about: str
    run: Callable[[Talk, str], None]
    choices: Choices | None = None


def _help(talk: Talk, _: str) -> None:
    rows = {f"{command.name} {command.argument}".strip(): command.about for command in COMMANDS.values()}
    talk.console.fields(rows)
    talk.console.note("Enter sends, Alt-Enter (or Escape, Enter) starts a new line, Tab completes.")


def _system(talk: Talk, text: str) -> None:
    if not text:
        talk.console.line(talk.conversation.system or "There is no system prompt.")
        return
    talk.conversation.system = text
    talk.start_again()
    talk.console.note("The conversation starts again with this system prompt.")


def _set(talk: Talk, text: str) -> None:
    name, _, value = text.partition(" ")
    if not name:
        sampling = dataclasses.asdict(talk.conversation.sampling) | {LIMIT: talk.conversation.limit}
        shown = {key: sampling[setting.field] for key, setting in SETTINGS.items()}
        talk.console.fields({key: _shown(SETTINGS[key], value) for key, value in shown.items()})
        return
    if name not in SETTINGS:
        raise UsageError(f"There is no setting {name!r}.", f"Settings: {', '.join(SETTINGS)}.")
    if not value.strip():
        raise UsageError(f"{name} needs a value.", f"{SETTINGS[name].about}")
    chosen = SETTINGS[name].parse(value.strip())
    talk.choose(SETTINGS[name].field, chosen)
    talk.console.note(f"{name}: {_shown(SETTINGS[name], chosen)}")


def _shown(setting: Setting, value: float | None) -> str:
    return setting.none if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _settings(typed: str) -> Iterator[tuple[str, str]]:
    if " " not in typed:
        yield from ((name, setting.about) for name, setting in SETTINGS.items())


def _retry(talk: Talk, _: str) -> None:
    question = _last_question(talk)
    if talk.conversation.sampling.temperature == 0:
        talk.console.note("With temperature 0 the reply stays the same.")
    seed = talk.conversation.sampling.seed
    if seed is not None:
        talk.choose("seed", random.Random(seed).randrange(2**32))  # another one, the same in every run
    talk.ask(question, again=talk.replaces_last)


def _edit(talk: Talk, _: str) -> None:
    talk.edit(_last_question(talk))


def _last_question(talk: Talk) -> str:
    if talk.unanswered is not None:
        return talk.unanswered
    if not talk.conversation.turns:
        raise UsageError("Nothing was asked yet.")
    return talk.conversation.turns[-2]["content"]


def _undo(talk: Talk, _: str) -> None:
    if not talk.conversation.turns:
        raise UsageError("Nothing was asked yet.")
    talk.forget_last()
    talk.save()
    left = len(talk.conversation.turns) // 2
    talk.console.note(f"The last question and its reply are taken back; {left} {_plural(left, 'question')} left.")


def _file(talk: Talk, text: str) -> None:
    if not text:
        raise UsageError("/file needs the path of a text file.")
    path = Path(os.path.expanduser(text))
    try:
        if not path.is_file():
            raise FileError(f"{path} is {'no file' if path.exists() else 'not there'}.")
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {(error.strerror or 'refused').lower()}.") from error
    if len(data) > _FILE_BYTES:
        raise InputError(f"{path} is longer than {_FILE_BYTES // 2**20} MiB.")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}).") from error
    talk.attach(path.name, content)
    talk.console.note(f"{path.name} ({len(content):,} characters) goes with the next question.")


def _save(talk: Talk, name: str) -> None:
    if not talk.conversation.turns:
        raise UsageError("There is nothing to save yet.")
    talk.keeper.save_as(name, talk.record())
    talk.save()
    name = talk.keeper.name
    talk.console.note(f"Saved as {name}: `localmix chat --session {shlex.quote(name)}` goes on with it.")


def _load(talk: Talk, name: str) -> None:
    if not name:
        raise UsageError("/load needs the name of a session.", "/sessions lists them.")
    talk.resume(name)


def _sessions(talk: Talk, _: str) -> None:
    from localmix.presentation.table import Column, Table

    found = session.find(talk.console.error)
    if not found:
        talk.console.note("No session was saved yet.")
        return
    rows = tuple(
        (
            f"{'* ' if one.name == talk.keeper.name else ''}{one.name}",
            Path(one.model).stem,
            str(one.questions),
            one.updated[:16].replace("T", " "),
            _opening(one),
        )
        for one in found
    )
    columns = (
        Column("Session", number=False),
        Column("Model", number=False, rank=3),
        Column("Questions", rank=2),
        Column("Saved (UTC)", number=False, rank=4),
        Column("Begins", number=False, rank=1),
    )
    talk.console.table(Table(columns, rows))


def _opening(one: session.Session, length: int = 30) -> str:
    text = " ".join(one.turns[0]["content"].split()) if one.turns else ""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _session_names(_: str) -> Iterator[tuple[str, str]]:
    yield from ((name, "") for name in session.names())


_EXPORTS: Mapping[str, Callable[[session.Session], str]] = {".md": session.as_markdown, ".json": session.as_json}


def _export(talk: Talk, text: str) -> None:
    from localmix.output import write_atomically

    if not talk.conversation.turns:
        raise UsageError("There is nothing to export yet.")
    record = talk.record()
    path = Path(os.path.expanduser(text or f"{record.name}.md"))
    if path.suffix not in _EXPORTS:
        raise UsageError(f"{path.name} ends neither with .md nor with .json.", "The ending chooses the format.")
    if path.exists():
        raise FileError(f"{path} is there already.", "Choose another name.")
    write_atomically(path, _EXPORTS[path.suffix](record).encode("utf-8", "replace"))
    talk.console.note(f"Exported to {path}.")


def _model(talk: Talk, name: str) -> None:
    if name:
        talk.switch_model(name)
        return
    talk.console.fields({"model": talk.model_name, "file": str(talk.conversation.engine.path)})
    _show_types(talk)


def _show_types(talk: Talk) -> None:
    """The model's files in the library, what each takes, and whether a machine of the size promised holds it."""
    from localmix.capacity import memory
    from localmix.capacity.fit import fit_table
    from localmix.presentation.table import Column, Table
    from localmix.sizes import size

    engine = talk.conversation.engine
    context, kv_type = engine.settings.context, engine.settings.kv_type
    floor = memory.machine(memory.FLOOR_GB)
    found = fit_table(engine.path, floor, contexts=[context], kv_type=kv_type)
    model, current = library.split_name(engine.path)
    rows = tuple(
        (
            f"{'* ' if row.type == current else ''}{model}:{row.type}",
            size(row.weights),
            size(need.total),
            verdict.value,
        )
        for row in found.rows
        if row.in_library
        for need, verdict in zip(row.needs, row.verdicts, strict=True)
    )
    if rows:
        columns = (
            Column("Model", number=False),
            Column("Size", rank=2),
            Column("Memory", rank=1),
            Column(f"In {memory.FLOOR_GB} GB", number=False),
        )
        talk.console.table(Table(columns, rows, f"Memory: with a context of {context} in {kv_type}."))


def _models(typed: str) -> Iterator[tuple[str, str]]:
    yield from library.complete(typed)
    yield from (choice for choice in paths(typed) if choice[0].endswith((".gguf", "/")))


def _stats(talk: Talk, _: str) -> None:
    from localmix.presentation.table import number

    reply = talk.conversation.last
    if reply is None:
        raise UsageError("There is no reply yet.")
    fields = {
        "context": talk.context_line(),
        "prompt": f"{reply.prompt_tokens} tokens, {reply.cached_tokens} of them from the cache,"
        f" {number(reply.pp_tps, 1)} tokens/s",
        "reply": f"{reply.completion_tokens} tokens, {number(reply.tg_tps, 1)} tokens/s",
        "first token": f"after {number(reply.first_token_seconds, 2)} s",
    }
    if reply.acceptance is not None:
        gain = f", {number(reply.speedup, 2)} times as fast" if reply.speedup is not None else ""
        fields["drafts"] = f"{reply.accepted} of {reply.drafted} tokens taken ({reply.acceptance:.0%}){gain}"
    memory = talk.engine_memory()
    if memory:
        fields["memory"] = memory
    talk.console.fields(fields)


def _context(talk: Talk, _: str) -> None:
    turns, dropped = talk.conversation.turns, talk.conversation.dropped
    fields = {"context": talk.context_line(), "system": f"{len(talk.conversation.system):,} characters"}
    asked = len(turns) // 2
    fields["conversation"] = (
        f"{asked} {_plural(asked, 'question')}, {sum(len(t['content']) for t in turns):,} characters"
    )
    if dropped:
        fields["left out"] = f"the oldest {dropped // 2}, since the context is full"
    loaded = talk.conversation.engine.loaded
    if loaded is not None:
        fields["trained for"] = f"{loaded.trained_context:,} tokens"
    talk.console.fields(fields)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _clear(talk: Talk, _: str) -> None:
    name = talk.keeper.name if talk.keeper.saved else ""
    talk.start_again()
    talk.console.note(f"A new conversation. The one before is saved as {name}." if name else "A new conversation.")


def _quit(talk: Talk, _: str) -> None:
    talk.leaving = True


COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command("/help", "", "show this", _help),
        Command("/system", "[TEXT]", "set the system prompt and start again; without TEXT show it", _system),
        Command("/set", "[NAME VALUE]", "change how replies are chosen; without NAME show it", _set, _settings),
        Command("/retry", "", "ask the last question again, with another seed", _retry),
        Command("/edit", "", "change the last question and ask it again", _edit),
        Command("/undo", "", "take the last question and its reply back", _undo),
        Command("/file", "PATH", "put a text file in front of the next question", _file, paths),
        Command("/save", "NAME", "name this conversation", _save),
        Command("/load", "NAME", "go on with a saved conversation", _load, _session_names),
        Command("/sessions", "", "list the saved conversations", _sessions),
        Command("/export", "[FILE]", "write the conversation as Markdown (.md) or JSON (.json)", _export, paths),
        Command("/model", "[MODEL]", "go on with another model or type; without MODEL list them", _model, _models),
        Command("/stats", "", "tokens, speed and memory of the last reply", _stats),
        Command("/context", "", "what the context holds", _context),
        Command("/clear", "", "start a new conversation", _clear),
        Command("/quit", "", "leave; so do Ctrl-D and Ctrl-C", _quit),
    )
}
