"""What the chat's parent and child say to each other: settings and requests in, events out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from localmix.errors import LocalmixError
from localmix.native.devices import ANYWHERE, Placement
from localmix.rope_scaling import RopeScaling
from localmix.sampling import Sampling

KV_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class DraftSettings:
    """Speculative decoding: who proposes tokens, and how many at a time.

    Attributes:
        model: a smaller model with the same vocabulary; None looks the context up for what came after the last
            tokens before (n-grams), with no second model.
        length: tokens of a proposal; where an adaptive one starts.
        adaptive: propose 2 more after a proposal that was accepted whole, else 1 less, at least 1.
        placement: what of the draft model lies on a GPU; None for the model's own placement.
    """

    model: Path | None = None
    length: int = 4
    adaptive: bool = True
    placement: Placement | None = None


@dataclass(frozen=True)
class EngineSettings:
    """How the model is loaded.

    Attributes:
        context: positions of the KV cache.
        threads: None for the physical cores.
        placement: what lies on which device.
        repack: reorder weights for this processor; faster, but in memory of their own.
        kv_type: type of the KV cache, one of `KV_TYPES`.
        rope: how positions are stretched; None for the model's own way.
        draft: speculative decoding; None for one token at a time.
        chat_template: Jinja source to use in place of the model's own.
        template_name: which of a model's several templates to use; None for the first.
    """

    context: int = 4096
    threads: int | None = None
    placement: Placement = ANYWHERE
    repack: bool = True
    kv_type: str = "f16"
    rope: RopeScaling | None = None
    draft: DraftSettings | None = None
    chat_template: str | None = None
    template_name: str | None = None

    def template_title(self, model: Path) -> str:
        """What error sentences call the template."""
        return f"The chat template of {model.name}" if self.chat_template is None else "The given chat template"


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
        has_template: whether there is a chat template; without one the model continues the text.
        restored_tokens: tokens whose keys and values came out of a state file.
        own_sampling: the fields of `Sampling` that the model sets itself, for `Sampling.for_model`.
    """

    context: int
    trained_context: int
    has_template: bool
    restored_tokens: int = 0
    own_sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """The context is full: the oldest messages are left out of this prompt and of those to come.

    Attributes:
        turns: how many messages, beyond those that were left out before; whole questions with their answers.
    """

    turns: int


@dataclass(frozen=True)
class Reading:
    """The prompt is being read: tokens done, and in all, beyond what the cache held (`cached`)."""

    done: int
    total: int
    cached: int = 0


@dataclass(frozen=True)
class Piece:
    """The next characters of the reply, whole ones only; `tokens` of the reply have come so far."""

    text: str
    tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """The finished reply.

    Attributes:
        finish_reason: `stop` (the model ended it), `length` (the limit or the context did) or `stopped` (the user).
        cached_tokens: of the prompt's tokens, those that needed no computing.
        first_token_seconds: from the question to the first token.
        pp_tps, tg_tps: tokens per second of prompt and of generation; None when there was nothing to measure.
        context_used: positions of the context that prompt and reply take.
        drafted, accepted: tokens that speculation proposed, and those of them that the model took.
        speedup: generation against one token at a time, estimated from the steps of this reply that had no
            proposal; None without speculation, or with nothing to compare.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str
    first_token_seconds: float | None
    pp_tps: float | None
    tg_tps: float | None
    context_used: int = 0
    drafted: int = 0
    accepted: int = 0
    speedup: float | None = None

    @property
    def acceptance(self) -> float | None:
        """The share of proposed tokens that the model took, or None."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True)
class StateSaved:
    """The KV cache is on the disk: its tokens, and the bytes of the file (0 if there was nothing to save)."""

    tokens: int
    bytes: int


Event = Loading | Loaded | Dropped | Reading | Piece | Reply | StateSaved


@dataclass(frozen=True)
class Open:
    """A request to load a model, the first one.

    Attributes:
        state: a file to fill the KV cache from.
    """

    path: Path
    settings: EngineSettings
    state: Path | None = None


@dataclass(frozen=True)
class Ask:
    """A request for the next message.

    Attributes:
        messages: with `role` and `content`.
        limit: most tokens of the reply; None for what the context has room for.
        grammar: GBNF that the reply follows; None for free text.
    """

    messages: list[dict[str, str]]
    sampling: Sampling
    limit: int | None
    grammar: str | None = None


@dataclass(frozen=True)
class SaveState:
    """A request to write the KV cache to a file."""

    path: Path


@dataclass(frozen=True)
class RestoreState:
    """A request to fill the KV cache from a file."""

    path: Path


@dataclass(frozen=True)
class Request:
    """What the parent sends, numbered so that its answers can be told from those of others."""

    number: int
    content: Open | Ask | SaveState | RestoreState


@dataclass(frozen=True)
class Answer:
    """What the child sends: an event or an error, for the request of that number.

    A reply that nobody listened to to its end leaves answers behind, which the number tells apart.
    """

    number: int
    content: Event | LocalmixError


@dataclass(frozen=True)
class Rendering:
    """Sent before and after the chat template runs: the time between is limited."""

    finished: bool


@dataclass(frozen=True)
class Overdue:
    """The parent's reminder that it wanted the request of this number to end."""

    number: int
