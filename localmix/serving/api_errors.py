"""Errors as OpenAI's API tells them, which every client of it understands.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

INVALID, PERMISSION, SERVER = "invalid_request_error", "permission_error", "server_error"
CONTEXT_EXCEEDED = "context_length_exceeded"
PROMPT_FIELDS = ("messages", "prompt", "input", "content")
RETRY_SECONDS = 2  # what a client is told to wait for an engine that loads
# llama-server names the field in words: "Field 'stop': ...", "'messages' is required", "Failed to parse tools: ..."
_QUOTED_FIELD = re.compile(r"""['"]([a-z][a-z0-9_]*)['"]|Failed to parse (messages|tools)\b""")
# nlohmann's exceptions, which llama-server passes on as errors of its own
_JSON_EXCEPTION = re.compile(r"\[json\.exception\.[^\]]*\] ?")
# of an embedding, whose text has to fit into one batch
_TOO_LARGE = re.compile(r"input \(\d+ tokens\) is too large to process")
# What goes wrong while it works. All else that llama-server calls its own error was thrown while it read the request.
_OWN_FAULT = re.compile(
    r"got exception|(pre_|post_)?decode\(\) failed|Compute error|Context size has been exceeded|Invalid input batch"
    r"|context shift|failed to|std::bad_alloc|unknown error|the current context does not"
)


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: a sentence, and what to do.
        kind: OpenAI's `type`.
        code: OpenAI's word for it, empty for none.
        param: the field of the request, empty for none.
        retry_after: seconds after which it may work, 0 for no advice.
        close: whether the connection ends with it, because the rest of the request was not read.
        details: further entries of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        code: str = "",
        param: str = "",
        retry_after: int = 0,
        close: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.close = close
        self.details = details or {}

    def document(self) -> dict[str, Any]:
        """The body of the answer. `type` at the top is what Anthropic's clients look for."""
        error = {"message": self.message, "type": self.kind, "param": self.param or None, "code": self.code or None}
        return {"type": "error", "error": {**error, **self.details}}

    def body(self) -> bytes:
        """The same as JSON."""
        return json.dumps(self.document(), ensure_ascii=False).encode("utf-8", "backslashreplace")

    def event(self, anthropic: bool) -> bytes:
        """The same as an event of a stream that has begun; the blank line ends an event that was cut."""
        name = b"event: error\n" if anthropic else b""
        return b"\n\n" + name + b"data: " + self.body() + b"\n\n"


def engine_error(status: int, body: bytes, asked: Collection[str] = ()) -> ApiError:
    """llama-server's error in OpenAI's shape: with the field, and 400 where it blames itself for the request.

    Args:
        asked: the fields of the request.
    """
    try:
        told = json.loads(body)["error"]
        message = str(told["message"])
    except (ValueError, KeyError, TypeError):
        return ApiError(502, "The engine gave an answer that is no JSON.", SERVER, code="engine_error")
    if told.get("type") == "exceed_context_size_error" or _TOO_LARGE.match(message):
        numbers = {name: told[name] for name in ("n_prompt_tokens", "n_ctx") if name in told}
        prompt = next((name for name in PROMPT_FIELDS if name in asked), "")
        return ApiError(400, message, code=CONTEXT_EXCEEDED, param=prompt, details=numbers)
    if status == 503:
        return ApiError(503, message, SERVER, code="engine_loading", retry_after=RETRY_SECONDS)
    if status == 500 and _OWN_FAULT.match(message):
        return ApiError(500, message, SERVER, code="engine_error")
    if status == 501:  # a client would try again what is told to be the server's fault
        return ApiError(400, message, code="unsupported")
    fields = [quoted or parsed for quoted, parsed in _QUOTED_FIELD.findall(message)]
    missing = "is required" in message or "not found" in message
    param = next((name for name in fields if name in asked or missing), "")
    plain = _JSON_EXCEPTION.sub("", message)
    return ApiError(status if status < 500 else 400, f"{plain[:1].upper()}{plain[1:]}", param=param)
