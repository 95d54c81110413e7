"""Chat: a conversation here, the model in a child process, and the reply as a stream of events between them.

    with Engine(path, EngineSettings(context=4096)) as engine:
        conversation = Conversation(engine)
        for event in conversation.ask("Hello"):
            if isinstance(event, Piece):
                print(event.text, end="")

What the cache holds of the conversation is not computed again in the next turn. A dead engine ends the turn,
not the conversation: the next `ask` starts it anew.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix import chat_template
from localmix.errors import CapacityError, InputError, Interrupted, LocalmixError, UsageError
from localmix.worker import Channel, Worker

if TYPE_CHECKING:
    from localmix.native.model import CachedText, Context, Model, Sampling

TEMPLATE_SECONDS = 2.0
DEVICES = ("auto", "cpu", "cuda", "metal")
_DEVICE_NAMES = {"cuda": ("CUDA",), "metal": ("Metal", "MTL")}


@dataclass(frozen=True)
class EngineSettings:
    """How the model is loaded.

    Attributes:
        context: positions of the KV cache.
        threads: None for the physical cores.
        device: one of `DEVICES`; auto takes a GPU where there is one.
    """

    context: int = 4096
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Loading:
    """The model is being read: the share that is done, 0 to 1."""

    share: float


@dataclass(frozen=True)
class Loaded:
    """The model is ready.

    Attributes:
        context: positions it has room for.
        trained_context: positions it was trained for.
        has_template: whether it brings a chat template; without one it continues the text.
    """

    description: str
    context: int
    trained_context: int
    has_template: bool
    seconds: float


@dataclass(frozen=True)
class Reading:
    """The prompt is being read: tokens done, and in all, beyond what the cache held."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """The next characters of the reply, whole ones only."""

    text: str


@dataclass(frozen=True)
class Reply:
    """The finished reply.

    Attributes:
        finish_reason: `stop` (the model ended it), `length` (the limit or the context did) or `stopped` (the user).
        cached_tokens: of the prompt's tokens, those that needed no computing.
        first_token_seconds: from the question to the first token.
        pp_tps, tg_tps: tokens per second of prompt and of generation; None when there was nothing to measure.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str
    first_token_seconds: float | None
    pp_tps: float | None
    tg_tps: float | None


Event = Loading | Loaded | Reading | Piece | Reply


@dataclass(frozen=True)
class _Request:
    number: int
    messages: list[dict[str, str]]
    sampling: Sampling
    limit: int | None


@dataclass(frozen=True)
class _Answer:
    """What the child sends: an event or an error, for the request of that number; 0 is loading.

    A reply that nobody listened to to its end leaves answers behind, which the number tells apart.
    """

    number: int
    content: Event | LocalmixError


@dataclass(frozen=True)
class _Rendering:
    """Sent before and after the chat template runs: the time between is limited."""

    finished: bool


class Engine:
    """A model in a child process, which is started when it is first needed and again when it died.

    Args:
        path: the GGUF file.
        settings: how to load it.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self.path = path
        self.settings = settings
        self.loaded: Loaded | None = None
        self._worker: Worker | None = None
        self._requests = 0
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

    def load(self) -> Iterator[Event]:
        """Load the model if it is not loaded; yields Loading and, at the end, Loaded.

        Raises:
            LocalmixError: the file cannot be loaded; see `native.model.Model` and `worker`.
        """
        if self.loaded is not None:
            return
        self.close()
        self._worker = self._stack.enter_context(Worker(serve, self.path, self.settings))
        for event in self._answers(0):
            if isinstance(event, Loaded):
                self.loaded = event
            yield event
            if isinstance(event, Loaded):
                return

    def reply(self, messages: list[dict[str, str]], sampling: Sampling, limit: int | None) -> Iterator[Event]:
        """Ask for the next message; yields what `load` does first if need be, then Reading, Piece and a Reply.

        Args:
            messages: with `role` and `content`.
            limit: most tokens of the reply; None for what the context has room for.

        Raises:
            CapacityError: the conversation does not fit into the context, or the child ran out of memory.
            InputError: the chat template fails, or the child died in native code.
        """
        yield from self.load()
        assert self._worker is not None
        self._requests += 1
        self._worker.send(_Request(self._requests, messages, sampling, limit))
        for event in self._answers(self._requests):
            yield event
            if isinstance(event, Reply):
                return

    def stop(self) -> None:
        """End the current reply early; it comes to its end with a Reply. Safe from another thread."""
        if self._worker is not None:
            self._worker.cancel()

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
                        raise InputError(
                            f"The chat template of {self.path.name} takes longer than {TEMPLATE_SECONDS:g} seconds."
                        ) from error
                    raise
                if isinstance(answer, _Rendering):
                    deadline.stop() if answer.finished else deadline.start()
                elif isinstance(answer, _Answer) and answer.number == number:
                    if isinstance(answer.content, LocalmixError):
                        raise answer.content
                    yield answer.content


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

    def start(self) -> None:
        self._timer = threading.Timer(TEMPLATE_SECONDS, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

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
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        limit: int | None = None,
    ) -> None:
        if sampling is None:
            from localmix.native.model import Sampling

            sampling = Sampling()
        self.engine = engine
        self.system = system
        self.sampling = sampling
        self.limit = limit
        self.turns: list[dict[str, str]] = []
        self.last: Reply | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if any, and all turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def ask(self, text: str) -> Iterator[Event]:
        """Send a message; yields the engine's events. The turn becomes part of the conversation with its Reply.

        Raises:
            LocalmixError: as `Engine.reply`; the conversation is then as it was before.
        """
        question = {"role": "user", "content": text}
        for event in self.engine.reply([*self.messages, question], self.sampling, self.limit):
            if isinstance(event, Reply):
                self.last = event
                if event.text:  # stopped before the first word: as if it had not been asked
                    self.turns += [question, {"role": "assistant", "content": event.text}]
            yield event

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []
        self.last = None


def serve(channel: Channel, path: Path, settings: EngineSettings) -> None:
    """The child's job: load the model, then answer requests until the parent ends it."""
    from localmix.native.devices import ANYWHERE, PROCESSOR
    from localmix.native.model import CachedText, Context, Model

    started = time.monotonic()
    shown = -1.0

    def report(share: float) -> None:
        nonlocal shown
        if share - shown >= 0.01:
            shown = share
            channel.emit(_Answer(0, Loading(share)))

    placement = PROCESSOR if _on_cpu(settings.device) else ANYWHERE
    with (
        Model(path, placement=placement, progress=report, cancelled=channel.cancelled) as model,
        Context(
            model, context_length=settings.context, threads=settings.threads, cancelled=channel.cancelled
        ) as context,
    ):
        template = model.chat_template()
        text = CachedText(context)
        seconds = time.monotonic() - started
        loaded = Loaded(model.description, context.length, model.trained_context, template is not None, seconds)
        channel.emit(_Answer(0, loaded))
        while True:
            request = channel.receive()
            try:
                _answer(channel, request, model, context, text, template)
            except LocalmixError as error:
                channel.emit(_Answer(request.number, error))


def _on_cpu(device: str) -> bool:
    """Whether only the processor is to be used.

    Raises:
        UsageError: a kind of GPU is asked for that this build or machine does not have.
    """
    if device in _DEVICE_NAMES:
        from localmix.native.devices import devices

        if not any(found.name.startswith(_DEVICE_NAMES[device]) for found in devices()):
            raise UsageError(
                f"llama.cpp finds no {device.upper()} device here.",
                f"Build it in with `make setup BACKEND={device}`; `localmix doctor` lists the devices.",
            )
    return device == "cpu"


def _answer(
    channel: Channel, request: _Request, model: Model, context: Context, cache: CachedText, template: str | None
) -> None:
    """Render, read and generate one reply, sending each piece as it comes."""
    from localmix.native.model import Sampler

    def send(event: Event) -> None:
        channel.emit(_Answer(request.number, event))

    started = time.monotonic()
    tokens = _prompt(channel, request, model, template)
    room = context.length - len(tokens)
    if room < 1:
        raise CapacityError(
            f"The conversation has {len(tokens)} tokens, and the context holds {context.length}.",
            "Start again with /clear, or ask for more with --ctx.",
        )
    limit = min(room, request.limit or room)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts: list[str] = []
    cached = count = 0
    first = last = None
    read = started
    finish = "length"

    def write(data: bytes, final: bool = False) -> None:
        text = decoder.decode(data, final)
        if not parts:
            text = text.lstrip()  # sentencepiece begins every word with a space
        if text:
            parts.append(text)
            send(Piece(text))

    try:
        cached = cache.feed(tokens, lambda done, total: send(Reading(done, total)))
        read = time.monotonic()
        with Sampler(model, request.sampling) as sampler:
            for token in tokens[-request.sampling.repeat_last :]:
                sampler.accept(int(token))
            for token in cache.generate(sampler, limit):
                channel.check()
                last = time.monotonic()
                first = first or last
                if model.ends_generation(token):
                    finish = "stop"
                    break
                count += 1
                write(model.piece(token))
    except Interrupted:
        finish = "stopped"
    write(b"", final=True)
    computed = len(tokens) - cached
    reading = read - started
    generating = (last - first) if first and last else 0.0
    send(
        Reply(
            text="".join(parts),
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            completion_tokens=count,
            finish_reason=finish,
            first_token_seconds=first - started if first else None,
            pp_tps=computed / reading if reading > 0 else None,
            tg_tps=(count - 1) / generating if generating > 0 and count > 1 else None,
        )
    )


def _prompt(channel: Channel, request: _Request, model: Model, template: str | None) -> list[int]:
    """The conversation as tokens; without a template as the plain text that the model is to continue."""
    vocabulary = model.vocabulary
    bos, eos = (
        model.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
        for token in (vocabulary.bos, vocabulary.eos)
    )
    if template is None:
        text = "\n".join(turn["content"] for turn in request.messages if turn["role"] != "system")
        return [int(token) for token in model.tokenize(text)]
    channel.emit(_Rendering(finished=False))
    try:
        text = chat_template.render(template, request.messages, bos=bos, eos=eos, subject=model.path.name)
    finally:
        channel.emit(_Rendering(finished=True))
    # the template writes BOS itself, or leaves it to the tokenizer
    add_special = not (bos and text.startswith(bos))
    return [int(token) for token in model.tokenize(text, add_special=add_special, parse_special=True)]
