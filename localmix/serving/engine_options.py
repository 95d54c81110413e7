"""What localmix worked out about a model, as arguments of llama-server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localmix.capacity.memory import trained_context
from localmix.conversation.chat_events import DraftSettings
from localmix.errors import UsageError
from localmix.native.devices import ANYWHERE, Placement, default_threads
from localmix.rope_scaling import RopeScaling
from localmix.serving.engine_client import EngineAddress
from localmix.sources.base import Source
from localmix.worker import ENVIRONMENT, WAITING

MIB = 2**20
_CELLS = 256  # llama.cpp rounds a context up to a multiple
NGRAM_TOKENS = 4
BATCH = 512  # tokens of a prompt that are computed before anything else is looked at

# A conversation for a model without a template: its texts, one under the other. Chat leaves a system prompt out there;
# llama-server would put it in front even so.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{{- '' if loop.first else '\\n' -}}{{- message['content'] -}}{%- endfor -%}"
)

_GATES = "localmix itself listens, with rules of its own: see --host, --port, --api-key, --api-key-file and --cors."
_PROGRAMS = "Whoever reaches the server could then run programs on this machine, or reach others through it."
_MODELS = "Name models before the options, as paths or library names."
_MEMORY = "The memory check has to know it."
# Arguments of llama-server that would get around what localmix is there for, and what to say about each.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("--host", "--port", "--reuse-port", "--api-key", "--api-key-file", "--api-prefix"), _GATES),
    **dict.fromkeys(("--cors-origins", "--cors-methods", "--cors-headers", "--cors-credentials"), _GATES),
    **dict.fromkeys(("--no-cors-credentials", "--ssl-key-file", "--ssl-cert-file"), _GATES),
    **dict.fromkeys(("--tools", "--tools-runtime", "--mcp-servers-config", "--mcp-servers-json"), _PROGRAMS),
    **dict.fromkeys(("-ag", "--agent", "--ui-mcp-proxy", "--webui-mcp-proxy"), _PROGRAMS),
    **dict.fromkeys(("--path", "--media-path", "--slot-save-path"), "It opens folders of this machine to clients."),
    **dict.fromkeys(("--props",), "It lets clients change the server."),
    **dict.fromkeys(("-m", "--model", "-a", "--alias", "-mu", "--model-url", "-dr", "--docker-repo"), _MODELS),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token"), _MODELS),
    **dict.fromkeys(("--models-dir", "--models-preset", "--models-max", "--models-autoload"), _MODELS),
    **dict.fromkeys(("-c", "--ctx-size", "--kv-unified-per-slot"), f"{_MEMORY} Use --ctx."),
    **dict.fromkeys(("-np", "--parallel"), f"{_MEMORY} Use --slots."),
    **dict.fromkeys(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), f"{_MEMORY} Use --kv-type."),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), f"{_MEMORY} Use --gpu-layers."),
    **dict.fromkeys(("-dev", "--device"), f"{_MEMORY} Use --device."),
    **dict.fromkeys(("-md", "--spec-draft-model", "--model-draft"), f"{_MEMORY} Use --draft."),
    **dict.fromkeys(("-hfd", "-hfrd", "--spec-draft-hf", "--hf-repo-draft"), f"{_MEMORY} Use --draft."),
    **dict.fromkeys(("--rpc",), f"{_MEMORY} Use --rpc."),
    **dict.fromkeys(("--embedding", "--embeddings"), "Use --embeddings."),
    **dict.fromkeys(("--log-file", "--log-disable", "--log-jsonl"), "localmix keeps the log: see --log-json."),
    **dict.fromkeys(("-h", "--help", "--usage", "--version", "--list-devices"), "Run llama-server itself for that."),
}

# What a user's environment may hold for other programs, and a server must not follow or know.
_FORBIDDEN_VARIABLES = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_SERVER_", "HF_TOKEN", "LOCALMIX_API_KEY")


@dataclass(frozen=True)
class EngineOptions:
    """How one llama-server is started.

    Attributes:
        model: the GGUF file (its first part, if split).
        name: what clients call it.
        context: positions of each slot.
        slots: requests that are worked on at once.
        longer_key: the metadata key of the trained context, where `context` goes beyond it: llama-server would stop
            there otherwise.
        rope_base: base of the rotary frequencies; None for the model's own.
        template: a file with a Jinja template; None for the model's own.
        embeddings: make vectors instead of text.
        pooling: how the vectors of a text's tokens become one; None as the model says.
        cache_bytes: memory for prompts that no slot holds any more.
        further: arguments that llama-server gets as they are.
    """

    model: Path
    name: str
    context: int
    slots: int = 1
    kv_type: str = "f16"
    placement: Placement = ANYWHERE
    repack: bool = True
    threads: int | None = None
    longer_key: str | None = None
    rope: RopeScaling | None = None
    rope_base: float | None = None
    draft: DraftSettings | None = None
    template: Path | None = None
    embeddings: bool = False
    pooling: str | None = None
    cache_bytes: int = 0
    further: tuple[str, ...] = ()

    def arguments(self, address: EngineAddress) -> list[str]:
        """llama-server's arguments, to listen at an address."""
        threads = self.threads or default_threads()
        given: dict[str, object] = {
            "--model": self.model,
            "--alias": self.name,
            "--host": address.socket or "127.0.0.1",
            "--ctx-size": self.context * self.slots,
            "--parallel": self.slots,
            "--cache-type-k": self.kv_type,
            "--cache-type-v": self.kv_type,
            "--threads": threads,
            "--threads-batch": threads,
            "--cache-ram": self.cache_bytes // MIB,
            # the memory check has decided; llama-server's own search would decide again
            "--fit": "off",
        }
        if address.socket is None:
            given["--port"] = address.port
        if self.template is not None:
            given["--chat-template-file"] = self.template
        if self.longer_key is not None:
            given["--override-kv"] = f"{self.longer_key}=int:{-(-self.context // _CELLS) * _CELLS}"
        if not self.placement.devices:
            # As fast as llama-server's 2048 on a processor, and other clients wait for a quarter of the time
            given["--batch-size"] = BATCH
        flags = ["--offline", *([] if self.repack else ["--no-repack"])]
        if self.embeddings:
            # a text's tokens see each other: they have to be computed at once
            given |= {"--batch-size": self.context, "--ubatch-size": self.context}
            given |= {"--pooling": self.pooling} if self.pooling else {}
            flags.append("--embeddings")
        given |= _placement(self.placement) | self._rope() | self._drafting()
        return [*(str(part) for option in given.items() for part in option), *flags, *self.further]

    def _rope(self) -> dict[str, object]:
        given: dict[str, object] = {}
        rope = self.rope or RopeScaling()
        if rope.kind is not None:
            given["--rope-scaling"] = rope.kind
        if rope.kind == "none":
            given["--rope-scale"] = 1
        elif rope.factor is not None:
            given["--rope-scale"] = rope.factor
        if self.rope_base is not None:
            given["--rope-freq-base"] = self.rope_base
        if rope.original_context is not None:
            given["--yarn-orig-ctx"] = rope.original_context
        return given

    def _drafting(self) -> dict[str, object]:
        draft = self.draft
        if draft is None:
            return {}
        if draft.model is None:
            # chat looks for the last four tokens, too
            return {
                "--spec-type": "ngram-simple",
                "--spec-ngram-simple-size-n": NGRAM_TOKENS,
                "--spec-ngram-simple-size-m": draft.length,
            }
        placement = draft.placement or self.placement
        return {
            "--spec-type": "draft-simple",
            "--spec-draft-model": draft.model,
            "--spec-draft-n-max": draft.length,
            "--spec-draft-type-k": self.kv_type,
            "--spec-draft-type-v": self.kv_type,
            **{f"--spec-draft-{name}": value for name, value in _draft_placement(placement).items()},
        }


def _placement(placement: Placement) -> dict[str, object]:
    given: dict[str, object] = {}
    if placement.servers:  # first: llama-server knows their devices from then on
        given["--rpc"] = ",".join(placement.servers)
    if placement.layer_counts:
        given["--tensor-split"] = ",".join(map(str, placement.layer_counts))
    if placement.gpu_layers == 0:
        given["--device"] = "none"
    elif placement.devices:
        given["--device"] = ",".join(placement.devices)
    if placement.gpu_layers is not None:
        given["--gpu-layers"] = placement.gpu_layers
    if placement.cpu_expert_layers:
        given["--n-cpu-moe"] = placement.cpu_expert_layers
    return given


def _draft_placement(placement: Placement) -> dict[str, object]:
    if placement.gpu_layers == 0:
        return {"device": "none", "ngl": 0}
    return {"device": ",".join(placement.devices)} if placement.devices else {}


def longer_key(source: Source, context: int, rope: RopeScaling | None) -> str | None:
    """`EngineOptions.longer_key`; with YaRN llama.cpp itself counts the trained context anew."""
    yarn = rope is not None and rope.kind == "yarn"
    if context <= trained_context(source) or yarn or not source.generates:
        return None
    return f"{source.architecture}.context_length"


def rope_base(source: Source, rope: RopeScaling | None) -> float | None:
    """Base of the rotary frequencies that a scaling asks for; None for the model's own."""
    if rope is None or rope.ntk_factor is None:
        return rope.freq_base if rope else None
    base = rope.freq_base or source.get("{arch}.rope.freq_base", 10000.0)
    heads = source.numbers("{arch}.attention.head_count", (1,))[0] or 1
    dimensions = source.number("{arch}.rope.dimension_count") or source.number("{arch}.embedding_length") // heads
    return float(base * rope.ntk_factor ** (dimensions / (dimensions - 2)))


def check_further(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments for llama-server that a user gave behind `--`.

    Raises:
        UsageError: one would get around the gateway or the memory check.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        name = name.replace("_", "-") if name.startswith("--") else name  # llama.cpp takes both
        if name in REFUSED:
            raise UsageError(f"llama-server does not get {argument.partition('=')[0]} from here.", REFUSED[name])
    return tuple(arguments)


def environment(address: EngineAddress) -> dict[str, str]:
    """llama-server's environment: this one, without what would change or tell what it must not.

    Its threads share the cores with the gateway and whatever else a server's machine does, so they wait as a worker's.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FORBIDDEN_VARIABLES)}
    key = {"LLAMA_API_KEY": address.key} if address.key else {}
    return {**WAITING, **kept, **ENVIRONMENT, **key}
