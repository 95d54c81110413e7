"""Conversations on the disk: saved after every turn, whole or not at all, with the model's KV state beside them.

A session is a JSON file, `sessions/NAME.json` in the library's folder; `NAME.kv` beside it is what the model's
cache held, so that going on costs no reading. The text is what counts: a state that is missing, deleted for want
of room, or of another model costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from localmix import library
from localmix.errors import FileError, InputError, LocalmixError, UsageError
from localmix.output import TransientLock, file_error, write_atomically

FORMAT = "localmix-session"
VERSION = 1
SIZE_LIMIT = 64 * 2**20  # bytes of a session's file; a longer one is none of ours
STATES_LIMIT = 4 * 2**30  # bytes of all states together

_SUFFIX = ".json"
_STATE_SUFFIX = ".kv"
_NAME_BYTES = 200  # of the 255 that file systems allow, less what locks and partial files add
_NAME = re.compile(r"[^\W_][\w.+ -]{0,99}", re.UNICODE)
# Windows takes them for devices, whatever their suffix
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Session:
    """A conversation and how it was led.

    Attributes:
        model: the path of the model's file.
        turns: messages with the keys `role` (user and assistant in turn) and `content`.
        dropped: how many of them are left out of the prompt, because the context was full.
        sampling: the fields of `sampling.Sampling` that the user chose.
        limit: most tokens of a reply; None for what the context has room for.
        created, updated: UTC, ISO 8601.
    """

    name: str
    model: str = ""
    system: str = ""
    turns: tuple[Mapping[str, str], ...] = ()
    dropped: int = 0
    sampling: Mapping[str, float | int | None] = field(default_factory=dict)
    limit: int | None = None
    created: str = ""
    updated: str = ""

    @property
    def questions(self) -> int:
        """How many the user asked."""
        return sum(turn["role"] == "user" for turn in self.turns)


def folder() -> Path:
    """Where sessions lie; it may not exist yet."""
    return library.home() / "sessions"


def path_of(name: str) -> Path:
    """The file of a session.

    Raises:
        UsageError: the name is no safe name for a file.
    """
    if (
        not _NAME.fullmatch(name)
        or name.endswith((".", " "))
        or _DEVICES.fullmatch(name)
        or len(name.encode("utf-8", "replace")) > _NAME_BYTES
    ):
        raise UsageError(
            f"{name!r} cannot be the name of a session.",
            "Use letters, digits, spaces and . + - _, at most 100 of them (66 Chinese ones), beginning with a letter"
            " or a digit.",
        )
    return folder() / f"{name}{_SUFFIX}"


def state_path(name: str) -> Path:
    """The file of a session's KV state.

    Raises:
        UsageError: as `path_of`.
    """
    return path_of(name).with_suffix(_STATE_SUFFIX)


def fresh_name() -> str:
    """A name for a new session, after the time, that no session has."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name, number = now, 1
    while path_of(name).exists():
        number += 1
        name = f"{now}-{number}"
    return name


def exists(name: str) -> bool:
    """Whether there is a session of that name.

    Raises:
        UsageError: as `path_of`.
    """
    return path_of(name).exists()


@contextlib.contextmanager
def claim(name: str) -> Iterator[None]:
    """Keep a session to oneself: of two chats the one that saves last would undo the other's turns.

    Raises:
        UsageError: another chat has it open.
        FileError: the folder cannot be made or written to.
    """
    path = path_of(name)
    lock = TransientLock(path.with_name(f".{path.name}.lock"))
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        # one that is just being released looks taken at first
        lock.acquire(timeout=0.2, poll_interval=0.02)
    except filelock.Timeout:
        raise UsageError(f"The session {name} is open in another chat.", "Close it there first.") from None
    except OSError as error:
        raise file_error(error, folder(), "write to") from error
    try:
        yield
    finally:
        lock.release()


def write(session: Session) -> Session:
    """Save a session; its file holds the earlier turns or all of them at any moment.

    Returns:
        the session with its times.

    Raises:
        LocalmixError: the disk is full or refuses.
    """
    path = path_of(session.name)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session = dataclasses.replace(session, created=session.created or now, updated=now)
    document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(session)}
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise file_error(error, folder(), "make") from error
    # escapes: half a pair of UTF-16 can be typed, and a path need not be UTF-8
    write_atomically(path, json.dumps(document, indent=1).encode("ascii"))
    return session


def read(name: str) -> Session:
    """The session of that name.

    Raises:
        UsageError: there is none, or the name is unsafe.
        InputError: its file is damaged, or of a newer version of localmix.
        FileError: it cannot be read.
    """
    path = path_of(name)
    if not path.exists():
        raise UsageError(f"There is no session {name!r}.", _what_there_is())
    return _read(path)


def _read(path: Path) -> Session:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise file_error(error, path, "read") from error
    try:
        if len(data) > SIZE_LIMIT:
            raise ValueError(f"it is longer than {SIZE_LIMIT // 2**20} MiB")
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("it is no session of localmix")
        version = document.get("version")
        if not isinstance(version, int) or version < 1:
            raise ValueError("it has no version")
        if version > VERSION:
            raise InputError(f"{path} was written by a newer localmix (version {version} of the format).", "Update it.")
        return _session(path.name.removesuffix(_SUFFIX), document)
    except (ValueError, RecursionError) as error:
        reason = "it is no JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)
        raise InputError(f"The session {path} is damaged: {reason}.", "Delete it, or mend it by hand.") from error


def _session(name: str, document: Mapping[str, Any]) -> Session:
    """What a document says; the file's name counts, which may have been changed by hand."""
    texts = {}
    for key in ("model", "system", "created", "updated"):
        texts[key] = document.get(key, "")
        if not isinstance(texts[key], str):
            raise ValueError(f"its {key} is no text")
    turns = document.get("turns")
    if not isinstance(turns, list):
        raise ValueError("it has no turns")
    for place, turn in enumerate(turns):
        role = "assistant" if place % 2 else "user"
        if not isinstance(turn, dict) or turn.get("role") != role or not isinstance(turn.get("content"), str):
            raise ValueError(f"turn {place} is no message of the {role}")
        turn["content"].encode("utf-8")  # half a pair of UTF-16 is a ValueError
    if len(turns) % 2:
        raise ValueError("its last question has no reply")
    sampling = document.get("sampling", {})
    if not isinstance(sampling, dict):
        raise ValueError("its sampling is no table of settings")
    limit, dropped = document.get("limit"), document.get("dropped")
    return Session(
        name=name,
        dropped=min(max(dropped, 0), len(turns)) if isinstance(dropped, int) else 0,
        turns=tuple({"role": turn["role"], "content": turn["content"]} for turn in turns),
        sampling={key: value for key, value in sampling.items() if value is None or _is_number(value)},
        limit=limit if _is_number(limit) and isinstance(limit, int) and limit > 0 else None,
        **texts,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0


def find(warn: Callable[[LocalmixError], None] | None = None) -> list[Session]:
    """All sessions, the latest first.

    Args:
        warn: called with an error for each file that is damaged or newer than this localmix.

    Raises:
        FileError: the folder cannot be read.
    """
    found = []
    try:
        paths = sorted(folder().glob(f"[!.]*{_SUFFIX}"))
    except OSError as error:
        raise FileError(f"The sessions in {folder()} cannot be read: {error.strerror}.") from error
    for path in paths:
        try:
            found.append(_read(path))
        except LocalmixError as error:
            if warn is not None:
                warn(error)
    return sorted(found, key=lambda session: session.updated, reverse=True)


def names() -> list[str]:
    """Of all sessions, without looking into them: for completion."""
    with contextlib.suppress(OSError):
        return sorted(path.name.removesuffix(_SUFFIX) for path in folder().glob(f"[!.]*{_SUFFIX}"))
    return []


def _what_there_is() -> str:
    known = names()
    return f"There are {', '.join(known)}." if known else "None was saved yet."


def rename(old: str, new: str) -> None:
    """Give a session another name, and its state with it.

    Raises:
        UsageError: the new name is unsafe, or taken.
        FileError: a file cannot be renamed.
    """
    if exists(new):
        raise UsageError(f"There is a session {new!r} already.", "Choose another name.")
    try:
        with contextlib.suppress(FileNotFoundError):
            state_path(old).replace(state_path(new))
        path_of(old).replace(path_of(new))
    except OSError as error:
        raise file_error(error, path_of(old), "rename") from error


def limit_states(keep: str = "", limit: int = STATES_LIMIT) -> list[Path]:
    """Delete the oldest KV states until all together take no more than `limit` bytes; texts stay.

    What a chat that was killed in the middle of writing left of one counts too.

    Args:
        keep: the session whose state is deleted last.

    Returns:
        the files that were deleted.
    """
    states = []
    with contextlib.suppress(OSError):
        for path in [*folder().glob(f"*{_STATE_SUFFIX}"), *folder().glob(f".*{_STATE_SUFFIX}.partial")]:
            with contextlib.suppress(OSError):  # another chat deleted it
                status = path.stat()
                states.append((path.name == f"{keep}{_STATE_SUFFIX}", status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, _, size, _ in states)
    deleted = []
    for _, _, size, path in sorted(states):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
            deleted.append(path)
    return deleted


def as_markdown(session: Session) -> str:
    """A conversation to read: a heading for each speaker."""
    parts = [f"# {session.name}", f"{Path(session.model).stem}, {session.updated or session.created}".strip(", ")]
    if session.system:
        parts += ["## System", session.system]
    for turn in session.turns:
        parts += ["## You" if turn["role"] == "user" else "## Model", turn["content"]]
    return "\n\n".join(parts) + "\n"


def as_json(session: Session) -> str:
    """A conversation for programs: the messages as every chat API has them."""
    system = [{"role": "system", "content": session.system}] if session.system else []
    document = {"name": session.name, "model": session.model, "messages": [*system, *session.turns]}
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


class Keeper:
    """Saves one conversation, under a name that no other chat can take meanwhile; use as a context manager.

    Args:
        saving: False keeps nothing, until `save_as` is asked for.

    Attributes:
        name: of the session; empty until it is first saved.
        saved: whether it is on the disk.
    """

    def __init__(self, saving: bool = True) -> None:
        self.saving = saving
        self.name = ""
        self.saved = False
        self._created = ""
        self._claim = contextlib.ExitStack()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._claim.close()

    def open(self, name: str) -> Session | None:
        """Take up the session of that name, and let go of the one before; None if it is a new one.

        Raises:
            LocalmixError: as `read` and `claim`; the session before is then kept.
        """
        if name == self.name and self.saved:
            return read(name)
        fresh = contextlib.ExitStack()
        with fresh:
            fresh.enter_context(claim(name))
            found = read(name) if exists(name) else None
            self._take(name, fresh.pop_all())
        self.saved, self._created = found is not None, found.created if found else ""
        return found

    def start_again(self) -> None:
        """Let go of the session: what is saved next is a new one."""
        self._take("", contextlib.ExitStack())
        self.saved, self._created = False, ""

    def save(self, record: Session) -> None:
        """Save the conversation under the session's name, or under a new one after the time.

        Raises:
            LocalmixError: as `write` and `claim`.
        """
        if not self.saving:
            return
        if not self.name:
            name, fresh = fresh_name(), contextlib.ExitStack()
            fresh.enter_context(claim(name))
            self._take(name, fresh)
        written = write(dataclasses.replace(record, name=self.name, created=self._created))
        self.saved, self._created = True, written.created

    def save_as(self, name: str, record: Session) -> None:
        """Save the conversation under a name of the user's; from now on it is kept there.

        Raises:
            UsageError: the name is unsafe, or taken.
            LocalmixError: as `write` and `claim`.
        """
        if name and name != self.name:
            if exists(name):
                raise UsageError(f"There is a session {name!r} already.", "Choose another name.")
            with contextlib.ExitStack() as fresh:
                fresh.enter_context(claim(name))
                if self.saved:
                    rename(self.name, name)
                self._take(name, fresh.pop_all())
        self.saving = True
        self.save(record)

    def _take(self, name: str, claim: contextlib.ExitStack) -> None:
        self._claim.close()
        self.name, self._claim = name, claim
