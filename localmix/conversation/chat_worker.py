"""The chat's child process: load the model, then read prompts and generate replies, one after the other."""

from __future__ import annotations

import codecs
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.conversation import chat_template, kv_state
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
    Piece,
    Reading,
    Rendering,
    Reply,
    RestoreState,
    SaveState,
    StateSaved,
)
from localmix.errors import CapacityError, Interrupted, LocalmixError, UsageError
from localmix.native.library import LLAMA_CPP_COMMIT
from localmix.sampling import own_sampling
from localmix.worker import Channel

if TYPE_CHECKING:
    from localmix.native.devices import Placement
    from localmix.native.model import CachedText, Context
    from localmix.native.speculative import Speculation
    from localmix.rope_scaling import RopeScaling

REPLY_PART = 4  # a reply has room for 1/4 of the context, or for its limit
PIECE_SECONDS = 0.03  # 33 times a second looks as if it flowed
KEPT_PART = 2  # of a full context, turns of 1/2 are kept
_NAMED_TEMPLATE = "tokenizer.chat_template."


def serve(channel: Channel) -> None:
    """The child's job: load the model that the first request names, then answer requests until the parent ends it."""
    _prepare()
    request = channel.receive()
    try:
        _serve(channel, request.number, request.content)
    except LocalmixError as error:
        channel.emit(Answer(request.number, error))
        raise


def _prepare() -> None:
    """Load what takes time and does not depend on the model; the parent is still busy choosing it."""
    from localmix.native import model  # noqa: F401
    from localmix.native.library import api

    api()
    chat_template.prepare()


def _serve(channel: Channel, number: int, opening: Open) -> None:
    from localmix.native.model import Context, Model
    from localmix.tensor_types import TensorType

    settings = opening.settings
    shown = -1.0

    def report(share: float) -> None:
        nonlocal shown
        if share - shown >= 0.01:
            shown = share
            channel.emit(Answer(number, Loading(share)))

    kv_type = TensorType[settings.kv_type.upper()]
    with ExitStack() as stack:

        def load(file: Path, where: Placement, rope: RopeScaling | None) -> Context:
            model = Model(file, placement=where, repack=settings.repack, progress=report, cancelled=channel.cancelled)
            stack.enter_context(model)
            context = Context(
                model,
                context_length=settings.context,
                threads=settings.threads,
                type_k=kv_type,
                type_v=kv_type,
                rope=rope,
                cancelled=channel.cancelled,
            )
            return stack.enter_context(context)

        context = load(opening.path, settings.placement, settings.rope)
        draft = None
        if settings.draft is not None and settings.draft.model is not None:
            draft = load(settings.draft.model, settings.draft.placement or settings.placement, None)
        desk = _Desk(channel, settings, context, draft)
        channel.emit(Answer(number, desk.loaded(opening.state)))
        while True:
            request = channel.receive()
            try:
                desk.answer(request.number, request.content)
            except LocalmixError as error:
                channel.emit(Answer(request.number, error))


def _speculation(settings: DraftSettings | None, text: CachedText, draft: Context | None) -> Speculation | None:
    """Who drafts, and how.

    Raises:
        UsageError: the draft model has another vocabulary, or the model cannot take tokens back.
    """
    if settings is None:
        return None
    from localmix.native.speculative import Drafter, ModelDrafter, NgramDrafter, Speculation, check_vocabulary

    drafter: Drafter = NgramDrafter()
    if draft is not None:
        check_vocabulary(text.context.model, draft.model)
        drafter = ModelDrafter(draft)
    return Speculation(text, drafter, length=settings.length, adaptive=settings.adaptive)


class _Desk:
    """Answers requests, one at a time, with a loaded model."""

    def __init__(self, channel: Channel, settings: EngineSettings, context: Context, draft: Context | None) -> None:
        from localmix.native.model import CachedText

        model = context.model
        self._channel = channel
        self._model = model
        self._context = context
        self._cache = CachedText(context)
        self._speculation = _speculation(settings.draft, self._cache, draft)
        metadata = {key: model.metadata(key) or "" for key in model.metadata_keys()}
        self._own_sampling = own_sampling(metadata)
        self._templates = tuple(
            key.removeprefix(_NAMED_TEMPLATE) for key in metadata if key.startswith(_NAMED_TEMPLATE)
        )
        self._template = self._choose_template(settings)
        self._template_title = settings.template_title(model.path)
        self._state_key: dict[str, object] = {
            "engine": LLAMA_CPP_COMMIT,
            "kv_type": settings.kv_type,
            "model": kv_state.model_identity(model.path),
            "rope": repr(settings.rope),
            "template": hashlib.sha256((self._template or "").encode()).hexdigest(),
        }

    def loaded(self, state: Path | None) -> Loaded:
        """What was loaded, with the cache filled from a state file if there is a fitting one."""
        restored = 0
        if state is not None:
            file = kv_state.read_state(state, self._state_key)
            if file is not None and file.tokens <= self._context.length and self._cache.restore(state):
                restored = file.tokens
        return Loaded(
            context=self._context.length,
            trained_context=self._model.trained_context,
            has_template=self._template is not None,
            restored_tokens=restored,
            own_sampling=self._own_sampling,
        )

    def _choose_template(self, settings: EngineSettings) -> str | None:
        """The user's template, or the model's of that name, or its only one.

        Raises:
            UsageError: the model has no template of that name.
        """
        if settings.chat_template is not None:
            return settings.chat_template
        name = settings.template_name
        if name is not None and name not in self._templates:
            others = f"It has {', '.join(self._templates)}." if self._templates else "It has no named ones."
            raise UsageError(f"{self._model.path.name} has no chat template {name!r}.", others)
        return self._model.chat_template(name)

    def answer(self, number: int, content: Ask | SaveState | RestoreState) -> None:
        """Do what one request asks for."""

        def send(event: Event) -> None:
            self._channel.emit(Answer(number, event))

        if isinstance(content, Ask):
            self._reply(content, send)
        elif isinstance(content, SaveState):
            tokens = len(self._cache.tokens)
            saved = StateSaved(0, 0)
            if tokens:
                file = kv_state.write_state(content.path, self._state_key, tokens, self._cache.save)
                saved = StateSaved(tokens, file.bytes)
            send(saved)
        else:
            send(self.loaded(content.path))

    def _reply(self, ask: Ask, send: Callable[[Event], None]) -> None:
        """Render, read and generate one reply, sending each piece as it comes."""
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
            with self._generator(ask, tokens) as generate:
                cached = self._cache.feed(tokens, lambda *counts: send(Reading(*counts)))
                read = time.monotonic()
                for token in generate(limit):
                    self._channel.check()
                    last = time.monotonic()
                    first = first or last
                    if model.ends_generation(token):
                        finish = "stop"
                        break
                    count += 1
                    text.write(model.piece(token), count)
        except Interrupted:
            finish = "stopped"
        text.write(b"", count, final=True)
        reading = read - started
        generating = (last - first) if first and last else 0.0
        tg_tps = (count - 1) / generating if generating > 0 and count > 1 else None
        speculation = self._speculation
        single = speculation.single_seconds if speculation else None
        send(
            Reply(
                text="".join(text.parts),
                prompt_tokens=len(tokens),
                cached_tokens=cached,
                completion_tokens=count,
                finish_reason=finish,
                first_token_seconds=first - started if first else None,
                pp_tps=(len(tokens) - cached) / reading if reading > 0 else None,
                tg_tps=tg_tps,
                context_used=len(tokens) + count,
                drafted=speculation.drafted if speculation else 0,
                accepted=speculation.accepted if speculation else 0,
                speedup=tg_tps * single if tg_tps and single else None,
            )
        )

    @contextmanager
    def _generator(self, ask: Ask, tokens: list[int]) -> Iterator[Callable[[int], Iterator[int]]]:
        """What generates tokens up to a limit, once the prompt is in the cache.

        Raises:
            UsageError: the grammar does not parse.
        """
        from localmix.native.model import Sampler

        if ask.grammar is None and self._speculation is None:
            with Sampler(self._model, ask.sampling) as sampler:
                for token in tokens[-ask.sampling.repeat_last :] if ask.sampling.repeat_last else []:
                    sampler.accept(token)
                yield lambda limit: self._cache.generate(sampler, limit)
            return
        from localmix.native.chooser import Chooser, ChosenTokens
        from localmix.native.gbnf import Grammar

        with Grammar(self._model, ask.grammar) if ask.grammar is not None else nullcontext() as grammar:
            chooser = Chooser(ask.sampling, grammar)
            if self._speculation is not None:
                speculation = self._speculation
                speculation.drafted = speculation.accepted = 0  # a prompt that is not read to its end has none
                yield lambda limit: speculation.generate(chooser, limit)
            else:
                yield lambda limit: self._cache.generate(ChosenTokens(chooser, self._cache), limit)

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
            text = chat_template.render(self._template, messages, bos=bos, eos=eos, name=self._template_title)
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
        self._waiting = ""
        self._sent = 0.0

    def write(self, data: bytes, tokens: int, final: bool = False) -> None:
        text = self._decoder.decode(data, final)
        if not self.parts:
            text = text.lstrip()  # sentencepiece begins every word with a space
        if text:
            self.parts.append(text)
        self._waiting += text
        now = time.monotonic()
        # a fast model's tokens go together: sending each alone costs it time, and nobody reads that fast
        if self._waiting and (final or now - self._sent >= PIECE_SECONDS):
            self._send(Piece(self._waiting, tokens))
            self._waiting, self._sent = "", now
