"""Chat: a conversation here, the model in a child process, and the reply as a stream of events between them.

    with Engine(path, EngineSettings(context=4096)) as engine:
        conversation = Conversation(engine)
        for event in conversation.ask("Hello"):
            if isinstance(event, Piece):
                print(event.text, end="")

What the cache holds of the conversation is not computed again in the next turn. A dead engine ends the turn,
not the conversation: the next `ask` starts it anew, with the cache that was saved last. When the context is full,
the oldest questions and answers are left out of the prompt, and a Dropped event says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from localmix.conversation.chat_events import (
    Answer,
    Ask,
    DraftSettings,
    Dropped,
    EngineSettings,
    Event,
    Loaded,
    Loading,
    Open,
    Overdue,
    Piece,
    Reading,
    Rendering,
    Reply,
    Request,
    RestoreState,
    SaveState,
    StateSaved,
)
from localmix.conversation.chat_template import HINT
from localmix.conversation.chat_worker import serve
from localmix.errors import InputError, Interrupted, LocalmixError
from localmix.sampling import Sampling
from localmix.worker import Worker

__all__ = [
    "Conversation",
    "DraftSettings",
    "Dropped",
    "Engine",
    "EngineSettings",
    "Event",
    "Loaded",
    "Loading",
    "Piece",
    "Reading",
    "Reply",
    "Sampling",
    "StateSaved",
]

TEMPLATE_SECONDS = 2.0
STOP_SECONDS = 0.12  # how long a stopped reply may take to end by itself


def start_child() -> Worker:
    """A child for an Engine that does not yet know its model; a context manager.

    It gets ready, which takes as long as the parent needs to find out what to load.
    """
    return Worker(serve)


class Engine:
    """A model in a child process, which is started when it is first needed and again when it died.

    Args:
        path: the GGUF file.
        settings: how to load it.
        child: one of `start_child` that runs already, to be used first.
    """

    def __init__(self, path: Path, settings: EngineSettings, child: Worker | None = None) -> None:
        self.path = path
        self.settings = settings
        self.loaded: Loaded | None = None
        self._spare = child
        self._worker: Worker | None = None
        self._requests = 0
        self._state: Path | None = None  # what was saved last, for the child that takes the place of a dead one
        self._asked = 0  # the number of the request that is running, if it is for a reply
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; another `load` or `reply` starts it again."""
        self.loaded, self._worker = None, None
        self._stack.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._worker.pid if self._worker else None

    def load(self, state: Path | None = None) -> Iterator[Event]:
        """Load the model if it is not loaded; yields Loading and, at the end, Loaded.

        Args:
            state: a file of `save_state`, to fill the cache from. One that is missing, damaged, or of another model,
                type of cache or template is passed over: `Loaded.restored_tokens` is then 0.

        Raises:
            LocalmixError: the file cannot be loaded; see `native.model.Model` and `worker`.
        """
        if self.loaded is None:
            self.close()
            worker, self._spare = self._spare, None
            if worker is None:
                worker = self._stack.enter_context(start_child())
            else:
                self._stack.push(worker)
            worker.subject = str(self.path)
            self._worker = worker
            yield from self._request(Open(self.path, self.settings, state), Loaded)
        elif state is not None:
            yield from self._request(RestoreState(state), Loaded)

    def reply(
        self, messages: list[dict[str, str]], sampling: Sampling, limit: int | None, grammar: str | None = None
    ) -> Iterator[Event]:
        """Ask for the next message; yields what `load` does first if need be, then Dropped, Reading, Piece and a Reply.

        Args:
            messages: with `role` and `content`.
            limit: most tokens of the reply; None for what the context has room for.
            grammar: GBNF that the reply follows; None for free text.

        Raises:
            CapacityError: the last message does not fit into the context, or the child ran out of memory.
            InputError: the chat template fails, or the child died in native code.
            UsageError: the grammar does not parse.
        """
        state = None
        if self.loaded is None:  # tried once: if it is what kills the child, the next one reads the text
            state, self._state = self._state, None
        yield from self.load(state)
        heard = _Heard()
        try:
            for event in self._request(Ask(messages, sampling, limit, grammar), Reply):
                heard.note(event)
                yield event
        except _OverdueError:
            yield heard.reply()

    def save_state(self, path: Path) -> StateSaved:
        """Write the cache to a file, from which `load` fills it again; the old file stays until the new one is whole.

        Raises:
            FileError, CapacityError: the file cannot be written.
        """
        if self.loaded is None:
            return StateSaved(0, 0)
        (saved,) = self._request(SaveState(path), StateSaved)
        assert isinstance(saved, StateSaved)
        self._state = path
        return saved

    def stop(self) -> None:
        """End the current reply early; it comes to its end with a Reply. Safe from another thread.

        A child in the middle of a long computation comes to its end later, and unheard.
        """
        worker, number = self._worker, self._asked
        if worker is None:
            return
        worker.cancel()
        if number:
            reminder = threading.Timer(STOP_SECONDS, lambda: worker.post(Overdue(number)))
            reminder.daemon = True
            reminder.start()

    def _request(self, content: Open | Ask | SaveState | RestoreState, last: type[Event]) -> Iterator[Event]:
        assert self._worker is not None
        self._requests += 1
        self._asked = self._requests if isinstance(content, Ask) else 0
        self._worker.send(Request(self._requests, content))
        yield from self._until(last, self._requests)

    def _until(self, last: type[Event], number: int) -> Iterator[Event]:
        """The events of a request, up to one of the type that ends it."""
        for event in self._answers(number):
            if isinstance(event, Loaded):
                self.loaded = event
            yield event
            if isinstance(event, last):
                return

    def _answers(self, number: int) -> Iterator[Event]:
        worker = self._worker
        assert worker is not None
        with _Deadline(worker.pid) as deadline:
            while True:
                try:
                    answer = next(worker)
                except StopIteration:
                    self.close()
                    raise Interrupted(f"{self.path.name}: the worker was stopped.") from None
                except Exception as error:  # the child is gone
                    self.close()
                    if deadline.expired:
                        title = self.settings.template_title(self.path)
                        raise InputError(f"{title} takes longer than {TEMPLATE_SECONDS:g} seconds.", HINT) from error
                    raise
                if isinstance(answer, Rendering):
                    deadline.stop() if answer.finished else deadline.start()
                elif isinstance(answer, Overdue):
                    # a template may be endless: then its own time limit ends the child, and nothing else would
                    if answer.number == number and not deadline.running:
                        raise _OverdueError
                elif isinstance(answer, Answer) and answer.number == number:
                    if isinstance(answer.content, LocalmixError):
                        raise answer.content
                    yield answer.content


class _OverdueError(Exception):
    """The child does not come to an end that was asked for."""


class _Heard:
    """What came of a reply, to end it without the child."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._text: list[str] = []
        self._tokens = 0
        self._reading = Reading(0, 0)

    def note(self, event: Event) -> None:
        if isinstance(event, Reading):
            self._reading = event
        elif isinstance(event, Piece):
            self._last = time.monotonic()
            self._first = self._first or self._last
            self._text.append(event.text)
            self._tokens = event.tokens

    def reply(self) -> Reply:
        reading, generating = self._reading, self._last - self._first
        read = (self._first or time.monotonic()) - self._started
        return Reply(
            text="".join(self._text),
            prompt_tokens=reading.cached + reading.total,
            cached_tokens=reading.cached,
            completion_tokens=self._tokens,
            finish_reason="stopped",
            first_token_seconds=self._first - self._started if self._first else None,
            pp_tps=reading.done / read if reading.done and read > 0 else None,
            tg_tps=(self._tokens - 1) / generating if generating > 0 and self._tokens > 1 else None,
            context_used=reading.cached + reading.done + self._tokens,
        )


class _Deadline:
    """Kills a process that does not come to its end in `TEMPLATE_SECONDS`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._timer: threading.Timer | None = None
        self.expired = False

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self) -> None:
        self._timer = threading.Timer(TEMPLATE_SECONDS, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _kill(self) -> None:
        self.expired = True
        with contextlib.suppress(OSError):
            os.kill(self._pid, getattr(signal, "SIGKILL", signal.SIGTERM))


class Conversation:
    """Messages so far, and how to go on.

    Args:
        engine: the model.
        system: the system prompt; none by default, since Mixtral was trained without one.
        sampling: how tokens are chosen; the settings of the Chinese-Mixtral scripts by default.
        limit: most tokens of a reply; None for what the context has room for.
        grammar: GBNF that replies follow; None for free text.

    Attributes:
        turns: the messages of user and assistant, all of them.
        dropped: how many of the first ones are left out of the prompt, because the context was full.
        last: the last reply.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        limit: int | None = None,
        grammar: str | None = None,
    ) -> None:
        self.engine = engine
        self.system = system
        self.sampling = sampling or Sampling()
        self.limit = limit
        self.grammar = grammar
        self.turns: list[dict[str, str]] = []
        self.dropped = 0
        self.last: Reply | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if any, and the turns that were not dropped."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[self.dropped :]

    def ask(self, text: str) -> Iterator[Event]:
        """Send a message; yields the engine's events. The turn becomes part of the conversation with its Reply.

        Raises:
            LocalmixError: as `Engine.reply`; the conversation is then as it was before.
        """
        question = {"role": "user", "content": text}
        dropped = self.dropped
        for event in self.engine.reply([*self.messages, question], self.sampling, self.limit, self.grammar):
            if isinstance(event, Dropped):
                dropped += event.turns
            elif isinstance(event, Reply):
                self.last = event
                if event.text:  # stopped before the first word: as if it had not been asked
                    self.turns += [question, {"role": "assistant", "content": event.text}]
                    self.dropped = dropped
            yield event

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []
        self.dropped = 0
        self.last = None
