"""From what the user asks of `localmix serve` to how each llama-server is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmix import library
from localmix.capacity import memory
from localmix.cli.memory_check import Choice, MemoryCheck
from localmix.conversation.chat_events import DraftSettings
from localmix.errors import FileError, UsageError
from localmix.native.devices import PROCESSOR, has_gpu_backend
from localmix.serving.draft_check import check_draft
from localmix.serving.engine_options import PLAIN_TEMPLATE, EngineOptions, longer_key, rope_base
from localmix.serving.server_binary import server_devices
from localmix.sources.open import open_source

if TYPE_CHECKING:
    from localmix.cli.console import Console
    from localmix.native.devices import Device
    from localmix.rope_scaling import RopeScaling
    from localmix.sources.base import Source

SLOTS = (4, 2, 1)  # the first of these that runs well
_NGRAM_DRAFT = 16  # a text that repeats itself does so at length
_MOST_CACHE_BYTES = 8 * 2**30
_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; the same for all models.

    Attributes:
        context: positions of each request; None for the default.
        slots: requests at once; None for as many as fit.
        draft: a model's name or `ngram`; None for no speculative decoding.
        draft_tokens: None for the default.
        template: a file, or the name of one of the model's own templates.
        embeddings: make vectors instead of text.
        force: load models even if memory seems too small.
        further: arguments that llama-server gets as they are.
        remote: devices of other machines.
    """

    context: int | None
    slots: int | None
    kv_type: str
    device: str
    gpu_layers: int | None
    experts: str
    rope: RopeScaling | None
    threads: int | None
    draft: str | None
    draft_tokens: int | None
    template: str | None
    embeddings: bool
    force: bool
    further: tuple[str, ...] = ()
    remote: tuple[Device, ...] = ()


class Preparation:
    """Finds models, checks that they fit into memory together, and says how each is started.

    Args:
        program: llama-server.
        folder: for files that it reads.
    """

    def __init__(self, console: Console, program: Path, folder: Path, wishes: Wishes) -> None:
        self._console = console
        self._program = program
        self._folder = folder
        self._wishes = wishes

    def engines(self, names: Sequence[str]) -> list[EngineOptions]:
        """How each model is started.

        Args:
            names: as the user typed them; none for the model used last.

        Raises:
            LocalmixError: a model cannot be found or read, does not fit, or another wish cannot be fulfilled.
        """
        wishes = self._wishes
        if wishes.remote and len(names) > 1:
            raise UsageError("A worker serves one model at a time.", "Name one model with --rpc.")
        draft = _draft(wishes, len(names))
        if draft is not None and wishes.remote:
            draft = dataclasses.replace(draft, placement=PROCESSOR)
        check = MemoryCheck(
            self._console,
            wishes.context,
            kv_type=wishes.kv_type,
            device=self._usable_device(),
            gpu_layers=wishes.gpu_layers,
            experts=wishes.experts,
            draft=draft.model if draft else None,
            slots=SLOTS if wishes.slots is None else (wishes.slots,),
            generation=False,
            embeddings=wishes.embeddings,
            remote=wishes.remote,
        )
        found: list[EngineOptions] = []
        room = memory.available().bytes
        for name in names or (None,):
            path = library.resolve(name, library.Purpose.RUN, check.fits).absolute()
            choice = check.check(path, wishes.force)
            check.reserve(path)
            room -= choice.need.total
            options = self._options(path, choice, draft)
            if any(options.name == other.name for other in found):
                raise UsageError(f"{options.name} is named twice.", "Clients could not tell the two apart.")
            found.append(options)
        for options in found:
            if not options.embeddings:  # the next chat is with it
                library.remember(options.model)
                break
        # half of what is left; the rest is for other programs, and for the system's cache of files
        share = min(_MOST_CACHE_BYTES, max(0, room) // 2 // len(found))
        return [dataclasses.replace(options, cache_bytes=share) for options in found]

    def _options(self, path: Path, choice: Choice, draft: DraftSettings | None) -> EngineOptions:
        wishes = self._wishes
        model, kind = library.split_name(path)
        name = f"{model}:{kind}" if kind else model
        if draft is not None and draft.model is not None and not choice.embeddings:
            check_draft(path, draft.model)
        with open_source(path) as source:
            if choice.embeddings and not wishes.embeddings:
                self._console.note(f"{name} makes vectors (/v1/embeddings), not text.")
            return EngineOptions(
                model=path,
                name=name,
                context=choice.context,
                slots=choice.slots,
                kv_type=choice.kv_type,
                placement=choice.placement,
                repack=choice.repack,
                threads=wishes.threads,
                rope=wishes.rope,
                longer_key=longer_key(source, choice.context, wishes.rope),
                rope_base=rope_base(source, wishes.rope),
                draft=None if choice.embeddings else draft,
                template=None if choice.embeddings else self._template(source, name),
                embeddings=choice.embeddings,
                pooling=None if source.get("{arch}.pooling_type") is not None else "mean",
                further=wishes.further,
            )

    def _template(self, source: Source, name: str) -> Path | None:
        """The file with the chat template; None for the model's own."""
        wanted = self._wishes.template
        if wanted is None:
            if source.get(_TEMPLATE_KEY):
                return None
            self._console.note(f"{name} has no chat template: it goes on with the text of a conversation.")
            return self._written("plain", PLAIN_TEMPLATE)
        path = Path(wanted)
        if path.is_file():
            return path.absolute()
        named = source.get(f"{_TEMPLATE_KEY}.{wanted}")
        if isinstance(named, str):
            return self._written(f"named-{len(list(self._folder.iterdir()))}", named)
        raise FileError(
            f"There is no file {wanted}, and {name} has no chat template of that name.",
            "Name a file with a Jinja template.",
        )

    def _written(self, stem: str, template: str) -> Path:
        path = self._folder / f"{stem}.jinja"
        path.write_text(template, encoding="utf-8")
        return path

    def _usable_device(self) -> str:
        """The devices to reckon with: none but the processor where llama-server was built for no other.

        Raises:
            UsageError: the user named another.
        """
        device = self._wishes.device
        if device == "cpu" or (device == "auto" and not has_gpu_backend()) or server_devices(self._program):
            return device
        said = "This llama-server was built without a GPU"
        hint = "`localmix doctor --build-server --backend cuda` builds one with CUDA."
        if device != "auto":
            raise UsageError(f"{said}, so there is no --device {device}.", hint)
        self._console.note(f"{said}: models run on the processor. {hint}")
        return "cpu"


def _draft(wishes: Wishes, models: int) -> DraftSettings | None:
    """Speculative decoding as the user wants it.

    Raises:
        UsageError: the wishes contradict each other, or there is no such model.
    """
    if wishes.draft is None:
        if wishes.draft_tokens is not None:
            raise UsageError("--draft-tokens needs --draft.", "Name a smaller model, or ngram.")
        return None
    if wishes.draft == "ngram":
        return DraftSettings(None, wishes.draft_tokens or _NGRAM_DRAFT)
    if models > 1:
        raise UsageError("A draft model works for one model only.", "Serve one, or use --draft ngram.")
    path = library.resolve(wishes.draft, library.Purpose.RUN).absolute()
    return DraftSettings(path, wishes.draft_tokens or DraftSettings.length)
