"""Which of llama-server's endpoints clients may reach, and why the others are closed.

| endpoint | | reason |
|---|---|---|
| the page's files | open without a key | they hold nothing of anybody |
| `/health` | answered by the gateway, without a key | says only whether there is a model |
| `/v1/models`, `/v1/models/NAME` | answered by the gateway | all engines in one list |
| `/props` | open, cleaned | the page needs it; the path of the model's file is cut to its name |
| chat, completions, responses, messages, embeddings, rerank, infill | open | the API |
| tokenize, detokenize, apply-template, counting tokens | open | no more than the model's tokenizer |
| `/v1/stream`, `/v1/streams/lookup` | open | a reload of the page takes its reply up by a random name |
| `/slots` | closed | shows what others asked, and saves and erases their caches |
| `/metrics` | closed | how much others use the server |
| `POST /props`, `/lora-adapters` | closed | change the model for everybody |
| `/tools`, `/cors-proxy` | closed | run commands and fetch pages on this machine |
| `/models/load` and the other endpoints of its router | closed | localmix starts and stops engines |
| audio | closed | no engine of localmix hears |
"""

from __future__ import annotations

import re
from typing import Literal

VECTORS = frozenset(
    {"/embedding", "/embeddings", "/rerank", "/reranking", "/v1/embeddings", "/v1/rerank", "/v1/reranking"}
)
TEXT = frozenset(
    {
        "/chat/completions",
        "/completion",
        "/completions",
        "/infill",
        "/responses",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
    }
)
# POST with a JSON object; both spellings, as llama-server has them
API = (
    VECTORS
    | TEXT
    | {
        "/apply-template",
        "/chat/completions/input_tokens",
        "/detokenize",
        "/responses/input_tokens",
        "/tokenize",
        "/v1/chat/completions/control",
        "/v1/chat/completions/input_tokens",
        "/v1/messages/count_tokens",
        "/v1/responses/input_tokens",
    }
)
HEALTH = frozenset({"/health", "/v1/health"})
MODELS = frozenset({"/models", "/v1/models"})
MODEL_PREFIXES = ("/v1/models/", "/models/")
PROPS = "/props"
STREAM = "/v1/stream"
STREAM_LOOKUP = "/v1/streams/lookup"
ANTHROPIC = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

_PRIVATE = "It shows or changes what others asked."
_ROUTER = "localmix starts and stops the models; name them after `localmix serve`."
CLOSED = {
    "/slots": _PRIVATE,
    "/metrics": "It shows how much others use the server.",
    "/lora-adapters": "It changes the model for everybody.",
    "/tools": "It runs programs on this machine.",
    "/cors-proxy": "It fetches pages on behalf of this machine.",
    "/models/load": _ROUTER,
    "/models/unload": _ROUTER,
    "/models/sse": _ROUTER,
    "/v1/audio/transcriptions": "No model here hears.",
    "/audio/transcriptions": "No model here hears.",
}
CLOSED_PREFIXES = {"/slots/": _PRIVATE}

# the names that llama-server's build gives to the page's files; no endpoint ends like one
_PAGE_FILE = re.compile(
    r"/(?:(?:[\w-]+/){0,4}[\w-][\w.-]*\.(?:css|html|ico|jpg|js|json|png|svg|txt|wasm|webmanifest|webp|woff2?))?",
    re.ASCII,
)

Place = Literal["api", "health", "models", "model", "props", "stream", "lookup", "page", "closed", "unknown"]
METHODS: dict[Place, frozenset[str]] = {
    "api": frozenset({"POST"}),
    "health": frozenset({"GET", "HEAD"}),
    "models": frozenset({"GET", "HEAD"}),
    "model": frozenset({"GET", "HEAD"}),
    "props": frozenset({"GET", "HEAD"}),
    "stream": frozenset({"GET", "DELETE"}),
    "lookup": frozenset({"POST"}),
    "page": frozenset({"GET", "HEAD"}),
}
OPEN_WITHOUT_KEY: frozenset[Place] = frozenset({"health", "page"})


def find_place(path: str) -> Place:
    """What a path means, by its exact spelling: `//slots` and `/%73lots` are unknown."""
    if path in API:
        return "api"
    if path in HEALTH:
        return "health"
    if path in MODELS:
        return "models"
    if path == PROPS:
        return "props"
    if path == STREAM:
        return "stream"
    if path == STREAM_LOOKUP:
        return "lookup"
    if closed_reason(path):
        return "closed"
    if path.startswith(MODEL_PREFIXES):
        return "model"
    return "page" if _PAGE_FILE.fullmatch(path) else "unknown"


def wants_vectors(path: str) -> bool | None:
    """Whether an endpoint makes vectors, or text; None where any model will do."""
    return True if path in VECTORS else False if path in TEXT else None


def closed_reason(path: str) -> str:
    """Why an endpoint of llama-server is closed; empty where it is none of those."""
    prefix = next((reason for start, reason in CLOSED_PREFIXES.items() if path.startswith(start)), "")
    return CLOSED.get(path, prefix)
