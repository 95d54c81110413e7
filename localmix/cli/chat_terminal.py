"""The conversation at the terminal: questions in, replies drawn, every turn saved."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmix import library
from localmix.cli import Terminated
from localmix.cli.chat_settings import LIMIT, accepted, sampling_for
from localmix.cli.chat_turn import comment, show_reply, silent_keyboard, stop_on_interrupt
from localmix.cli.console import Console
from localmix.conversation import session
from localmix.conversation.chat_events import Loaded, Loading
from localmix.errors import Interrupted, LocalmixError

if TYPE_CHECKING:
    from localmix.conversation.chat import Conversation, Engine

# A state that takes longer to write, in seconds, is written when the chat ends and not after every turn.
_QUICK = 0.5

# What is meant as a command, known or not; paths and comments in code begin with a slash too.
_COMMAND = re.compile(r"/[\w-]*(?:\s|$)")

OpenEngine = Callable[[str], "Engine"]


def load(console: Console, engine: Engine, state: Path | None = None) -> Loaded:
    """Load an engine's model, with a word about how far it is.

    Raises:
        LocalmixError: as `Engine.load`.
    """
    try:
        for event in engine.load(state):
            if isinstance(event, Loading) and event.share < 1:
                console.status(f"Loading {engine.path.name}: {event.share:.0%}")
    finally:
        console.status()
    assert engine.loaded is not None
    return engine.loaded


class Talk:
    """A conversation that a person leads; the commands of `chat_commands` work on it.

    Args:
        conversation: with a loaded engine.
        keeper: where it is saved.
        open_engine: checks and makes the engine for a model that the user names, not loaded yet.
        chosen: settings of the user's, by field; the others are the model's own.
        raw: write replies as they are.

    Attributes:
        unanswered: the last question, if it got no reply.
        leaving: whether the chat ends.
    """

    def __init__(
        self,
        console: Console,
        conversation: Conversation,
        keeper: session.Keeper,
        open_engine: OpenEngine,
        chosen: dict[str, Any],
        raw: bool = False,
    ) -> None:
        self.console = console
        self.conversation = conversation
        self.keeper = keeper
        self.unanswered: str | None = None
        self.leaving = False
        self._open_engine = open_engine
        self._chosen = chosen
        self._raw = raw
        self._attached: list[tuple[str, str]] = []
        self._prefill = ""
        self._editing = False
        self._was_again = False
        self._own_sampling: Mapping[str, float] = {}
        self._keeps_states = True
        self._state_is_quick = True
        self._state_is_saved = True
        self._apply_settings()

    @property
    def model_name(self) -> str:
        """The model and its type, as the user names them."""
        return name_of(self.conversation.engine.path)

    @property
    def replaces_last(self) -> bool:
        """Whether the last question, when it is asked again, takes the place of the last turn."""
        return self._was_again if self.unanswered is not None else True

    def run(self) -> None:
        """Read and answer until the user leaves."""
        from localmix.cli.chat_commands import COMMANDS
        from localmix.cli.chat_prompt import Prompt

        prompt = Prompt(
            {command.name: (command.about, command.choices) for command in COMMANDS.values()},
            library.home() / "chat_history",
            self._status,
        )
        self._greet()
        with silent_keyboard():  # prompt_toolkit turns it on while it reads
            while not self.leaving:
                prefill, self._prefill = self._prefill, ""
                try:
                    text = prompt.ask(prefill)
                except Terminated:
                    raise
                except (EOFError, KeyboardInterrupt):
                    break
                try:
                    self._take(text)
                except LocalmixError as error:
                    self.console.error(error)
            if not self._state_is_saved:
                self.console.status("Keeping what the model has read…")
                self._save_state()
                self.console.status()

    def _take(self, text: str) -> None:
        from localmix.cli.chat_commands import COMMANDS
        from localmix.errors import UsageError

        editing, self._editing = self._editing, False
        if _COMMAND.match(text):
            name, *rest = text.split(maxsplit=1)
            if name not in COMMANDS:
                import difflib

                near = difflib.get_close_matches(name, COMMANDS, n=1)
                raise UsageError(f"There is no command {name}.", f"Did you mean {near[0]}?" if near else "Try /help.")
            COMMANDS[name].run(self, rest[0] if rest else "")
        elif text:
            files = [f"{name}:\n\n```\n{content.rstrip()}\n```\n\n" for name, content in self._attached]
            self._attached = []
            self.ask("".join(files) + text, again=editing and self.replaces_last)

    def ask(self, question: str, again: bool = False) -> None:
        """Ask, draw the reply, and save the turn.

        Args:
            again: in place of the last question and its reply.
        """
        conversation = self.conversation
        before = list(conversation.turns), conversation.dropped
        # also while the turn is saved: who stops a reply that has just ended does not want to leave
        with stop_on_interrupt(conversation.engine):
            if again:
                self.forget_last()
            try:
                reply = show_reply(self.console, conversation.ask(question), raw=self._raw)
            except LocalmixError as error:
                conversation.turns, conversation.dropped = before
                self.unanswered, self._was_again = question, again
                self.console.error(error)
                self.console.note("The conversation is as it was before; /retry asks again.")
                return
            comment(self.console, reply)
            self.console.line()
            if reply.text:
                self.unanswered = None
                self.save()
            else:  # as if it had not been asked
                conversation.turns, conversation.dropped = before
                self.unanswered, self._was_again = question, again

    def edit(self, question: str) -> None:
        """Put a question into the input line; when it is sent it takes the place of the last one."""
        self._prefill, self._editing = question, True

    def attach(self, name: str, content: str) -> None:
        """Put a text in front of the next question."""
        self._attached.append((name, content))

    def forget_last(self) -> None:
        """Take the last question and its reply out of the conversation."""
        del self.conversation.turns[-2:]
        self.conversation.dropped = min(self.conversation.dropped, len(self.conversation.turns))
        self.unanswered = None

    def start_again(self) -> None:
        """A new conversation with the same model and settings; the one before stays as it is saved."""
        self.conversation.clear()
        self.keeper.start_again()
        self.unanswered = None
        self._attached = []

    def choose(self, field: str, value: Any) -> None:
        """Set one of the settings."""
        if field == LIMIT:
            self.conversation.limit = value
        else:
            self._chosen[field] = value
            self._apply_settings()

    def switch_model(self, name: str) -> None:
        """Go on with another model; if it cannot be loaded, with the one before.

        Raises:
            LocalmixError: it is unknown, does not fit, or cannot be loaded.
        """
        library.resolve(name, library.Purpose.RUN)  # an unknown name costs nothing
        before = self.conversation.engine
        before.close()  # both together might not fit
        engine = self._open_engine(name)
        try:
            loaded = load(self.console, engine)
        except BaseException:
            engine.close()
            raise
        self.conversation.engine = engine
        self.conversation.last, self.conversation.dropped = None, 0
        self._apply_settings()
        library.remember(engine.path)
        self.console.note(f"{self.model_name} goes on with the conversation, context {loaded.context}.")
        self._tell_about(loaded)

    def resume(self, name: str) -> None:
        """Go on with a saved conversation, with the model that is loaded.

        Raises:
            LocalmixError: there is none of that name, or it cannot be read.
        """
        session.read(name)
        found = self.keeper.open(name)
        assert found is not None
        self._chosen = restore(self.conversation, found)
        self._apply_settings()
        self.unanswered = None
        load(self.console, self.conversation.engine, session.state_path(name))
        if found.model and Path(found.model) != self.conversation.engine.path:
            self.console.note(f"It was led with {name_of(Path(found.model))}; /model changes the model.")
        self._show_last()

    def record(self) -> session.Session:
        """The conversation as it is saved."""
        conversation = self.conversation
        return session.Session(
            name=self.keeper.name or session.fresh_name(),
            model=str(conversation.engine.path),
            system=conversation.system,
            turns=tuple(conversation.turns),
            dropped=conversation.dropped,
            sampling=self._chosen,
            limit=conversation.limit,
        )

    def save(self) -> None:
        """Save the conversation; a disk that refuses is told about, and the chat goes on."""
        try:
            self.keeper.save(self.record())
        except LocalmixError as error:
            self.console.warn(f"This turn is not saved. {error.message}")
            return
        self._state_is_saved = not (self.keeper.saving and self._keeps_states)
        if not self._state_is_saved and self._state_is_quick:
            started = time.monotonic()
            self._save_state()
            self._state_is_quick = time.monotonic() - started < _QUICK

    def _save_state(self) -> None:
        """Save what the model's cache holds: the next run then has nothing to read."""
        try:
            saved = self.conversation.engine.save_state(session.state_path(self.keeper.name))
            session.limit_states(keep=self.keeper.name)
            self._keeps_states = saved.bytes <= session.STATES_LIMIT
        except Interrupted:  # by a Ctrl-C that came too late for the reply
            return
        except LocalmixError as error:
            self.console.warn(f"What the model has read is not kept. {error.message}")
            self._keeps_states = False
        self._state_is_saved = True

    def context_line(self) -> str:
        """How full the context is."""
        reply, loaded = self.conversation.last, self.conversation.engine.loaded
        total = loaded.context if loaded is not None else self.conversation.engine.settings.context
        used = reply.context_used if reply is not None else loaded.restored_tokens if loaded is not None else 0
        return f"{used:,} of {total:,} tokens"

    def engine_memory(self) -> str:
        """What the model's process takes, or nothing if there is none."""
        import psutil

        from localmix.sizes import size

        pid = self.conversation.engine.pid
        try:
            return size(psutil.Process(pid).memory_info().rss) if pid else ""
        except psutil.Error:
            return ""

    def _status(self) -> list[str]:
        from localmix.presentation.table import number

        reply = self.conversation.last
        parts = [self.model_name, self.context_line()]
        if reply is not None:
            parts.append(f"{number(reply.tg_tps, 1)} tokens/s")
            parts.append(f"first token {number(reply.first_token_seconds, 2)} s")
        parts.append(self.engine_memory())
        parts += [f"with {name}" for name, _ in self._attached]
        return [part for part in parts if part]

    def _apply_settings(self) -> None:
        loaded = self.conversation.engine.loaded
        if loaded is not None:  # else its engine died, and comes back
            self._own_sampling = loaded.own_sampling
        self.conversation.sampling = sampling_for(self._own_sampling, self._chosen)

    def _greet(self) -> None:
        loaded = self.conversation.engine.loaded
        assert loaded is not None
        self.console.note(f"{self.model_name}, context {loaded.context}. /help for help, /quit to leave.")
        self._tell_about(loaded)
        if self.conversation.turns:
            self._show_last()

    def _tell_about(self, loaded: Loaded) -> None:
        if not loaded.has_template:
            self.console.warn(
                "This model has no chat template: it continues your text instead of answering."
                " --chat-template FILE gives it one."
            )
        own = [f"{field.replace('_', '-')} {value:g}" for field, value in loaded.own_sampling.items()]
        if own:
            self.console.note(f"The model's own settings: {', '.join(own)}. /set changes them.")

    def _show_last(self) -> None:
        """Where a conversation stopped."""
        turns, loaded = self.conversation.turns, self.conversation.engine.loaded
        count = len(turns) // 2
        restored = f", {loaded.restored_tokens:,} tokens need no reading" if loaded and loaded.restored_tokens else ""
        self.console.note(f"{self.keeper.name}: {count} {'question' if count == 1 else 'questions'}{restored}.")
        if turns:
            self.console.line(f"> {turns[-2]['content']}", "dim")
            draw_text(self.console, turns[-1]["content"], self._raw)


def name_of(path: Path) -> str:
    """A model's file as the user would name it."""
    model, kind = library.split_name(path)
    return f"{model}:{kind}" if kind else path.name


def draw_text(console: Console, text: str, raw: bool) -> None:
    """A reply that is there already."""
    from localmix.conversation.chat_events import Piece, Reply

    reply = Reply(text, 0, 0, 0, "stop", None, None, None)
    show_reply(console, iter((Piece(text), reply)), raw=raw)


def restore(conversation: Conversation, found: session.Session) -> dict[str, Any]:
    """Put a saved conversation in place of this one; the settings that its user had chosen."""
    conversation.clear()
    conversation.turns = [dict(turn) for turn in found.turns]
    conversation.dropped = found.dropped
    conversation.system = found.system
    conversation.limit = found.limit
    return accepted(found.sampling)
