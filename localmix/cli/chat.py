"""`localmix chat`: the terminal around `localmix.chat`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from localmix.cli import Terminated
from localmix.cli.console import Console
from localmix.cli.parameters import MODEL, FiniteRange, examples, json_option, threads_option

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from localmix.chat import Conversation, Engine, Reply

_QUESTION_BYTES = 4 * 2**20  # more is no question: a wrong file, or a program that never ends
_STATUS_TOKENS = 256  # a shorter prompt is read before anybody could read about it


@click.command()
@click.argument("model", metavar="[MODEL]", type=MODEL, required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="Ask one thing and leave; - reads it from stdin.")
@click.option("--system", metavar="TEXT", default="", help="System prompt.")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(16, 2**31 - 1),
    help="Positions of context; 4096 by default, less if the model was trained for less.",
)
@click.option("--max-tokens", type=click.IntRange(1, 2**31 - 1), help="Longest reply.")
@click.option("--temperature", type=FiniteRange(min=0), default=0.2, show_default=True)
@click.option("--top-k", type=click.IntRange(0, 2**31 - 1), default=40, show_default=True)
@click.option("--top-p", type=FiniteRange(0, 1), default=0.9, show_default=True)
@click.option("--repeat-penalty", type=FiniteRange(min=0.01), default=1.1, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="The same seed and question give the same reply.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "metal"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
@threads_option
@click.option("--force", is_flag=True, help="Load the model even if memory seems too small.")
@json_option
@examples(
    "localmix chat",
    "localmix chat tinymix:Q4_K",
    'localmix chat -p "Where does Wilma live?" --json',
    "cat question.txt | localmix chat mixtral.gguf",
)
def command(
    model: str | None,
    prompt: str | None,
    system: str,
    context: int | None,
    max_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    repeat_penalty: float,
    seed: int | None,
    device: str,
    threads: int | None,
    force: bool,
    json: bool,
) -> None:
    """Talk to a model in the terminal.

    Enter sends, Alt-Enter starts a new line, /help lists the commands. Ctrl-C stops a reply and keeps the
    conversation; at the prompt it leaves. With a pipe on stdin one question is read from there.
    """
    from localmix import library
    from localmix.chat import Conversation, Engine, EngineSettings
    from localmix.cli.memory_check import MemoryCheck
    from localmix.errors import UsageError
    from localmix.native.model import Sampling

    console = Console(json)
    for option, text in (("--prompt", prompt), ("--system", system)):
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"The text of {option} is not UTF-8.")
    question = _question(prompt)
    if json and question is None:
        raise UsageError("--json needs one question.", "Give it with -p, or on stdin.")
    memory = MemoryCheck(console, context)
    path = library.resolve(model, library.Purpose.RUN, memory.fits)
    choice = memory.check(path, force)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repeat_penalty=repeat_penalty, seed=seed)
    with Engine(path, EngineSettings(choice.context, threads, device)) as engine:
        conversation = Conversation(engine, system=system, sampling=sampling, limit=max_tokens)
        _load(console, engine)
        library.remember(path)
        if question is None:
            _Talk(console, conversation).run()
        else:
            _answer_once(console, conversation, question)


def _question(prompt: str | None) -> str | None:
    """The one question to ask, or None for a conversation."""
    from localmix.errors import InputError, UsageError

    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt == "-" or not sys.stdin.isatty():
        try:
            data = sys.stdin.buffer.read(_QUESTION_BYTES + 1)
            if len(data) > _QUESTION_BYTES:
                raise InputError(f"The question on stdin is longer than {_QUESTION_BYTES // 2**20} MiB.")
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"The question on stdin is not UTF-8 (byte {error.start}).") from error
    else:
        return None
    if not text.strip():
        raise UsageError("The question is empty.", 'Ask with -p "TEXT", or on stdin.')
    return text.strip()


def _load(console: Console, engine: Engine) -> None:
    from localmix.chat import Loading

    try:
        for event in engine.load():
            if isinstance(event, Loading) and event.share < 1:
                console.status(f"Loading {engine.path.name}: {event.share:.0%}")
    finally:
        console.status()


def _answer_once(console: Console, conversation: Conversation, question: str) -> None:
    """One turn: the reply on stdout, or as a document when JSON was asked for."""
    reply = _show(console, conversation, question, quiet=console.json)
    console.result(
        {
            "model": conversation.engine.path,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "finish_reason": reply.finish_reason,
            "first_token_seconds": reply.first_token_seconds,
            "pp_tps": reply.pp_tps,
            "tg_tps": reply.tg_tps,
        },
        lambda: None,
    )


def _show(console: Console, conversation: Conversation, question: str, quiet: bool = False) -> Reply:
    """Ask, and write the reply as it comes."""
    from localmix.chat import Loading, Piece, Reading, Reply

    reply: Reply | None = None
    waiting = open_line = False
    try:
        for event in conversation.ask(question):
            if isinstance(event, Loading) or (isinstance(event, Reading) and event.total >= _STATUS_TOKENS):
                what = event.share if isinstance(event, Loading) else event.done / event.total
                console.status(f"{'Loading' if isinstance(event, Loading) else 'Reading'}: {what:.0%}")
                waiting = True
            elif isinstance(event, Piece) and not quiet:
                if waiting:
                    console.status()
                    waiting = False
                console.stream(event.text)
                open_line = not event.text.endswith("\n")
            elif isinstance(event, Reply):
                reply = event
    finally:
        if waiting:
            console.status()
        if open_line:
            console.stream("\n")
    assert reply is not None
    return reply


class _Talk:
    """The conversation at the terminal."""

    def __init__(self, console: Console, conversation: Conversation) -> None:
        self._console = console
        self._conversation = conversation
        # name: (what /help says, what it does with the rest of the line; True ends the chat)
        self._commands: dict[str, tuple[str, Callable[[str], bool | None]]] = {
            "/help": ("show this", self._help),
            "/system": ("TEXT: set the system prompt and start again; without TEXT show it", self._system),
            "/clear": ("forget the conversation", self._clear),
            "/stats": ("show tokens, speed and context of the last reply", self._stats),
            "/quit": ("leave; so do Ctrl-D and Ctrl-C", lambda _: True),
        }

    def run(self) -> None:
        """Read and answer until the user leaves."""
        loaded = self._conversation.engine.loaded
        assert loaded is not None
        self._console.note(
            f"{self._conversation.engine.path.name}, context {loaded.context}. /help for help, /quit to leave."
        )
        if not loaded.has_template:
            self._console.warn("This model has no chat template: it continues your text instead of answering.")
        session = self._session()
        while True:
            try:
                text = session.prompt().strip()
            except Terminated:
                raise
            except (EOFError, KeyboardInterrupt):
                return
            if text.startswith("/"):
                if self._command(text):
                    return
            elif text:
                self._turn(text)

    def _session(self) -> PromptSession[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        from localmix import library

        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        history: History
        try:
            library.home().mkdir(parents=True, exist_ok=True)
            file = library.home() / "chat_history"
            file.touch()
            history = FileHistory(str(file))
        except OSError:  # a read-only home: then without
            history = InMemoryHistory()
        return PromptSession(
            "> ",
            multiline=True,  # so that a pasted text stays whole
            prompt_continuation="  ",
            key_bindings=keys,
            history=history,
            completer=WordCompleter(list(self._commands), sentence=True),
            complete_while_typing=False,
            output=create_output(always_prefer_tty=True),  # stdout may be a file
        )

    def _turn(self, text: str) -> None:
        from localmix.errors import LocalmixError

        try:
            with _stop_on_interrupt(self._conversation.engine):
                reply = _show(self._console, self._conversation, text)
        except LocalmixError as error:
            self._console.error(error)
            self._console.note("The conversation is as it was before.")
            return
        if reply.finish_reason == "stopped":
            self._console.note("(stopped)")
        elif reply.finish_reason == "length":
            self._console.note("(cut off: the reply reached its limit or the end of the context)")

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            self._console.note(f"There is no command {name}. /help lists them.")
            return False
        return bool(self._commands[name][1](rest.strip()))

    def _help(self, _: str) -> None:
        self._console.fields({name: about for name, (about, _) in self._commands.items()})

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._conversation.clear()
            self._console.note("The conversation starts again with this system prompt.")
        else:
            self._console.line(self._conversation.system or "There is no system prompt.")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._console.note("The conversation is forgotten.")

    def _stats(self, _: str) -> None:
        from localmix.table import number

        reply, loaded = self._conversation.last, self._conversation.engine.loaded
        if reply is None or loaded is None:
            self._console.note("There is no reply yet.")
            return
        used = reply.prompt_tokens + reply.completion_tokens
        self._console.fields(
            {
                "context": f"{used} of {loaded.context} tokens",
                "prompt": f"{reply.prompt_tokens} tokens, {reply.cached_tokens} of them from the cache,"
                f" {number(reply.pp_tps, 1)} tokens/s",
                "reply": f"{reply.completion_tokens} tokens, {number(reply.tg_tps, 1)} tokens/s",
                "first token": f"after {number(reply.first_token_seconds, 2)} s",
            }
        )


@contextmanager
def _stop_on_interrupt(engine: Engine) -> Iterator[None]:
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
        signal.signal(signal.SIGINT, before)
