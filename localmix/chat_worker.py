"""The chat's child process: load the model, then read prompts and generate replies, one after the other."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from localmix import chat_template
from localmix.chat_events import (
    Answer,
    Ask,
    Dropped,
    EngineSettings,
    Event,
    Loaded,
    Loading,
    Piece,
    Reading,
    Rendering,
    Reply,
    RestoreState,
    SaveState,
    StateSaved,
)
from localmix.errors import CapacityError, Interrupted, LocalmixError, UsageError
from localmix.worker import Channel

if TYPE_CHECKING:
    from localmix.native.devices import Placement
    from localmix.native.model import Context, Model

REPLY_PART = 4  # a reply has room for 1/4 of the context, or for its limit
KEPT_PART = 2  # of a full context, turns of 1/2 are kept
_DEVICE_NAMES = {"cuda": ("CUDA",), "metal": ("Metal", "MTL")}


def serve(channel: Channel, path: Path, settings: EngineSettings, state: Path | None = None) -> None:
    """The child's job: load the model, then answer requests until the parent ends it."""
    from localmix.native.model import Context, Model
    from localmix.tensor_types import TensorType

    started = time.monotonic()
    shown = -1.0

    def report(share: float) -> None:
        nonlocal shown
        if share - shown >= 0.01:
            shown = share
            channel.emit(Answer(0, Loading(share)))

    kv_type = TensorType[settings.kv_type.upper()]
    with (
        Model(path, placement=_placement(settings), progress=report, cancelled=channel.cancelled) as model,
        Context(
            model,
            context_length=settings.context,
            threads=settings.threads,
            type_k=kv_type,
            type_v=kv_type,
            rope=settings.rope,
            cancelled=channel.cancelled,
        ) as context,
    ):
        desk = _Desk(channel, settings, model, context)
        channel.emit(Answer(0, desk.loaded(state, started)))
        while True:
            request = channel.receive()
            try:
                desk.answer(request.number, request.content)
            except LocalmixError as error:
                channel.emit(Answer(request.number, error))


def _placement(settings: EngineSettings) -> Placement:
    """What lies on a GPU.

    Raises:
        UsageError: a kind of GPU is asked for that this build or machine does not have.
    """
    from localmix.native.devices import PROCESSOR, devices

    if settings.device in _DEVICE_NAMES and not any(
        found.name.startswith(_DEVICE_NAMES[settings.device]) for found in devices()
    ):
        raise UsageError(
            f"llama.cpp finds no {settings.device.upper()} device here.",
            f"Build it in with `make setup BACKEND={settings.device}`; `localmix doctor` lists the devices.",
        )
    return PROCESSOR if settings.device == "cpu" else settings.placement


class _Desk:
    """Answers requests, one at a time, with a loaded model."""

    def __init__(self, channel: Channel, settings: EngineSettings, model: Model, context: Context) -> None:
        from localmix.native.model import CachedText

        self._channel = channel
        self._model = model
        self._context = context
        self._cache = CachedText(context)
        self._template = settings.chat_template or model.chat_template(settings.template_name)

    def loaded(self, state: Path | None, started: float) -> Loaded:
        """What was loaded, with the cache filled from a state file if there is a fitting one."""
        return Loaded(
            description=self._model.description,
            context=self._context.length,
            trained_context=self._model.trained_context,
            has_template=self._template is not None,
            seconds=time.monotonic() - started,
        )

    def answer(self, number: int, content: Ask | SaveState | RestoreState) -> None:
        """Do what one request asks for."""

        def send(event: Event) -> None:
            self._channel.emit(Answer(number, event))

        if isinstance(content, Ask):
            self._reply(content, send)
        elif isinstance(content, SaveState):
            send(StateSaved(0, 0))
        else:
            send(self.loaded(content.path, time.monotonic()))

    def _reply(self, ask: Ask, send: Callable[[Event], None]) -> None:
        """Render, read and generate one reply, sending each piece as it comes."""
        from localmix.native.model import Sampler

        started = time.monotonic()
        model, context = self._model, self._context
        tokens, dropped = self._fitting_prompt(ask)
        if dropped:
            send(Dropped(dropped))
        limit = min(context.length - len(tokens), ask.limit or context.length)
        text = _Text(send)
        cached = count = 0
        first = last = None
        read = started
        finish = "length"
        try:
            with Sampler(model, ask.sampling) as sampler:
                cached = self._cache.feed(tokens, lambda done, total: send(Reading(done, total)))
                read = time.monotonic()
                for token in tokens[-ask.sampling.repeat_last :]:
                    sampler.accept(int(token))
                for token in self._cache.generate(sampler, limit):
                    self._channel.check()
                    last = time.monotonic()
                    first = first or last
                    if model.ends_generation(token):
                        finish = "stop"
                        break
                    count += 1
                    text.write(model.piece(token))
        except Interrupted:
            finish = "stopped"
        text.write(b"", final=True)
        reading = read - started
        generating = (last - first) if first and last else 0.0
        send(
            Reply(
                text="".join(text.parts),
                prompt_tokens=len(tokens),
                cached_tokens=cached,
                completion_tokens=count,
                finish_reason=finish,
                first_token_seconds=first - started if first else None,
                pp_tps=(len(tokens) - cached) / reading if reading > 0 else None,
                tg_tps=(count - 1) / generating if generating > 0 and count > 1 else None,
                context_used=len(tokens) + count,
            )
        )

    def _fitting_prompt(self, ask: Ask) -> tuple[list[int], int]:
        """The prompt's tokens, and how many messages were left out of it so that a reply has room behind it.

        Raises:
            CapacityError: the last message alone is too long.
        """
        length = self._context.length
        tokens = self._prompt(ask.messages)
        if len(tokens) + min(ask.limit or length, length // REPLY_PART) <= length:
            return tokens, 0
        # what is left out changes the prompt's start, so that all of it is read again: then better half of it
        system = ask.messages[:1] if ask.messages[0]["role"] == "system" else []
        turns = ask.messages[len(system) :]
        cuts = [place for place, turn in enumerate(turns) if place and turn["role"] == "user"]
        low, high = 0, len(cuts)
        while low < high:  # the fewest messages whose loss is enough
            middle = (low + high) // 2
            if len(self._prompt([*system, *turns[cuts[middle] :]])) > length // KEPT_PART:
                low = middle + 1
            else:
                high = middle
        dropped = cuts[min(low, len(cuts) - 1)] if cuts else 0
        tokens = self._prompt([*system, *turns[dropped:]])
        if len(tokens) >= length:
            raise CapacityError(
                f"The message has {len(tokens)} tokens with all that belongs to it, and the context holds {length}.",
                "Shorten it, or ask for more with --ctx.",
            )
        return tokens, dropped

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as tokens; without a template as the plain text that the model is to continue."""
        model = self._model
        vocabulary = model.vocabulary
        bos, eos = (
            model.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
            for token in (vocabulary.bos, vocabulary.eos)
        )
        if self._template is None:
            text = "\n".join(turn["content"] for turn in messages if turn["role"] != "system")
            return [int(token) for token in model.tokenize(text)]
        self._channel.emit(Rendering(finished=False))
        try:
            text = chat_template.render(self._template, messages, bos=bos, eos=eos, subject=model.path.name)
        finally:
            self._channel.emit(Rendering(finished=True))
        # the template writes BOS itself, or leaves it to the tokenizer
        add_special = not (bos and text.startswith(bos))
        return [int(token) for token in model.tokenize(text, add_special=add_special, parse_special=True)]


class _Text:
    """The reply as it grows: bytes in, whole characters out."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.parts: list[str] = []
        self._send = send
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes, final: bool = False) -> None:
        text = self._decoder.decode(data, final)
        if not self.parts:
            text = text.lstrip()  # sentencepiece begins every word with a space
        if text:
            self.parts.append(text)
            self._send(Piece(text))
